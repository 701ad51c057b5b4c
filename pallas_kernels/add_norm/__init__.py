"""A residual sum with its layer norm, in one pass each way; see `gpu.py`."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels import _compat

WARPGROUP = 128  # threads, that share a row
_WIDEST = 2048  # of a row, that their registers hold


def runs_on(x_BTD: Array, y_BTD: Array) -> bool:
  """Whether the kernels take such arrays, on the device that calls run on."""
  width = x_BTD.shape[-1]
  fits = width % WARPGROUP == 0 and width <= _WIDEST and x_BTD.size > 0
  narrow = y_BTD.dtype in (jnp.bfloat16, jnp.float16)
  if not (fits and narrow and x_BTD.dtype == jnp.float32):
    return False
  return _compat.is_hopper()
