"""Calls with more than 2³¹ elements, and with more than 65,535 programs.

Rows and heads are independent, so a few of them are compared with XLA's
program in float32 on each alone. A number that wraps around would read or write
another row or head, and give an error of about 1.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices, measure
from pallas_kernels.polynomial.arg_specs import ArgSpec

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
if not devices.is_hopper():
  pytest.skip("no Hopper GPU", allow_module_level=True)

_WRAPS = 2**31  # elements of the largest 32-bit index
_PROGRAMS = 65_535  # the most in the second axis of a CUDA grid


def _assert_right(spec: ArgSpec, places) -> None:
  """Compare o and all gradients at some (row, head) of a call."""
  *qkv, do = measure.inputs(spec)
  arrays = *qkv, measure.settled(do)
  both = measure.forward_and_backward(measure.operator(spec, "gpu"))
  found = jax.jit(both)(*arrays)
  finite = jax.jit(lambda x: jnp.isfinite(x).all())
  assert all(bool(finite(x)) for x in found)
  by_xla = measure.forward_and_backward(measure.operator(spec, "xla"))

  @jax.jit
  def alone(row, head, arrays):
    def pick(x_BTHX):
      x_1TH = jax.lax.dynamic_slice_in_dim(x_BTHX, row, 1, axis=0)
      return jax.lax.dynamic_slice_in_dim(x_1TH, head, 1, axis=2)

    return [pick(x).astype(jnp.float32) for x in arrays]

  compare = jax.jit(by_xla)
  for row, head in places:
    wanted = compare(*alone(row, head, arrays))
    own = alone(row, head, found)
    for name, a, b in zip(measure.RESULTS, own, wanted, strict=True):
      error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
      assert error <= measure.TOLERANCE, (row, head, name)


def test_a_million_tokens() -> None:
  spec = ArgSpec("large", 4, 1 << 20, 12, 16, 64)
  assert math.prod((spec.B, spec.T, spec.H, spec.P)) > _WRAPS
  _assert_right(spec, [(0, 0), (1, 7), (2, 8), (3, 0), (3, 11)])


def test_many_programs() -> None:
  """Rows and heads of a launch share the second axis of its grid."""
  spec = ArgSpec("many", 11_000, 128, 12, 16, 64)
  assert spec.B * spec.H > 2 * _PROGRAMS  # a program has two walks
  last = spec.B - 1
  _assert_right(spec, [(0, 0), (5_461, 3), (5_462, 0), (last, 0), (last, 11)])
