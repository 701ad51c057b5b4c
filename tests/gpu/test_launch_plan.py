"""The plan of the launches of a call."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BASED, REBASED, devices
from pallas_kernels.polynomial.operator import Kernel

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

from pallas_kernels.polynomial.gpu import launch, pipeline


def _plan(B, T, H, F, P, coefficients=REBASED, dtype=jnp.bfloat16):
  q = jax.ShapeDtypeStruct((B, T, H, F), dtype)
  v = jax.ShapeDtypeStruct((B, T, H, P), dtype)
  return launch.make_plan(q, v, None, Kernel(coefficients, 1e-6))


@pytest.mark.parametrize(
  "B, T, H, P, slices",
  [
    (2, 16384, 12, 64, 11),
    (2, 16384, 12, 128, 5),
    (64, 1024, 12, 64, 1),  # enough walks without slices
    (1, 1088, 1, 64, 2),  # slices of at least 8 chunks
    (1, 63, 1, 5, 1),
  ],
)
def test_time_is_cut_into_slices_for_enough_walks(B, T, H, P, slices):
  (walks,) = _plan(B, T, H, 16, P).launches
  assert walks.slices == slices
  assert walks.slices * walks.chunks >= walks.total_chunks
  if slices > 1:
    assert walks.half_slices.slices in (2 * slices - 1, 2 * slices)


@pytest.mark.parametrize("F, terms", [(5, [1]), (16, [1]), (17, [2, 2])])
def test_more_than_16_features_are_squares_and_halves_of_pairs(F, terms):
  plan = _plan(2, 100, 3, F, 64, BASED)
  assert [x.terms for x in plan.launches] == terms
  assert [x.pairs for x in plan.launches] == [False, True][: len(terms)]
  assert plan.fused == (F <= 16)
  c0 = plan.whole.c0
  assert sum(x.c0 * x.terms for x in plan.launches) == pytest.approx(c0)
  assert sum(x.c1 for x in plan.launches) == plan.whole.c1


def test_64_features_have_4_squares_and_12_halves_of_pairs():
  plan = _plan(2, 100, 3, 64, 128)
  assert [x.terms for x in plan.launches] == [4, 12]
  assert [x.walks for x in plan.launches] == [3 * 2 * 4, 3 * 2 * 12]


def test_scales_keep_float16_in_range():
  bfloat16, float16 = (
    _plan(2, 1000, 3, 16, 64, REBASED.scaled(0.2), dtype).whole
    for dtype in (jnp.bfloat16, jnp.float16)
  )
  assert (bfloat16.c2, bfloat16.state_scale, bfloat16.gradient_scale) == (
    1.0,
    1.0,
    1.0,
  )
  # 0.04 to a power of two; 1000 tokens to 2¹⁰.
  assert (float16.c2, float16.state_scale, float16.gradient_scale) == (
    2.0**-5,
    2.0**-10,
    2.0**5,
  )


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_a_number_names_each_half_of_each_pair_once(parts):
  """Kernels count the pair, because they cannot look it up."""
  whole = _plan(2, 100, 3, 16 * parts, 64).launches[1]
  assert whole.pairs and whole.parts == parts
  found = [pipeline._term(whole, jnp.int32(x)) for x in range(whole.terms)]
  expected = [
    (*pair, half) for pair in launch.pairs_of(parts) for half in (0, 1)
  ]
  assert [tuple(map(int, x)) for x in found] == expected
