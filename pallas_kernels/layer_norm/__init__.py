"""A residual sum with its layer norm, in one pass each way; see `gpu.py`."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels import hopper

_WIDEST = 2048  # of a row, that their registers hold


def runs_on(x_BTD: Array, y_BTD: Array) -> bool:
  """Whether the kernels take such arrays, on the device that calls run on."""
  width = x_BTD.shape[-1]
  fits = width % hopper.WARPGROUP == 0 and width <= _WIDEST
  return fits and x_BTD.dtype == jnp.float32 and hopper.takes(y_BTD)
