"""Held-out metrics: one pass over finitely many batches of one fixed shape."""

import collections
from collections.abc import Callable, Iterator
import itertools
from typing import Any

import jax

from train import metrics
from train.compiled_steps import Built
from train.data import prefetch
from train.data.batches import Batch, Batches
from train.devices import batch_sharding

#: Batches that are dispatched before the sums of an earlier one are read.
AHEAD = 2


class Interrupted(Exception):
  """The evaluation was ended before its last batch."""


def evaluate(
  built: Built,
  params: Any,
  data: Batches,
  *,
  timeout: float | None = None,
  interrupted: Callable[[], bool] | None = None,
  hurried: Callable[[], bool] | None = None,
  with_stand_ins: Callable[[Iterator[Batch]], Iterator[Batch]] | None = None,
) -> dict[str, float]:
  """Return the means over the targets of all batches.

  Padding rows have weight 0 and count for nothing.

  Args:
    built: the run on its devices.
    params: the parameters, on the devices.
    data: the batches.
    timeout: seconds to wait for a batch. None waits for any time.
    interrupted: called before each batch; True ends the evaluation. None: it
      always runs to its end.
    hurried: whether to wait for data no longer; see `prefetch.iterate`.
    with_stand_ins: replaces batches that cannot be read; see
      `train.failing_together`. None: their error is raised.

  Returns:
    Every TargetMetric, and `tokens`, the number of targets. Metrics about
    recall are there for text with `data.recall` only.

  Raises:
    Interrupted: `interrupted` returned True.
    ValueError: the batches have no end, or no target.
  """
  rows = batch_sharding.local_rows(data.rows, built.mesh)
  stop = data.num_batches
  if stop is None:
    raise ValueError(
      f"{type(data).__name__}.num_batches is None: expected a number: the "
      "batches of an evaluation must end"
    )
  # Added as Python's 64-bit floats.
  total: dict[str, float] = collections.defaultdict(float)
  running = collections.deque[dict[str, jax.Array]]()

  def read_down_to(count: int) -> None:
    while len(running) > count:
      for name, value in jax.device_get(running.popleft()).items():
        total[name] += float(value)

  with prefetch.iterate(
    data, start=0, stop=stop, rows=rows, timeout=timeout, hurried=hurried
  ) as iterator:
    batches = iterator if with_stand_ins is None else with_stand_ins(iterator)
    for batch in itertools.islice(batches, stop):
      if interrupted is not None and interrupted():
        raise Interrupted
      placed = batch_sharding.put_batch(batch, built.mesh, data.rows)
      running.append(built.eval_step(params, placed))
      read_down_to(AHEAD)
  read_down_to(0)
  if not total["tokens"]:
    raise ValueError(
      f"{type(data).__name__}: every weight of its {stop} batches is 0: "
      "expected held-out rows with a target"
    )
  return metrics.target_means(total) | {"tokens": total["tokens"]}
