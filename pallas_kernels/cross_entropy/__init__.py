"""Softmax cross-entropy with its gradient, in one kernel; see `gpu.py`."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels import _compat

WIDTH = 1024  # logits that a warpgroup takes at a time
_ALIGNED = 8  # logits of 16 bytes, at which a row has to begin


def runs_on(logits_V: Array) -> bool:
  """Whether the kernel takes such logits, on the device that calls run on."""
  V = logits_V.shape[-1]
  fits = V >= WIDTH and V % _ALIGNED == 0 and logits_V.size > 0
  narrow = logits_V.dtype in (jnp.bfloat16, jnp.float16)
  return fits and narrow and _compat.is_hopper()
