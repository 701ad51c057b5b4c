"""The layer norm module, and the residual stream in parts that it sums.

A block hands its output on without adding it to the residual stream. The next
norm adds it: one kernel computes the sum and its norm, which saves a pass over
the stream.
"""

from typing import NamedTuple

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, add_layer_norm, layer_norm
from pallas_kernels.layer_norm import residual_sum
from rebased_jax.config_checks import DType


class Stream(NamedTuple):
  """The residual stream x + (y + bias), in parts that the next norm sums."""

  #: (B, T, D), float32, or float64 in a float64 model.
  x_BTD: Array
  #: What is added to it, in the dtype of the computation. None: nothing.
  y_BTD: Array | None = None
  #: (D,), a bias that y lacks. None: no bias.
  bias_D: Array | None = None

  def whole(self) -> Array:
    """Return the sum (B, T, D), in x's dtype."""
    if self.y_BTD is None:
      return self.x_BTD
    return residual_sum(self.x_BTD, self.y_BTD, self.bias_D)


class LayerNorm(nnx.Module):
  """Layer normalisation with parameters scale and bias (D,)."""

  def __init__(
    self,
    width: int,
    *,
    eps: float,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    param_dtype: DType = "float32",
  ):
    """Make the parameters: ones and zeros.

    Args:
      width: D.
      eps: added to the variance.
      dtype: of the result; statistics are float32, or float64.
      rngs: a source of keys, which the initialisers do not use.
      param_dtype: of scale and bias.
    """
    make = lambda init: nnx.Param(init(rngs.params(), (width,), param_dtype))
    self.scale = make(nnx.initializers.ones)
    self.bias = make(nnx.initializers.zeros)
    self.eps = eps
    self.dtype = dtype

  def __call__(self, x_D: Array) -> Array:
    """Return the norm of x (…, D), in the module's dtype."""
    return layer_norm(
      x_D, self.scale[...], self.bias[...], eps=self.eps, dtype=self.dtype
    )

  def of_sum(
    self, stream: Stream, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Sum the residual stream and normalise it.

    Args:
      stream: the residual stream in parts.
      axes: the mesh axes that split batch and time; None: there is no mesh.

    Returns:
      The sum (B, T, D) in x's dtype, and its norm in the module's dtype.
    """
    x_BTD, y_BTD, bias_D = stream
    if y_BTD is None:
      return x_BTD, self(x_BTD)
    return add_layer_norm(
      x_BTD,
      y_BTD.astype(self.dtype),
      self.scale[...],
      self.bias[...],
      y_bias=bias_D,
      eps=self.eps,
      axes=axes,
    )
