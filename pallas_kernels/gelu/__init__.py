"""GELU of a product and its bias, in one pass each way; see `gpu.py`."""

from jax import Array

from pallas_kernels import hopper


def runs_on(z_D: Array, parts: int = 1) -> bool:
  """Whether the kernels take such an array, on the device that calls run on.

  Args:
    z_D: (…, D).
    parts: that devices split D into.
  """
  fits = z_D.shape[-1] % (parts * hopper.WARPGROUP) == 0
  return fits and hopper.takes(z_D)
