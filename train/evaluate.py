"""Held-out results, in one fixed shape of batch and one compilation."""

from typing import Any

from train import sharding
from train.build import Built
from train.data import batches as batches_lib


def evaluate(
  built: Built, params: Any, data: batches_lib.Batches
) -> dict[str, float]:
  """{loss, accuracy, tokens}: means over the targets of all batches.

  Padding rows have weight 0 and count for nothing.
  """
  rows = sharding.local_rows(data.rows, built.mesh)
  total = dict(loss=0.0, correct=0.0, tokens=0.0)
  sums = []
  with batches_lib.iterate(
    data, start=0, stop=data.num_batches, rows=rows
  ) as iterator:
    for batch in iterator:
      sums.append(
        built.eval_step(
          params, sharding.put_batch(batch, built.mesh, data.rows)
        )
      )
  for batch_sums in sums:
    for name in total:
      total[name] += float(batch_sums[name])
  tokens = total["tokens"]
  return dict(
    loss=total["loss"] / tokens,
    accuracy=total["correct"] / tokens,
    tokens=tokens,
  )
