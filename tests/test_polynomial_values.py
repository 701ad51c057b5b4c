"""Polynomial attention against the float64 oracle: values and gradients."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_cases import errors, make_inputs, value_and_gradients
import polynomial_oracle as po
import pytest

import pallas_kernels as pk

COEFFICIENTS = {"rebased": pk.REBASED, "based": pk.BASED}
FACTORS = {
  "T": (1, 2, 17, 63, 64, 65, 200),
  "F": (4, 5, 16, 24),
  "P": (1, 5, 64),
  "coefficients": ("rebased", "based"),
  "keys": ("random", "clustered"),
  "state": (False, True),
  "borders": ("none", "random", "chunk", "own"),
  "dtype": ("float32", "bfloat16", "float16"),
  "final": (False, True),
}


class Cell(NamedTuple):
  T: int
  F: int
  P: int
  coefficients: str
  keys: str
  state: bool
  borders: str
  dtype: str
  final: bool

  def __str__(self):
    return "-".join(map(str, self))


def covering_cells() -> list[Cell]:
  """Cells in which any two levels of any two factors meet at least once."""
  levels = list(FACTORS.values())
  pair = lambda cell: set(itertools.combinations(enumerate(cell), 2))
  # All pairs of levels of two different factors.
  open_pairs = {
    ((i, a), (j, b))
    for i, j in itertools.combinations(range(len(levels)), 2)
    for a in levels[i]
    for b in levels[j]
  }
  rng, cells = np.random.default_rng(0), []
  while open_pairs:
    # Start from an open pair and fill the rest at random; take the best.
    seed = dict(min(open_pairs, key=str))
    tries = (
      tuple(seed.get(i, x[rng.integers(len(x))]) for i, x in enumerate(levels))
      for _ in range(100)
    )
    best = max(tries, key=lambda cell: len(pair(cell) & open_pairs))
    open_pairs -= pair(best)
    cells.append(Cell(*best))
  return cells


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def answer(x, coefficients, final: bool, implementation: str):
  def attention(q, k, v, ids, state):
    out = pk.polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      segment_ids=ids,
      initial_state=None if state is None else pk.State(*state),
      return_state=final,
      implementation=implementation,
    )
    return out if final else (out, None)

  return value_and_gradients(attention, x)


def tolerance(name: str, dtype: str, keys: str) -> float:
  if dtype == "float32":
    # Sums of float32 products. dq, dk and the states' cotangents go through
    # differences as well: of sim' terms of either sign, and of 1/(Σ sim + eps)
    # where the denominator nearly vanishes.
    return 1e-5 if name in ("o", "dv", "kv", "kk") else 5e-5
  if dtype == "float16":
    # Computed in float32; what is left is the rounding of the outputs, at most
    # 2⁻¹¹ = 4.9e-4 of each element. States are float32 and are not rounded.
    return 5e-4
  # bfloat16 rounds at 2⁻⁸ = 3.9e-3; sim, the features and da are rounded before
  # they meet v, the states and k. Rows of clustered keys are alike, so these
  # roundings are too, and do not average out.
  return 1e-2 if keys == "random" else 2e-2


def check(cell: Cell, implementation: str = "xla") -> dict:
  named = cell._asdict()
  shape = [named.pop(name) for name in ("T", "F", "P")]
  coefficients = named["coefficients"]
  named["coefficients"] = getattr(po, coefficients.upper())
  x = make_inputs(2, shape[0], 2, *shape[1:], **named)
  got = answer(x, COEFFICIENTS[coefficients], cell.final, implementation)
  found = errors(got, po.oracle(x, named["coefficients"]))
  for name, error in found.items():
    assert error <= tolerance(name, cell.dtype, cell.keys), (name, found, cell)
  return found
