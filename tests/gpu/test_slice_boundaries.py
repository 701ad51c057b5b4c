"""The states at slice boundaries, interpreted, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BASED, REBASED, devices
from pallas_kernels.polynomial.operator import Kernel

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.polynomial.gpu import launch, time_slices
from pallas_kernels.polynomial.gpu.launch import PART, TILE


def _expected(sums_N, outer, unbroken_NB, S, from_end):
  """Add up half slices in float64; a missing last half is 0."""
  y = np.zeros((S + 1, *sums_N.shape[1:]))
  total = np.zeros(sums_N.shape[1:]) if outer is None else np.float64(outer)
  y[S if from_end else 0] = total
  step = -1 if from_end else 1
  for s in range(S)[::step]:
    for n in (2 * s, 2 * s + 1)[::step]:
      if n < sums_N.shape[0]:
        keep = np.ones(sums_N.shape[1])
        if unbroken_NB is not None:
          keep = unbroken_NB[n]
        total = sums_N[n] + np.where(keep[:, None, None, None], total, 0)
    y[s if from_end else s + 1] = total
  return y


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize(
  "T, halves, documents", [(2600, 9, True), (2500, 10, False)]
)
def test_boundary_states_equal_a_loop(
  T, halves, documents, from_end, monkeypatch
):
  B, H, S = 2, 1, 5
  coefficients = BASED if documents else REBASED
  monkeypatch.setattr(launch, "WALKS", S * B * H)
  array = jax.ShapeDtypeStruct((B, T, H, PART), jnp.bfloat16)
  values = jax.ShapeDtypeStruct((B, T, H, TILE), jnp.bfloat16)
  runs_BT = jnp.zeros((B, T), jnp.int32) if documents else None
  plan = launch.make_plan(array, values, runs_BT, Kernel(coefficients, 1e-6))
  (walks,) = plan.launches
  assert (walks.slices, walks.half_slices.slices) == (S, halves)
  rng = np.random.default_rng(halves)

  def draw(*lead):
    return tuple(
      rng.normal(size=(*lead, B, H, TILE, n)).astype(np.float32)
      for n in (walks.E, PART)
    )

  own, outer, unbroken_NB = draw(halves), None, None
  if documents:
    outer, unbroken_NB = draw(), rng.random((halves, B)) < 0.6
    # A document boundary keeps the state out, whatever is in it.
    own[0][-1 if from_end else 1, 0] = np.nan
    unbroken_NB[-2 if from_end else 2, 0] = False
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    found = time_slices.boundary_states(
      jax.tree.map(jnp.asarray, own),
      jax.tree.map(jnp.asarray, outer),
      None if unbroken_NB is None else jnp.asarray(unbroken_NB),
      walks,
      from_end=from_end,
    )
    found = [np.asarray(x) for x in found]
  for i, y in enumerate(found):
    wanted = _expected(
      own[i], None if outer is None else outer[i], unbroken_NB, S, from_end
    )
    np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
    assert np.isnan(y).any() == (documents and i == 0)
    # Sums of up to 11 numbers near 1 in float32.
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
