"""The MLP of a block: W₂ gelu(W₁ x + b₁) + b₂."""

import functools

from flax import nnx
from jax import Array

from pallas_kernels import ShardAxes, gelu
from pallas_kernels.numerics import add_bias
from rebased_jax.config_checks import DType, Precision
from rebased_jax.linear import linear


class MLP(nnx.Module):
  """W₂ gelu(W₁ x + b₁) + b₂, with the exact GELU.

  Parameters: up/{kernel (D, hidden), bias}, down/{kernel (hidden, D), bias}.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    dtype: DType,
    stddev: float,
    rngs: nnx.Rngs,
    precision: Precision | None = None,
    param_dtype: DType = "float32",
  ):
    """Draw W₁ from N(0, 0.02²) and W₂ from N(0, stddev²).

    Args:
      width: D.
      hidden: the hidden width.
      dtype: of the computation.
      stddev: standard deviation of W₂'s initial entries.
      rngs: a source of keys.
      precision: of float32 products, as `linear` takes it.
      param_dtype: dtype of the parameters.
    """
    make = functools.partial(
      linear,
      dtype=dtype,
      rngs=rngs,
      use_bias=True,
      precision=precision,
      param_dtype=param_dtype,
    )
    self.up = make(width, hidden, stddev=0.02)
    self.down = make(hidden, width, stddev=stddev)

  def __call__(self, x: Array) -> Array:
    """Return the MLP of x (…, D)."""
    y, bias = self.parts(x)
    return add_bias(y, bias)

  def parts(
    self, x: Array, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Return W₂ gelu(W₁ x + b₁) (…, D), and b₂ (D,) that is yet to be added.

    Args:
      x: (…, D); (B, T, D) with axes.
      axes: the mesh axes that split batch and time; None: there is no mesh.
    """
    hidden = gelu(self.up.product(x), self.up.bias[...], axes=axes)
    return self.down.product(hidden), self.down.bias[...]
