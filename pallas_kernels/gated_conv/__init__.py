"""The backward of a gated short convolution, in one pass; see `gpu.py`."""

from jax import Array

from pallas_kernels import hopper

_TAPS = 4  # whose channels a program's registers hold


def runs_on(u_BTD: Array, taps: int) -> bool:
  """Whether the kernel takes such an array, on the device that calls run on."""
  fits = u_BTD.shape[-1] % hopper.WARPGROUP == 0 and 1 <= taps <= _TAPS
  return fits and hopper.takes(u_BTD)
