"""What is known of the kernels over rows before Mosaic GPU is imported."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.sharding import axes_of

WARPGROUP = 128  # threads, that share a row or a part of it


def takes(x: Array) -> bool:
  """Whether x is of 16 bits and not empty, and calls run on a Hopper GPU.

  Not in a `jax.shard_map` that checks what x varies over, which jax does not
  know of a kernel's results; a caller has made its arrays vary `alike`.
  """
  narrow = x.dtype in (jnp.bfloat16, jnp.float16) and x.size > 0
  return narrow and devices.is_hopper() and not axes_of(x)
