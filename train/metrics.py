"""The metrics of a run: one list for training, evaluation, tables and plots.

To add a metric, add one entry to METRICS. There are three kinds of entries:

    TargetMetric    Σ w · value / Σ w over the targets of a batch; w is 0 or 1
    UpdateMetric    numbers of one training step, from parameters and gradient
    DerivedMetric   a number computed on the host from the means above

Training records hold all of them, evaluation the first and the last kind. A
record of training has the mean over the steps since the record before.

Functions that compute a metric import jax themselves. Tables and plots of
records need only the names, and should not wait for jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import typing
from typing import Any, Literal, NamedTuple

if typing.TYPE_CHECKING:
  from jax import Array
  import numpy as np


class Targets(NamedTuple):
  """Values that a step has for each target of its batch."""

  nll_BM: Array  # float32, −log of the probability of the target
  correct_BM: Array  # float32, 1 where the target has the greatest logit
  #: float32, 1 where the target can be recalled from its own row, see
  #: data/recall.py. None in training, and where the data tells none apart.
  recalled_BM: Array | None = None


class Update(NamedTuple):
  """Values that a step has for its update, each a tree like `params`."""

  params: Any  # before the update
  grads: Any  # of the mean loss, before clipping
  updates: Any  # what is added to the parameters


@dataclasses.dataclass(frozen=True)
class TargetMetric:
  """A mean over targets."""

  #: In records.
  name: str
  #: Returns float32 (B, M). The loss itself is summed by the step.
  value: Callable[[Targets], Array]
  #: Returns float32 (B, M), 1 at the targets of the mean. None takes all.
  among: Callable[[Targets], Array] | None = None
  #: Whether it needs `Targets.recalled_BM`, and so exists in evaluation only.
  needs_recall: bool = False
  #: Whether a checkpoint with a lower or with a higher value is better. None:
  #: neither.
  better: Literal["lower", "higher"] | None = None
  #: In the table at the end of a run. None leaves it out.
  label: str | None = None
  #: Limits of the y axis in learning.png. None leaves it out.
  plot: tuple[float | None, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class UpdateMetric:
  """Numbers of one training step."""

  #: In records, if `value` returns a number.
  name: str
  #: Returns a float32 scalar, or a dict of arrays (pairs,): see `by_layer`.
  value: Callable[[Update], Array | dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class DerivedMetric:
  """A number computed from the means, on the host."""

  #: In records.
  name: str
  #: The mean that it is computed from; without it the metric is left out.
  source: str
  #: Returns the number from the mean, which may be infinite or NaN.
  value: Callable[[float], float]
  #: Whether it is reported for text only.
  text_only: bool = False
  #: As of a TargetMetric.
  better: Literal["lower", "higher"] | None = None
  #: In the table at the end of a run. None leaves it out.
  label: str | None = None
  #: Whether pictures of text show it, on a logarithmic axis, instead of its
  #: source.
  replaces_source: bool = False


Metric = TargetMetric | UpdateMetric | DerivedMetric


def recalled(targets: Targets) -> Array:
  """Return 1 at the targets that can be recalled from their own row, (B, M)."""
  assert targets.recalled_BM is not None
  return targets.recalled_BM


def not_recalled(targets: Targets) -> Array:
  """Return 1 at the other targets, (B, M)."""
  return 1 - recalled(targets)


def perplexity(loss: float) -> float:
  """Return exp(loss), or infinity where that is beyond floats."""
  return math.exp(loss) if not loss >= 700 else math.inf


def affine_statistics(update: Update) -> dict[str, Array]:
  """Return mean and standard deviation of every γ and β, (pairs,) each.

  The paper's Figure 10 shows them. Keys are the parameter's path under
  `pairs`, a colon, and `mean` or `std`.
  """
  import jax
  import jax.numpy as jnp

  found = {}
  pairs = update.params.get("pairs", {})
  for path, x_NE in jax.tree_util.tree_leaves_with_path(pairs):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith(("/gamma", "/beta")):
      found[f"{name}:mean"] = x_NE.mean(axis=1)
      found[f"{name}:std"] = jnp.std(x_NE, axis=1)
  return found


def _norm(tree: Any) -> Array:
  """Return the root of the sum of squares of all arrays of a tree."""
  import optax

  return optax.tree.norm(tree)


METRICS: tuple[Metric, ...] = (
  TargetMetric(
    "loss", lambda t: t.nll_BM, better="lower", label="loss", plot=(0, None)
  ),
  TargetMetric(
    "accuracy",
    lambda t: t.correct_BM,
    better="higher",
    label="accuracy",
    plot=(-0.02, 1.02),
  ),
  TargetMetric(
    "ar_loss",
    lambda t: t.nll_BM,
    among=recalled,
    needs_recall=True,
    better="lower",
  ),
  TargetMetric(
    "non_ar_loss",
    lambda t: t.nll_BM,
    among=not_recalled,
    needs_recall=True,
    better="lower",
  ),
  TargetMetric(
    "ar_share", recalled, needs_recall=True, label="AR share of targets"
  ),
  UpdateMetric("grad_norm", lambda u: _norm(u.grads)),
  UpdateMetric("update_norm", lambda u: _norm(u.updates)),
  UpdateMetric("param_norm", lambda u: _norm(u.params)),
  UpdateMetric("affine", affine_statistics),
  DerivedMetric(
    "perplexity",
    "loss",
    perplexity,
    text_only=True,
    better="lower",
    label="perplexity",
    replaces_source=True,
  ),
  DerivedMetric(
    "ar_perplexity",
    "ar_loss",
    perplexity,
    text_only=True,
    better="lower",
    label="AR perplexity",
  ),
  DerivedMetric(
    "non_ar_perplexity",
    "non_ar_loss",
    perplexity,
    text_only=True,
    better="lower",
    label="non-AR perplexity",
  ),
)


def check_metrics(metrics: Sequence[Metric]) -> None:
  """Check the names of metrics, and the sources of those that are derived.

  Raises:
    ValueError: two metrics have the same name, or a source is not the name of
      a TargetMetric or UpdateMetric.
  """
  names = {"tokens"}  # records hold it too
  for metric in metrics:
    if metric.name in names:
      raise ValueError(
        f"METRICS has the name {metric.name!r} twice: expected another name "
        "for each metric, and none called 'tokens'"
      )
    names.add(metric.name)
  sources = [x.name for x in metrics if not isinstance(x, DerivedMetric)]
  for metric in metrics:
    if isinstance(metric, DerivedMetric) and metric.source not in sources:
      raise ValueError(
        f"the metric {metric.name!r} has the source {metric.source!r}: "
        f"expected one of {tuple(sources)}"
      )


check_metrics(METRICS)

# The progress line shows the first of these that a record holds.
HEADLINES = ("perplexity", "accuracy")


def target_sums(
  loss: Array, weights_BM: Array, targets: Targets
) -> dict[str, Array]:
  """Return what the means over the targets are computed from.

  Args:
    loss: Σ w · nll over the batch, as the loss function summed it.
    weights_BM: float32, 1 at real targets and 0 at padding.
    targets: what is known of each target.

  Returns:
    `tokens`, the number of targets, and for each metric the sum of its value.
    A metric over some of the targets has `NAME:tokens` too, their number.

  Raises:
    ValueError: a metric returns an array of another shape than (B, M).
  """
  sums = {"tokens": weights_BM.sum()}
  for metric in METRICS:
    if not isinstance(metric, TargetMetric):
      continue
    if metric.needs_recall and targets.recalled_BM is None:
      continue
    if metric.name == "loss":  # summed already, in chunks where there are any
      sums["loss"] = loss
      continue
    counted_BM = weights_BM
    if metric.among is not None:
      among_BM = metric.among(targets)
      _check_shape(f"{metric.name!r}: among", among_BM, weights_BM.shape)
      counted_BM = weights_BM * among_BM
      sums[f"{metric.name}:tokens"] = counted_BM.sum()
    value_BM = metric.value(targets)
    _check_shape(f"{metric.name!r}: value", value_BM, weights_BM.shape)
    sums[metric.name] = (counted_BM * value_BM).sum()
  return sums


def target_means(sums: Mapping[str, Any]) -> dict[str, Any]:
  """Return the means that belong to sums of `target_sums`.

  Args:
    sums: of one batch, or added over several; arrays or floats.

  Returns:
    The mean of each metric. A metric over some of the targets, of which there
    are none, is left out if the sums are floats and 0 if they are arrays.
  """
  import jax.numpy as jnp

  means = {}
  for metric in METRICS:
    if not isinstance(metric, TargetMetric) or metric.name not in sums:
      continue
    count = sums.get(f"{metric.name}:tokens")
    if count is None:
      count = sums["tokens"]
    elif not isinstance(count, float):  # a traced number
      count = jnp.maximum(count, 1)
    elif count == 0:
      continue
    means[metric.name] = sums[metric.name] / count
  return means


def update_metrics(update: Update) -> dict[str, Array]:
  """Return every UpdateMetric of a step, by name.

  Raises:
    ValueError: a metric returns neither a scalar nor a dict.
  """
  found: dict[str, Array] = {}
  for metric in METRICS:
    if isinstance(metric, UpdateMetric):
      value = metric.value(update)
      if isinstance(value, dict):
        found |= value
        continue
      _check_shape(f"{metric.name!r}: value", value, ())
      found[metric.name] = value
  return found


def _check_shape(what: str, value: Any, expected: tuple[int, ...]) -> None:
  import jax.numpy as jnp

  shape = jnp.shape(value)
  if shape != expected:
    raise ValueError(
      f"the metric {what} returns an array of shape {shape}: expected "
      f"{expected}"
    )


def by_layer(values: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Return a step's metrics as floats, arrays over the pairs by layer.

  `second/mixer/query_affine/gamma:mean` (pairs,) becomes
  `layer1/query_gamma_mean`, `layer3/query_gamma_mean` and so on: layers count
  from 0, and a pair has two.
  """
  flat = {}
  for name, value in values.items():
    path, _, kind = name.partition(":")
    if not kind:
      flat[name] = float(value)
      continue
    block, *_, side, which = path.split("/")
    label = f"{side.removesuffix('_affine')}_{which}_{kind}"
    for pair, x in enumerate(value):
      flat[f"layer{2 * pair + (block == 'second')}/{label}"] = float(x)
  return flat


def with_derived(
  values: Mapping[str, float], *, text: bool
) -> dict[str, float]:
  """Return the means, and every DerivedMetric whose source is among them.

  Args:
    values: means by name.
    text: whether the data is text.
  """
  found = dict(values)
  for metric in METRICS:
    if not isinstance(metric, DerivedMetric) or metric.source not in values:
      continue
    if text or not metric.text_only:
      found[metric.name] = float(metric.value(values[metric.source]))
  return found


def table_labels() -> dict[str, str]:
  """Return the metrics of tables: label by name, in the order of METRICS."""
  labels = {
    metric.name: metric.label
    for metric in METRICS
    if not isinstance(metric, UpdateMetric) and metric.label is not None
  }
  # A metric that ranks nothing, as the share of AR targets, depends on the data
  # alone and is the same for both weights.
  averaged = {
    of_average(name): f"{label}, averaged weights"
    for name, label in labels.items()
    if better(name) is not None
  }
  return labels | averaged


def better(name: str) -> Literal["lower", "higher"] | None:
  """Return whether a lower or a higher value of a held-out metric is better.

  Args:
    name: the metric, also of the averaged weights.

  Returns:
    None if the metric does not rank checkpoints, or there is no such metric.
  """
  for metric in METRICS:
    if isinstance(metric, UpdateMetric):
      continue
    if name in (metric.name, of_average(metric.name)):
      return metric.better
  return None


def ranking(*, text: bool, recall: bool, averaged: bool) -> list[str]:
  """Return the held-out metrics of a run that rank its checkpoints.

  Args:
    text: whether the data is text.
    recall: whether the data tells recalled targets apart.
    averaged: whether the run keeps averaged weights.
  """
  needs_recall = {
    x.name: x.needs_recall for x in METRICS if isinstance(x, TargetMetric)
  }
  found = []
  for metric in METRICS:
    if isinstance(metric, UpdateMetric) or metric.better is None:
      continue
    derived = isinstance(metric, DerivedMetric)
    source = metric.source if derived else metric.name
    if (text or not (derived and metric.text_only)) and (
      recall or not needs_recall.get(source, False)
    ):
      found.append(metric.name)
  return found + [of_average(x) for x in found if averaged]


def of_average(name: str) -> str:
  """Return the name of a held-out metric of the averaged weights."""
  return f"ema_{name}"


@dataclasses.dataclass(frozen=True)
class Panel:
  """One panel of a picture of learning curves."""

  #: The metric, as in records.
  name: str
  #: Of the y axis.
  label: str
  #: Limits of the y axis; None where the curves decide.
  limits: tuple[float | None, float | None]
  #: Whether the y axis is logarithmic.
  log: bool = False


def panels(*, text: bool) -> list[Panel]:
  """Return what pictures of learning curves show, one panel each.

  Args:
    text: whether the data is text. A picture then has the perplexity on a
      logarithmic axis, instead of the loss.
  """
  replaced = {
    metric.source: metric
    for metric in METRICS
    if isinstance(metric, DerivedMetric) and metric.replaces_source and text
  }
  found = []
  for metric in METRICS:
    if not isinstance(metric, TargetMetric) or metric.plot is None:
      continue
    other = replaced.get(metric.name)
    if other is None:
      label = metric.label or metric.name
      found.append(Panel(metric.name, label, metric.plot))
    else:
      label = other.label or other.name
      found.append(Panel(other.name, label, (None, None), log=True))
  return found


def are_finite(values: Mapping[str, float]) -> bool:
  """Return whether every value is a finite number."""
  return all(math.isfinite(value) for value in values.values())
