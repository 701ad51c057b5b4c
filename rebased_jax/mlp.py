"""The MLP of a block, W₂ gelu(W₁ x + b₁) + b₂."""

import math

from flax import nnx
import jax
from jax import Array

from pallas_kernels.polynomial.spec import accumulator
from rebased_jax import channels
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
    y, bias = self.parts(x)
    return channels.add(y, bias)

  def parts(self, x: Array) -> tuple[Array, Array]:
    """W₂ gelu(…) and b₂, which is float32."""
    hidden = _gelu(self.up.product(x), self.up.bias[...])
    return self.down.product(hidden), self.down.bias[...]


@jax.checkpoint  # the backward keeps the product alone, not its sum with b
def _gelu(z: Array, b: Array) -> Array:
  """x Φ(x) of x = z + b, by erf in float32, of fewer operations than erfc."""
  x = channels.add(z, b).astype(accumulator(z.dtype))
  return (0.5 * x * (1 + jax.lax.erf(math.sqrt(0.5) * x))).astype(z.dtype)
