"""The Hopper kernels, interpreted on a CPU.

Interpret mode needs the operands of products in shared memory (`by_shared`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BASED, REBASED, devices, documents as documents_lib
from pallas_kernels.polynomial import xla
from pallas_kernels.polynomial.operator import Kernel

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.polynomial.gpu import launch, passes as gpu

# Limits of ‖a − ref‖ / ‖ref‖: each operand rounds to 2⁻⁹ or 2⁻¹².
# A float32 operand is two bfloat16 numbers, which round to 2⁻¹⁸.
_TOLERANCE = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 2e-5}


def _inputs(T, P, dtype, F=16):
  keys = jax.random.split(jax.random.key(0), 4)
  sizes = (F, F, P, P)
  return [
    jax.random.normal(key, (1, T, 1, size), dtype)
    for key, size in zip(keys, sizes, strict=True)
  ]


def _all(passes, kernel, arrays, runs_BT, state, dstate):
  """Return o, the final state and every gradient."""
  q, k, v, do = arrays
  o, after, kept = passes.forward(
    q, k, v, runs_BT, state, kernel, return_state=True
  )
  dq, r, dz = passes.backward_queries(q, k, v, do, runs_BT, kept, kernel)
  dk, dv, before = passes.backward_keys(
    q, k, v, do, r, dz, runs_BT, dstate, kernel, return_state=True
  )
  return dict(o=o, after=after, dq=dq, dk=dk, dv=dv, before=before)


@pytest.mark.parametrize(
  "T, P, coefficients, dtype, boundaries",
  [
    (70, 16, REBASED, "bfloat16", (0, 0)),
    (70, 80, BASED, "float16", (20, 66)),
    pytest.param(70, 16, REBASED, "float32", (0, 0), marks=pytest.mark.slow),
    pytest.param(130, 80, BASED, "float32", (20, 66), marks=pytest.mark.slow),
    pytest.param(130, 64, BASED, "bfloat16", (64, 100), marks=pytest.mark.slow),
    pytest.param(
      530, 48, REBASED, "bfloat16", (70, 520), marks=pytest.mark.slow
    ),
  ],
)
def test_values_and_gradients_equal_xla(T, P, coefficients, dtype, boundaries):
  assert_equals_xla(T, P, coefficients, dtype, boundaries)


@pytest.mark.parametrize(
  "dtype",
  ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)],
)
def test_values_and_gradients_of_two_slices_equal_xla(monkeypatch, dtype):
  """The state passes the slice boundary: forward, backward and at the ends."""
  monkeypatch.setattr(launch, "SLICE_CHUNKS", 1)
  monkeypatch.setattr(launch, "WALKS", 4 if dtype == "float32" else 2)
  x, v, *_ = _inputs(130, 16, dtype)
  plan = launch.make_plan(x, v, None, Kernel(REBASED, 1e-6))
  assert plan.launches[0].slices == 2
  assert_equals_xla(130, 16, REBASED, dtype, (0, 0))


def assert_equals_xla(T, P, coefficients, dtype, boundaries):
  kernel = Kernel(coefficients.scaled(0.25), 1e-6, by_shared=True)
  arrays = _inputs(T, P, dtype)
  runs_BT = None
  if any(boundaries):
    steps = jnp.zeros((1, T), jnp.int32).at[0, jnp.array(boundaries)].set(1)
    runs_BT = documents_lib.document_runs(jnp.cumsum(steps, axis=1))
  wide = [x.astype(jnp.float32) for x in arrays]
  reference = functools.partial(_all, xla.CHUNKS, kernel)
  _, state, _ = xla.CHUNKS.forward(
    *(x[:, ::-1] for x in wide[:3]), None, None, kernel, return_state=True
  )
  dstate = jax.tree.map(jnp.cos, state)
  expected = reference(wide, runs_BT, state, dstate)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    found = _all(gpu, kernel, arrays, runs_BT, state, dstate)
    found = jax.tree.map(np.asarray, found)
  for name in expected:
    pairs = zip(
      jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True
    )
    for a, b in pairs:
      error = np.linalg.norm(np.float64(a) - np.float64(b))
      assert error <= _TOLERANCE[dtype] * np.linalg.norm(b), name


@pytest.mark.parametrize(
  "F, boundaries",
  [
    (16, ()),
    pytest.param(16, (300, 700, 1090), marks=pytest.mark.slow),
    pytest.param(24, (300, 700, 1090), marks=pytest.mark.slow),
  ],
)
def test_states_of_slices_equal_xla(F, boundaries):
  """18 chunks in two slices, each summed as two halves."""
  T = 1100
  kernel = Kernel(BASED.scaled(0.25), 1e-6, by_shared=True)
  q, k, v, do = _inputs(T, 16, "bfloat16", F)
  runs_BT = None
  if boundaries:
    steps = jnp.zeros((1, T), jnp.int32).at[0, jnp.array(boundaries)].set(1)
    runs_BT = documents_lib.document_runs(jnp.cumsum(steps, axis=1))
  across = jax.random.normal(jax.random.key(1), (1, T, 1, 2))
  r_BTH, dz_BTH = 0.01 * (across**2)[..., 0], 0.01 * across[..., 1]
  wide = [x.astype(jnp.float32) for x in (q, k, v, do)]
  expected = (
    xla.CHUNKS.key_state(*wide[1:3], runs_BT, kernel),
    xla.CHUNKS.query_cotangent(
      wide[0], wide[3], r_BTH, dz_BTH, runs_BT, kernel
    ),
  )
  # The kernels divide sim by c2, and hold r and dz as (B, H, whole chunks).
  rows = lambda x: (
    kernel.coefficients.c2
    * jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -T % 64)))
  )
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    found = (
      gpu.key_state(k, v, runs_BT, kernel),
      gpu.query_cotangent(q, do, rows(r_BTH), rows(dz_BTH), runs_BT, kernel),
    )
    found = jax.tree.map(np.asarray, found)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    error = np.linalg.norm(np.float64(a) - np.float64(b))
    assert error <= _TOLERANCE["bfloat16"] * np.linalg.norm(b)
