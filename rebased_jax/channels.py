"""Parameters of one number a channel, whose gradients are summed in float32.

    x + b,   w ∘ x          db = Σ dy,   dw = Σ dy ∘ x,   over all tokens

Of b and w that are cast to the dtype of x and then spread over its tokens, the
sums would be made in that dtype: in bfloat16 they are some percent off.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.polynomial.spec import accumulator


def add(x_D: Array, b_D: Array) -> Array:
  """x + b (…, D), in the dtype of x; b is (D,)."""
  wide_D = b_D.astype(accumulator(x_D.dtype))
  return x_D + jnp.broadcast_to(wide_D, x_D.shape).astype(x_D.dtype)


def row(parameter_D: Array, like_D: Array) -> Array:
  """A parameter with as many axes as `like_D`, and in its dtype."""
  shape = (1,) * (like_D.ndim - parameter_D.ndim) + parameter_D.shape
  return parameter_D.astype(like_D.dtype).reshape(shape)


def summed(gradient_D: Array, parameter_D: Array) -> Array:
  """A parameter's gradient, in its dtype.

  In a `jax.shard_map` that checks what varies, where jax leaves it to who
  defines a derivative: summed over the axes that the parameter is whole on.
  """
  varies, whole = map(_compat.varying_axes, (gradient_D, parameter_D))
  names = tuple(sorted(varies - whole))
  total_D = jax.lax.psum(gradient_D, names) if names else gradient_D
  return total_D.astype(parameter_D.dtype)


@jax.custom_vjp
def scale(x_D: Array, w_D: Array) -> Array:
  """w ∘ x (…, D), in the dtype of x; w is (D,). Not for forward mode."""
  return x_D * row(w_D, x_D)


def _forward(x_D, w_D):
  return scale(x_D, w_D), (x_D, w_D)


def _backward(kept, dy_D):
  x_D, w_D = kept
  wide = accumulator(x_D.dtype)
  tokens = tuple(range(x_D.ndim - 1))
  dw_D = (dy_D.astype(wide) * x_D.astype(wide)).sum(axis=tokens)
  return scale(dy_D, w_D), summed(dw_D, w_D)


scale.defvjp(_forward, _backward)
