"""Polynomial attention against the float64 oracle: values and gradients."""

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_cases import (
  COEFFICIENTS,
  Cell,
  attention,
  errors,
  lone_error,
  make_inputs,
  value_and_gradients,
)
import polynomial_oracle as po
import pytest

import pallas_kernels as pk
from pallas_kernels.polynomial import spec, state as state_lib

FACTORS = {
  "T": (1, 2, 17, 63, 64, 65, 200),
  "F": (4, 5, 16, 24),
  "P": (1, 5, 64),
  "coefficients": ("rebased", "based"),
  "keys": ("random", "clustered"),
  "state": (False, True),
  "boundaries": ("none", "random", "chunk", "own"),
  "dtype": ("float32", "bfloat16", "float16"),
  "final": (False, True),
}
STATES = ("kv", "kk", "dkv", "dkk")


def covering_cells() -> list[Cell]:
  """Make cells in which any two levels of any two factors meet."""
  levels = list(FACTORS.values())

  def pairs(cell):
    return set(itertools.combinations(enumerate(cell), 2))

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
    best = max(tries, key=lambda cell: len(pairs(cell) & open_pairs))
    open_pairs -= pairs(best)
    cells.append(Cell(*best))
  return cells


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def answer(x, coefficients, final: bool, implementation: str):
  call = attention(
    coefficients, implementation=implementation, return_state=final
  )
  return value_and_gradients(call, x)


def tolerance(name: str, dtype: str, keys: str) -> float:
  if dtype == "float64":
    # As the oracle: both round at 1e-16, over sums of 200 terms.
    return 1e-12
  if dtype == "float32" or (dtype == "float16" and name in STATES):
    # Sums of float32 products. dq, dk and the states' cotangents go through
    # differences as well: of sim' terms of either sign, and of 1/(Σ sim + eps)
    # where the denominator nearly vanishes. States are float32 for float16.
    return 1e-5 if name in ("o", "dv", "kv", "kk") else 5e-5
  if dtype == "float16":
    # Computed in float32. Then these outputs are rounded, by at most
    # 2⁻¹¹ = 4.9e-4 of each element.
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
  least = lone_error(x) if cell.boundaries == "own" or cell.T == 1 else 0
  for name, error in found.items():
    allowed = max(tolerance(name, cell.dtype, cell.keys), least)
    assert error <= allowed, (name, found, cell)
  return found


CELLS = covering_cells()


def test_cells_cover_all_pairs():
  met = [set(itertools.combinations(enumerate(cell), 2)) for cell in CELLS]
  levels = [[(i, x) for x in xs] for i, xs in enumerate(FACTORS.values())]
  for a, b in itertools.combinations(levels, 2):
    assert set(itertools.product(a, b)) <= set.union(*met)
  assert len(CELLS) <= 60


@pytest.mark.quick
def test_worked_example_of_the_equations():
  """The example in the docstring of spec.py."""
  found = doctest.testmod(spec)
  assert found.attempted >= 6 and found.failed == 0


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_oracle(cell):
  check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
@pytest.mark.parametrize("P", FACTORS["P"])
@pytest.mark.parametrize("F", FACTORS["F"])
@pytest.mark.parametrize("T", FACTORS["T"])
def test_equals_oracle_on_the_grid(T, F, P, dtype):
  """All levels of all factors, but every second cell returns the state."""
  others = ("coefficients", "keys", "state", "boundaries")
  grid = itertools.product(*(FACTORS[name] for name in others))
  for i, (coefficients, keys, state, boundaries) in enumerate(grid):
    final = (i + i // 4) % 2 == 1
    check(Cell(T, F, P, coefficients, keys, state, boundaries, dtype, final))
  jax.clear_caches()  # thousands of cells would fill the memory


@pytest.mark.quick
@pytest.mark.parametrize(
  "cell",
  [
    Cell(17, 5, 5, "based", "random", True, "random", "float32", True),
    Cell(65, 16, 64, "rebased", "clustered", True, "none", "float32", True),
    Cell(63, 4, 1, "based", "clustered", False, "own", "float16", False),
  ],
  ids=str,
)
def test_reference_equals_oracle(cell):
  check(cell, "reference")


@pytest.mark.quick
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_equals_oracle_in_float64(implementation):
  """At 1e-12 an error that a tolerance of rounding would hide shows."""
  with jax.enable_x64(True):
    cell = Cell(131, 6, 3, "based", "random", True, "random", "float64", True)
    check(cell, implementation)


@pytest.mark.parametrize("coefficients", ["rebased", "based"])
def test_scale_and_eps_are_used(coefficients):
  """The eps is as large as the denominator."""
  x = make_inputs(
    1, 70, 1, 4, 3, coefficients=getattr(po, coefficients.upper())
  )
  o = pk.polynomial_attention(
    *x[:3], coefficients=COEFFICIENTS[coefficients], scale=0.3, eps=2.0
  )
  numbers = getattr(po, coefficients.upper())
  want = po.oracle(x, numbers, scale=0.3, eps=2.0).o
  np.testing.assert_allclose(o, want, rtol=0, atol=1e-5)  # o is of order 1


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_eps_is_absolute(implementation):
  """Smaller queries and keys need an eps that shrinks as their similarities."""
  q, k, v = make_inputs(1, 70, 1, 4, 3)[:3]

  def run(factor, eps):
    return pk.polynomial_attention(
      factor * q, factor * k, v, eps=eps, implementation=implementation
    )

  whole, c = run(np.float32(1), 1e-6), np.float32(2**-5)
  # A power of two: every sum is exactly c⁴ times as large.
  np.testing.assert_array_equal(run(c, float(c) ** 4 * 1e-6), whole)
  assert not np.allclose(run(c, 1e-6), whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
  ("implementation", "size"),
  [("xla", 1e-15), ("xla", 1e15), ("reference", 1e-6), ("reference", 1e8)],
)
def test_the_range_of_products(size, implementation):
  """Values and gradients, where |q| |k| is the least and the most allowed."""
  x = make_inputs(1, 70, 1, 4, 3)
  q, k = (np.float32(y * size**0.5 / 4) for y in x[:2])
  x = x._replace(q_BTHF=q, k_BTHF=k)

  @jax.jit
  def answer(q, k, v):
    call = functools.partial(
      pk.polynomial_attention, eps=0.0, implementation=implementation
    )
    o, pull = jax.vjp(call, q, k, v)
    return o, pull(x.do_BTHP)

  o, grads = answer(*x[:3])
  want = po.oracle(x, po.REBASED, eps=0.0)
  for name, found in zip(("o", "dq", "dk", "dv"), (o, *grads), strict=True):
    error = np.linalg.norm(np.float64(found) - getattr(want, name))
    norm = max(np.linalg.norm(getattr(want, name)), want.raw.get(name, 0))
    assert error <= 5e-5 * norm, name  # as in `tolerance`


def test_the_number_of_features_is_known_without_making_them():
  """As `rebased inspect` does with the config of any model."""
  F = 2**31
  E, G = state_lib.state_widths(F, COEFFICIENTS["based"])
  assert (E, G) == (F * (F // 2 + 1) + F + 1, F + 1)


@pytest.mark.parametrize("F", range(1, 10))
@pytest.mark.parametrize("name", ["rebased", "based"])
def test_features_and_weights_give_the_similarity(F, name):
  coefficients = COEFFICIENTS[name].scaled(0.7)
  q_TF, k_TF = np.random.default_rng(F).normal(size=(2, 20, F)).astype("f4")
  phi_q, phi_k = (
    state_lib.features(jnp.asarray(x), coefficients) for x in (q_TF, k_TF)
  )
  w_E = state_lib.feature_weights(F, coefficients)
  E, G = state_lib.state_widths(F, coefficients)
  assert phi_q.shape == (20, E)
  assert w_E.size == E
  assert state_lib.extend(jnp.asarray(q_TF), coefficients).shape == (20, G)
  c0, c1, c2 = getattr(po, name.upper())
  s_T = 0.7 * np.sum(q_TF * k_TF, axis=-1, dtype=np.float64)
  sim_T = c0 + c1 * s_T + c2 * s_T**2
  got_T = np.sum(np.asarray(phi_q) * w_E * np.asarray(phi_k), axis=-1)
  # Products of float32 features, which cancel where s is small.
  np.testing.assert_allclose(got_T, sim_T, rtol=1e-5, atol=2e-5)
  W_GG = state_lib.denominator_weights(F, coefficients)
  q1, k1 = (
    np.asarray(state_lib.extend(jnp.asarray(x), coefficients))
    for x in (q_TF, k_TF)
  )
  z_T = np.einsum("tg,tj,gj,tg,tj->t", q1, q1, W_GG, k1, k1)
  np.testing.assert_allclose(z_T, sim_T, rtol=1e-5, atol=2e-5)
