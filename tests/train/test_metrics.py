"""The list of metrics: its arithmetic, and a run with more entries."""

import io
import math
from pathlib import Path
import types

import chex
import jax
import jax.numpy as jnp
from matplotlib import image
import numpy as np
import pytest
from rich.console import Console
from train_cases import tiny, trainer as trainer

import train
from train import metrics
from train.loop import Outcome
from train.metrics import DerivedMetric, TargetMetric, UpdateMetric
from train.presets import describe_model, make_presets
from train.records import metrics_writer, report
from train.records.run_folder import RunFolder


def _largest(update: metrics.Update) -> jax.Array:
  leaves = jax.tree.leaves(update.grads)
  return jnp.stack([jnp.abs(x).max() for x in leaves]).max()


_MORE = (
  TargetMetric(
    "probability",
    lambda targets: jnp.exp(-targets.nll_BM),
    label="mean probability",
    plot=(0, 1),
  ),
  TargetMetric(
    "surprise",
    lambda targets: targets.nll_BM,
    among=lambda targets: 1 - targets.correct_BM,
  ),
  UpdateMetric("largest_gradient", _largest),
  DerivedMetric("bits", "loss", lambda x: x / math.log(2), label="bits"),
)


def test_one_entry_adds_a_metric_everywhere(
  tmp_path: Path, monkeypatch
) -> None:
  """To records of training and evaluation, the table and the picture."""
  monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, *_MORE))
  text = io.StringIO()
  train.run(tiny(), tmp_path / "run", console=Console(file=text, width=200))
  records = RunFolder(tmp_path / "run").read_metrics()
  assert {x["kind"] for x in records} == {"train", "eval"}
  for record in records:
    assert 0 < record["probability"] < 1
    assert record["bits"] == pytest.approx(record["loss"] / math.log(2))
    assert record["surprise"] >= record["loss"] or record["accuracy"] == 1
    assert ("largest_gradient" in record) == (record["kind"] == "train")
    assert record.get("largest_gradient", 0) <= record.get("grad_norm", 0)
  assert "held-out mean probability" in text.getvalue()
  assert "held-out bits" in text.getvalue()
  height, width, _ = image.imread(tmp_path / "run" / "learning.png").shape
  assert (width, height) == (1800, 570)  # three panels of 4 by 3.8 inches


def _targets(seed: int = 0) -> tuple[np.ndarray, metrics.Targets]:
  """Return weights and targets, (3, 4), with padding."""
  rng = np.random.default_rng(seed)
  weights_BM = (rng.random((3, 4)) < 0.8).astype(np.float32)
  correct_BM, recalled_BM = (
    (rng.random((3, 4)) < 0.5).astype(np.float32) for _ in range(2)
  )
  nll_BM = rng.exponential(size=(3, 4)).astype(np.float32)
  return weights_BM, metrics.Targets(nll_BM, correct_BM, recalled_BM)


def test_means_are_over_the_targets_of_a_metric() -> None:
  weights_BM, targets = _targets()
  nll_BM, correct_BM, recalled_BM = (np.asarray(x) for x in targets)
  loss = jnp.float32((weights_BM * nll_BM).sum())
  sums = metrics.target_sums(loss, jnp.asarray(weights_BM), targets)
  found = metrics.target_means({k: float(x) for k, x in sums.items()})
  real = weights_BM > 0
  ar, other = real & (recalled_BM > 0), real & (recalled_BM == 0)
  expected = dict(
    loss=nll_BM[real].mean(),
    accuracy=correct_BM[real].mean(),
    ar_loss=nll_BM[ar].mean(),
    non_ar_loss=nll_BM[other].mean(),
    ar_share=ar.sum() / real.sum(),
  )
  listed = {x.name for x in metrics.METRICS if isinstance(x, TargetMetric)}
  assert expected.keys() <= found.keys() <= listed
  found = {name: found[name] for name in expected}
  chex.assert_trees_all_close(found, jax.tree.map(float, expected), rtol=1e-6)


def test_a_window_holds_means_and_rates(monkeypatch) -> None:
  now = 100.0
  clock = types.SimpleNamespace(perf_counter=lambda: now)
  monkeypatch.setattr(metrics_writer, "time", clock)
  window = metrics_writer.Window()
  assert window.flush() is None
  for start in (100.0, 200.0):
    window.add(dict(loss=2.0, accuracy=0.5), tokens=10, wait=0.5)
    now = start + 8
    window.pause(6)  # an evaluation, which took 6 of the 8 seconds
    window.add(dict(loss=5.0, accuracy=0.0), tokens=30, wait=1.5)
    now = start + 16
    assert window.flush() == dict(
      loss=3.5,
      accuracy=0.25,
      tokens_per_second=40 / 10,
      step_seconds=10 / 2,
      data_wait_fraction=2 / 10,
    )
    assert window.flush() is None
    now = 200.0
    window.pause(84)  # an evaluation before the first step of a window


def test_a_mean_over_no_target_is_left_out() -> None:
  weights_BM, targets = _targets()
  none = targets._replace(recalled_BM=np.zeros_like(weights_BM))
  sums = metrics.target_sums(jnp.float32(1), jnp.asarray(weights_BM), none)
  found = metrics.target_means({k: float(x) for k, x in sums.items()})
  assert "ar_loss" not in found and found["ar_share"] == 0
  assert "non_ar_loss" in found
  traced = jax.jit(metrics.target_means)(sums)
  assert float(traced["ar_loss"]) == 0  # a traced number cannot be left out


def test_recall_is_left_out_where_it_is_not_known() -> None:
  weights_BM, targets = _targets()
  unknown = targets._replace(recalled_BM=None)
  sums = metrics.target_sums(jnp.float32(1), jnp.asarray(weights_BM), unknown)
  known = [
    x
    for x in metrics.METRICS
    if isinstance(x, TargetMetric) and not x.needs_recall
  ]
  counted = {f"{x.name}:tokens" for x in known if x.among is not None}
  assert sums.keys() == {"tokens"} | {x.name for x in known} | counted
  assert {"loss", "accuracy"} <= sums.keys()
  assert not {"ar_loss", "non_ar_loss", "ar_share"} & sums.keys()


def test_perplexities_are_for_text_alone() -> None:
  found = metrics.with_derived(dict(loss=2.0, ar_loss=800.0), text=True)
  assert found["perplexity"] == math.exp(2)
  assert found["ar_perplexity"] == math.inf
  assert "non_ar_perplexity" not in found
  found = metrics.with_derived(dict(loss=2.0), text=False)
  others = {
    x.name
    for x in metrics.METRICS
    if isinstance(x, DerivedMetric) and x.source == "loss" and not x.text_only
  }
  assert found.keys() == {"loss"} | others and found["loss"] == 2.0
  assert "perplexity" not in found


_WRONG_LISTS = {
  "a name twice": (
    UpdateMetric("loss", lambda update: jnp.zeros(())),
    "the name 'loss' twice",
  ),
  "the number of targets": (
    TargetMetric("tokens", lambda targets: targets.nll_BM),
    "none called 'tokens'",
  ),
  "an unknown source": (
    DerivedMetric("bits", "los", lambda x: x / math.log(2)),
    r"'bits' has the source 'los': expected one of \('loss', 'accuracy'",
  ),
  "a derived source": (
    DerivedMetric("bits", "perplexity", math.log2),
    "'bits' has the source 'perplexity': expected one of",
  ),
}


@pytest.mark.parametrize("name", _WRONG_LISTS)
def test_a_wrong_list_is_refused(name: str) -> None:
  metric, message = _WRONG_LISTS[name]
  metrics.check_metrics((*metrics.METRICS, *_MORE[:3]))
  with pytest.raises(ValueError, match=message):
    metrics.check_metrics((*metrics.METRICS, metric))


def _sums(metric: TargetMetric, monkeypatch) -> None:
  monkeypatch.setattr(metrics, "METRICS", (metric,))
  weights_BM, targets = _targets()
  metrics.target_sums(jnp.float32(1), jnp.asarray(weights_BM), targets)


def test_a_wrong_shape_is_refused(monkeypatch) -> None:
  """The message names the metric."""
  scalar = TargetMetric("mean", lambda targets: targets.nll_BM.mean())
  with pytest.raises(ValueError, match=r"'mean': value .* \(\): .*\(3, 4\)"):
    _sums(scalar, monkeypatch)
  rows = TargetMetric(
    "first", lambda t: t.nll_BM, among=lambda t: t.correct_BM[:, :1]
  )
  with pytest.raises(ValueError, match=r"'first': among .* \(3, 1\): "):
    _sums(rows, monkeypatch)
  vector = UpdateMetric("norms", lambda update: update.grads["x"])
  monkeypatch.setattr(metrics, "METRICS", (vector,))
  tree = {"x": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"'norms': value .* \(2,\): "):
    jax.eval_shape(metrics.update_metrics, metrics.Update(tree, tree, tree))


def test_names_are_unique() -> None:
  names = [metric.name for metric in metrics.METRICS]
  assert len(set(names)) == len(names)
  assert {x in names for x in metrics.HEADLINES} == {True}


def test_pictures_of_text_show_the_perplexity() -> None:
  names = [(x.name, x.label, x.log) for x in metrics.panels(text=True)]
  assert names == [
    ("perplexity", "perplexity", True),
    ("accuracy", "accuracy", False),
  ]
  assert [x.name for x in metrics.panels(text=False)] == ["loss", "accuracy"]


@pytest.mark.parametrize(
  "goal, accuracy, expected",
  [
    (0.9, 0.93, "goal reached: held-out accuracy 0.9300, goal above 0.9"),
    (0.99, 0.93, "goal not reached: held-out accuracy 0.9300, goal above 0.99"),
    (None, 0.93, None),
    (0.99, None, None),  # stopped before the first evaluation
  ],
)
def test_a_run_says_whether_it_reached_its_goal(
  goal: float | None, accuracy: float | None, expected: str | None
) -> None:
  held_out = {} if accuracy is None else {"accuracy": accuracy}
  outcome = Outcome(6, "finished", 0, held_out, 1.0, None)
  assert report._promise(tiny(stop_accuracy=goal), outcome) == expected


def test_titles_name_the_preset_or_the_mixers() -> None:
  of_preset = make_presets()["mqar-mamba"]
  assert describe_model(of_preset) == "the model of mqar-mamba"
  assert describe_model(tiny()) == "BaseConv + ReBased, 2 layers of width 16"
