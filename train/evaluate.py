"""Held-out results, in one fixed shape of batch and one compilation."""

import collections
from typing import Any

import jax

from train.build import Built
from train.data import batches as batches_lib
from train.devices import sharding


def evaluate(
  built: Built,
  params: Any,
  data: batches_lib.Batches,
  *,
  timeout: float | None = None,
) -> dict[str, float]:
  """{loss, accuracy, tokens}: means over the targets of all batches.

  Padding rows have weight 0 and count for nothing. Of text with `data.recall`
  {ar_loss, non_ar_loss, ar_share} too: means over the targets that their row
  holds already, over the others, and the part of the former.

  Args:
    built: the run on its devices.
    params: on them too.
    data: the batches.
    timeout: seconds for a batch; None: any time.
  """
  rows = sharding.local_rows(data.rows, built.mesh)
  sums = []
  with batches_lib.iterate(
    data, start=0, stop=data.num_batches, rows=rows, timeout=timeout
  ) as iterator:
    for batch in iterator:
      sums.append(
        built.eval_step(
          params, sharding.put_batch(batch, built.mesh, data.rows)
        )
      )
  total: dict[str, float] = collections.defaultdict(float)
  for batch_sums in sums:
    for name, value in jax.device_get(batch_sums).items():
      total[name] += float(value)
  tokens = total["tokens"]
  means = dict(
    loss=total["loss"] / tokens,
    accuracy=total["correct"] / tokens,
    tokens=tokens,
  )
  return means | (_split(total) if "ar_tokens" in total else {})


def _split(total: dict[str, float]) -> dict[str, float]:
  """The parts of the AR targets and of the others; no mean of none."""
  counts = dict(ar=total["ar_tokens"], non_ar=total["tokens"])
  counts["non_ar"] -= counts["ar"]
  losses = dict(ar=total["ar_loss"], non_ar=total["loss"] - total["ar_loss"])
  means = {f"{x}_loss": losses[x] / n for x, n in counts.items() if n}
  return means | dict(ar_share=counts["ar"] / total["tokens"])
