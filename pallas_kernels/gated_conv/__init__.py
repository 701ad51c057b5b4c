"""The backward of a gated short convolution, in one pass; see `gpu.py`."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels import _compat

WARPGROUP = 128  # threads, that share some channels of a row
_TAPS = 4  # whose channels their registers hold


def runs_on(u_BTD: Array, taps: int) -> bool:
  """Whether the kernel takes such an array, on the device that calls run on."""
  fits = u_BTD.shape[-1] % WARPGROUP == 0 and u_BTD.size > 0
  narrow = u_BTD.dtype in (jnp.bfloat16, jnp.float16)
  return fits and narrow and 1 <= taps <= _TAPS and _compat.is_hopper()
