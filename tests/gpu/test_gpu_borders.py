"""The sums at the borders of slices, interpreted, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BASED, REBASED, devices
from pallas_kernels.polynomial.operator import Kernel

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.polynomial.gpu import launch, slice_states
from pallas_kernels.polynomial.gpu.tiles import F, V


def _expected(x_N, outer, whole_NB, S, left):
  """In float64; a missing last half is 0."""
  y = np.zeros((S + 1, *x_N.shape[1:]))
  total = np.zeros(x_N.shape[1:]) if outer is None else np.float64(outer)
  y[S if left else 0] = total
  for s in range(S)[:: -1 if left else 1]:
    for n in (2 * s, 2 * s + 1)[:: -1 if left else 1]:
      if n < x_N.shape[0]:
        keep = np.ones(x_N.shape[1]) if whole_NB is None else whole_NB[n]
        total = x_N[n] + np.where(keep[:, None, None, None], total, 0)
    y[s if left else s + 1] = total
  return y


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
  "T, halves, documents", [(2600, 9, True), (2500, 10, False)]
)
def test_sums_at_borders(T, halves, documents, left):
  B, H, S = 2, 1, 5
  coefficients = BASED if documents else REBASED
  call = launch.make_call(
    B,
    T,
    H,
    V,
    Kernel(coefficients, 1e-6),
    jnp.bfloat16,
    S * B * H,
    segments=documents,
  )
  assert (call.slices, call.halves.slices) == (S, halves)
  rng = np.random.default_rng(halves)
  draw = lambda *lead: tuple(
    rng.normal(size=(*lead, B, H, V, n)).astype(np.float32) for n in (call.E, F)
  )
  own, outer, whole_NB = draw(halves), None, None
  if documents:
    outer, whole_NB = draw(), rng.random((halves, B)) < 0.6
    # What a border keeps out is kept out whatever it is.
    own[0][-1 if left else 1, 0] = np.nan
    whole_NB[-2 if left else 2, 0] = False
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    found = slice_states.sums(
      jax.tree.map(jnp.asarray, own),
      jax.tree.map(jnp.asarray, outer),
      None if whole_NB is None else jnp.asarray(whole_NB),
      call,
      left=left,
    )
    found = [np.asarray(x) for x in found]
  for i, y in enumerate(found):
    wanted = _expected(
      own[i], None if outer is None else outer[i], whole_NB, S, left
    )
    np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
    assert np.isnan(y).any() == (documents and i == 0)
    # Sums of up to 11 numbers near 1 in float32.
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
