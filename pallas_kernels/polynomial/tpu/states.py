"""Conversion between the public recurrent state and that of the TPU kernels.

The public `State` has the features that the coefficients need. The kernels have
two forms only: the products alone, or the products, x and eight rows of which
the first is the 1. Their values are padded to whole tiles, V instead of P, and
their KK is symmetric.
"""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.state import State
from pallas_kernels.polynomial.tpu.call import ONE_ROWS, Call


def to_kernel(
  state: State | None, kernel: Kernel, call: Call, *, by_feature: bool
) -> tuple[Array, Array] | None:
  """Convert a public state.

  Args:
    state: the public state or its cotangent; None stays None.
    kernel: the static numbers.
    call: the launch.
    by_feature: whether KV is (B, H, E, V), else (B, H, V, E).
  """
  if state is None:
    return None
  kv, kk = state
  kk = (kk + kk.swapaxes(2, 3)) / 2
  kv = jnp.pad(kv, ((0, 0), (0, 0), (0, 0), (0, call.V - kv.shape[-1])))
  if call.affine:
    coefficients, end = kernel.coefficients, call.product_rows

    def zeros(rows: int) -> Array:
      return jnp.zeros((*kv.shape[:2], rows, call.V), kv.dtype)

    has_x, has_one = coefficients.c1 != 0, coefficients.c0 != 0
    x = kv[:, :, end : end + call.F] if has_x else zeros(call.F)
    one = kv[:, :, -1:] if has_one else zeros(1)
    rest = zeros(ONE_ROWS - 1)
    kv = jnp.concatenate([kv[:, :, :end], x, one, rest], axis=2)
    missing = call.G - kk.shape[-1]
    kk = jnp.pad(kk, ((0, 0), (0, 0), (0, missing), (0, missing)))
  return kv if by_feature else kv.swapaxes(2, 3), kk


def from_kernel(
  state: tuple[Array, Array],
  values: int,
  kernel: Kernel,
  call: Call,
  *,
  by_feature: bool,
) -> State:
  """Convert a state of the kernels; the inverse of `to_kernel`.

  Args:
    state: (KV, KK) of the kernels.
    values: P, the width of a head's values.
    kernel: the static numbers.
    call: the launch.
    by_feature: whether KV is (B, H, E, V), else (B, H, V, E).
  """
  kv, kk = state
  kv = (kv if by_feature else kv.swapaxes(2, 3))[..., :values]
  if call.affine:
    coefficients, end = kernel.coefficients, call.product_rows
    rows = [kv[:, :, :end]]
    if coefficients.c1 != 0:
      rows.append(kv[:, :, end : end + call.F])
    if coefficients.c0 != 0:
      rows.append(kv[:, :, end + call.F : end + call.F + 1])
    kv = jnp.concatenate(rows, axis=2)
    G = call.F + 1
    kk = kk[:, :, :G, :G]
  return State(kv, kk)
