"""The Hopper kernels of Mamba's scan and of WKV on a GPU, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_cases import (
  SCAN,
  WKV,
  answer,
  assert_near,
  documents,
  exact,
  scan_inputs,
  wkv_inputs,
)

from pallas_kernels import devices, selective_scan, wkv

pytestmark = pytest.mark.gpu
if not devices.is_hopper():
  pytest.skip("no Hopper GPU", allow_module_level=True)

# The GPU's exponential is exact to 2e-7, and such errors may add up over the
# tokens. 16-bit results, and y's cotangent, round by 2⁻⁹ at most.
LIMITS = {"float32": 5e-5, "bfloat16": 4e-3}


@pytest.mark.parametrize(
  "rows, T, I, N, dtype, low, high, chance",
  [
    (2, 1, 64, 16, "float32", 1e-3, 1, 0),
    (3, 77, 128, 5, "float32", 1e-3, 1, 0),
    (2, 2100, 192, 16, "float32", 1e-3, 0.1, 0),  # cut into slices
    (2, 1111, 64, 16, "float32", 1e-4, 40, 0.01),
    (2, 1111, 64, 32, "bfloat16", 1e-3, 1, 0.01),
    # The published initial values: a Δ of 0.69, and rates of up to −16.
    (4, 600, 512, 16, "float32", 0.6, 0.8, 0),
  ],
)
def test_scans_equal_float64(rows, T, I, N, dtype, low, high, chance) -> None:
  inputs = scan_inputs(rows, T, I, N, dtype, low, high)
  ids = documents(rows, T, chance) if chance else None
  found = answer(SCAN, inputs, ids, "gpu")
  assert_near(found, exact(SCAN, inputs, ids), LIMITS[dtype])


@pytest.mark.parametrize(
  "rows, T, D, dtype, k_scale, chance",
  [
    (2, 1, 128, "float32", 1, 0),
    (3, 77, 256, "float32", 3, 0),
    (2, 2100, 128, "float32", 1, 0),  # cut into slices
    (2, 1111, 128, "float32", 3, 0.01),
    (4, 600, 1024, "bfloat16", 1, 0.01),
  ],
)
def test_wkvs_equal_float64(rows, T, D, dtype, k_scale, chance) -> None:
  inputs = wkv_inputs(rows, T, D, dtype, k_scale)
  ids = documents(rows, T, chance) if chance else None
  found = answer(WKV, inputs, ids, "gpu")
  assert_near(found, exact(WKV, inputs, ids), LIMITS[dtype])


@pytest.mark.parametrize("operator", [SCAN, WKV])
def test_repeats_have_equal_bits(operator) -> None:
  """Time is cut into slices. A race between threads would change bits."""
  if operator is SCAN:
    inputs = scan_inputs(2, 2100, 192, 16, "float32", 1e-3, 0.1)
  else:
    inputs = wkv_inputs(2, 2100, 256, "bfloat16", 1)
  ids = documents(2, 2100, 0.01)
  first = answer(operator, inputs, ids, "gpu")
  for _ in range(200):
    again = answer(operator, inputs, ids, "gpu")
    jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("operator", [SCAN, WKV])
def test_mapped_calls_equal_calls_one_by_one(operator) -> None:
  """`jax.vmap`, as a sweep maps its runs, adds an axis to a kernel's grid."""
  if operator is SCAN:
    inputs = scan_inputs(2, 70, 64, 16, "float32", 1e-3, 1)
  else:
    inputs = wkv_inputs(2, 70, 128, "float32", 1)
  runs = jax.tree.map(lambda x: jnp.stack([x, x * 0.5, x * 0.25]), inputs)

  @jax.jit
  def with_gradients(inputs):
    y, pull = jax.vjp(lambda inputs: operator(**inputs)[0], inputs)
    return y, pull(jnp.cos(y))

  found = jax.vmap(with_gradients)(runs)
  for n in range(3):
    run, own = (jax.tree.map(lambda x, n=n: x[n], x) for x in (runs, found))
    jax.tree.map(np.testing.assert_array_equal, own, with_gradients(run))


def test_the_kernels_are_the_default() -> None:
  """XLA's program runs where it is named, and for arrays on the CPU."""
  scan = scan_inputs(1, 40, 64, 16, "float32", 1e-3, 1)
  sums = wkv_inputs(1, 40, 128, "float32", 1)
  for operator, arrays in ((selective_scan, scan), (wkv, sums)):
    arrays = jax.tree.map(jnp.asarray, arrays)
    for name in (None, "gpu", "xla"):
      call = jax.jit(lambda x, f=operator, n=name: f(**x, implementation=n))
      text = call.lower(arrays).as_text()
      assert ("mosaic_gpu" in text) == (name != "xla")
    # Also outside `jax.jit`, beside a GPU that is the default device.
    cpu = jax.devices("cpu")[0]
    y, _ = operator(**jax.device_put(arrays, cpu))
    assert y.device == cpu
    np.testing.assert_allclose(y, operator(**arrays)[0], rtol=1e-4, atol=1e-4)
