"""The backward of a gated short convolution, in one pass; see `gpu.py`."""

from jax import Array

from pallas_kernels import hopper

_TAPS = 4  # whose channels a program's registers hold


def runs_on(u_BTD: Array, taps_KD: Array, *parameters: Array) -> bool:
  """Whether the kernel takes such arrays, on the device that calls run on."""
  fits = u_BTD.shape[-1] % hopper.WARPGROUP == 0
  fits = fits and 1 <= taps_KD.shape[0] <= _TAPS
  return fits and hopper.takes(u_BTD, taps_KD, parameters)
