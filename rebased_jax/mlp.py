"""The MLP of a block, W₂ gelu(W₁ x + b₁) + b₂."""

import math

from flax import nnx
import jax
from jax import Array

from pallas_kernels.polynomial.spec import accumulator
from rebased_jax.mixers import base


class MLP(nnx.Module):
  """W₂ gelu(W₁ x + b₁) + b₂, with the exact GELU."""

  def __init__(
    self, width: int, hidden: int, *, dtype: str, stddev: float, rngs: nnx.Rngs
  ):
    """Of x (…, width); W₂ is drawn with `stddev`."""
    make = lambda i, o, stddev: base.linear(
      i, o, dtype=dtype, rngs=rngs, use_bias=True, stddev=stddev
    )
    self.up = make(width, hidden, 0.02)
    self.down = make(hidden, width, stddev)

  def __call__(self, x: Array) -> Array:
    return self.down(_gelu(self.up(x)))


@jax.checkpoint  # its backward is made of its input alone
def _gelu(x: Array) -> Array:
  """x Φ(x) by erf in float32; jax.nn.gelu's erfc takes twice the operations."""
  wide = x.astype(accumulator(x.dtype))
  return (0.5 * wide * (1 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)
