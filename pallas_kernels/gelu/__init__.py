"""GELU of a product and its bias, in one pass each way; see `gpu.py`."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels import _compat

WARPGROUP = 128  # threads, that share a part of a row


def runs_on(z_D: Array, parts: int = 1) -> bool:
  """Whether the kernels take such an array, on the device that calls run on.

  Args:
    z_D: (…, D).
    parts: that devices split D into.
  """
  fits = z_D.shape[-1] % (parts * WARPGROUP) == 0 and z_D.size > 0
  narrow = z_D.dtype in (jnp.bfloat16, jnp.float16)
  return fits and narrow and _compat.is_hopper()
