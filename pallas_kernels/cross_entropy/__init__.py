"""Softmax cross-entropy with its gradient, in one kernel; see `gpu.py`."""

from jax import Array

from pallas_kernels import hopper

WIDTH = 1024  # logits that a warpgroup takes at a time
_ALIGNED = 8  # logits of 16 bytes, at which a row has to begin


def runs_on(logits_V: Array) -> bool:
  """Whether the kernel takes such logits, on the device that calls run on."""
  V = logits_V.shape[-1]
  return V >= WIDTH and V % _ALIGNED == 0 and hopper.takes(logits_V)
