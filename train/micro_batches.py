"""Gradient accumulation: one batch computed in several parts."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import Array
import jax.numpy as jnp

_Sums = TypeVar("_Sums")


def sum_over_micro_batches(
  function: Callable[[dict[str, Array], Array], _Sums],
  batch: dict[str, Array],
  key: Array,
  count: int,
) -> _Sums:
  """Return Σ function(micro-batch, key), a tree of arrays.

  The micro-batches are computed one after the other, so that the activations of
  one exist at a time.

  Args:
    function: takes a micro-batch and a PRNG key.
    batch: arrays (B, …).
    key: is split into one key for each micro-batch.
    count: number of micro-batches, which divides B. 1: `function` takes the
      batch and the key as they are.
  """
  if count == 1:
    return function(batch, key)
  # Row b is in micro-batch b mod count. A device holds neighbouring rows, so
  # that each micro-batch has some rows of every device.
  parts = jax.tree.map(
    lambda x_B: jnp.moveaxis(x_B.reshape(-1, count, *x_B.shape[1:]), 1, 0),
    batch,
  )
  inputs = parts, jax.random.split(key, count)
  shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], inputs))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(*part)), None

  return jax.lax.scan(add, zero, inputs)[0]
