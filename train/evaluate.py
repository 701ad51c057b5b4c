"""Held-out metrics: one pass over finitely many batches of one fixed shape."""

import collections
from typing import Any

import jax

from train import metrics
from train.compiled_steps import Built
from train.data import prefetch
from train.data.batches import Batches
from train.devices import batch_sharding


def evaluate(
  built: Built, params: Any, data: Batches, *, timeout: float | None = None
) -> dict[str, float]:
  """Return the means over the targets of all batches.

  Padding rows have weight 0 and count for nothing.

  Args:
    built: the run on its devices.
    params: the parameters, on the devices.
    data: the batches.
    timeout: seconds to wait for a batch. None waits for any time.

  Returns:
    Every TargetMetric, and `tokens`, the number of targets. Metrics about
    recall are there for text with `data.recall` only.

  Raises:
    ValueError: the batches have no end.
  """
  rows = batch_sharding.local_rows(data.rows, built.mesh)
  stop = data.num_batches
  if stop is None:
    raise ValueError(
      f"{type(data).__name__}.num_batches is None: expected a number: the "
      "batches of an evaluation must end"
    )
  sums = []
  with prefetch.iterate(
    data, start=0, stop=stop, rows=rows, timeout=timeout
  ) as iterator:
    for batch in iterator:
      placed = batch_sharding.put_batch(batch, built.mesh, data.rows)
      sums.append(built.eval_step(params, placed))
  # Read after all steps are dispatched; added as Python's 64-bit floats.
  total: dict[str, float] = collections.defaultdict(float)
  for batch_sums in sums:
    for name, value in jax.device_get(batch_sums).items():
      total[name] += float(value)
  return metrics.target_means(total) | {"tokens": total["tokens"]}
