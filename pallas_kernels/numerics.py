"""Dtypes of sums, and per-channel parameters with float32 gradients.

Sums are float32, or float64 for float64 inputs.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.sharding import vary_alike


def sum_dtype(dtype) -> jnp.dtype:
  """The dtype of sums: float32, or float64 for float64 inputs."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def product_precision(dtype) -> jax.lax.Precision:
  """Full precision for float32 and float64 operands on every device."""
  low = jnp.dtype(dtype).itemsize < 4
  return jax.lax.Precision.DEFAULT if low else jax.lax.Precision.HIGHEST


def add_bias(x_D: Array, b_D: Array) -> Array:
  """x + b (…, D), in the dtype of x; b is (D,)."""
  wide_D = b_D.astype(sum_dtype(x_D.dtype))
  return x_D + jnp.broadcast_to(wide_D, x_D.shape).astype(x_D.dtype)


def broadcast_parameter(parameter_D: Array, like_D: Array) -> Array:
  """A parameter with as many axes as `like_D`, and in its dtype."""
  shape = (1,) * (like_D.ndim - parameter_D.ndim) + parameter_D.shape
  return parameter_D.astype(like_D.dtype).reshape(shape)


def scale_channels(x_D: Array, w_D: Array) -> Array:
  """w ∘ x (…, D), in the dtype of x; w is (D,). Not for forward mode."""
  return _scale_channels(*vary_alike(x_D, w_D))


@jax.custom_vjp
def _scale_channels(x_D: Array, w_D: Array) -> Array:
  return x_D * broadcast_parameter(w_D, x_D)


def _scale_forward(x_D, w_D):
  return _scale_channels(x_D, w_D), (x_D, w_D)


def _scale_backward(kept, dy_D):
  x_D, w_D = kept
  wide = sum_dtype(x_D.dtype)
  tokens = tuple(range(x_D.ndim - 1))
  dw_D = (dy_D.astype(wide) * x_D.astype(wide)).sum(axis=tokens)
  return _scale_channels(dy_D, w_D), dw_D.astype(w_D.dtype)


_scale_channels.defvjp(_scale_forward, _scale_backward)
