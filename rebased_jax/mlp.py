"""The MLP of a block, W₂ gelu(W₁ x + b₁) + b₂."""

from flax import nnx
from jax import Array

from pallas_kernels import ShardAxes, numerics
from pallas_kernels.gelu.xla import gelu
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
    return numerics.add_bias(y, bias)

  def parts(
    self, x: Array, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """W₂ gelu(…) and b₂, which is float32."""
    hidden = gelu(self.up.product(x), self.up.bias[...], axes=axes)
    return self.down.product(hidden), self.down.bias[...]
