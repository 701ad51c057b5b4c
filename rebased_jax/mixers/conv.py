"""BaseConv (arXiv 2312.04927): a gated short convolution.

    c_t = w_0 ∘ u_{t−2} + w_1 ∘ u_{t−1} + w_2 ∘ u_t + b      for three taps
    y_t = c_t ∘ (W u_t + b_W) + u_t

where u = 0 before a document's first token. Where a mesh splits time, each
device takes the K − 1 tokens before its own from its left neighbour.

On a Hopper GPU the backward pass of whole rows of one document each is a
kernel. It has no forward-mode derivative and no second derivative.
"""

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, causal_conv, gated_conv
from pallas_kernels.gated_conv import has_kernel
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.linear import linear
from rebased_jax.mixer_configs import BaseConvConfig as BaseConvConfig
from rebased_jax.mixers.base import Mixer, take_positions


class BaseConv(Mixer):
  """The short convolution with its gate.

  Parameters: kernel (K, D), bias (D,), gate/kernel (D, D), gate/bias (D,).

  The state is the last K − 1 tokens, (B, K − 1, D) in the compute dtype. Tokens
  of earlier documents are 0 in it, because they count as 0.
  """

  config_type = BaseConvConfig
  no_time_axis = None
  state_rule = "window"

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: BaseConvConfig,
    *,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
    precision: Precision | None = None,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(width, config, dtype=dtype, param_dtype=param_dtype)
    self.kernel, self.bias = initial_taps(
      width, config.taps, self.param_dtype, rngs
    )
    self.gate = linear(
      width,
      width,
      dtype=self.dtype,
      param_dtype=param_dtype,
      use_bias=True,
      rngs=rngs,
      precision=precision,
      kernel_init=kernel_init,
    )

  def init_state(self, batch: int) -> Array:
    """Return K − 1 tokens of 0, (B, K − 1, D)."""
    past = self.kernel.shape[-2] - 1
    return jnp.zeros((batch, past, self.width), self.dtype)

  def _mix(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
    query_positions: Array | None,
  ) -> Array:
    u_BTD = x_BTD.astype(self.dtype)
    taps = self.kernel.shape[-2]
    if not has_kernel(u_BTD, taps, segment_ids=segment_ids, axes=axes):
      # XLA computes it as `prefill`, so that gradients are bit-identical.
      return super()._mix(
        u_BTD,
        segment_ids=segment_ids,
        axes=axes,
        query_positions=query_positions,
      )
    y_BTD = gated_conv(
      u_BTD,
      self.gate.product(u_BTD),
      self.kernel[...],
      self.bias[...],
      self.gate.bias[...],
      axes=axes,
    )
    return take_positions(y_BTD, query_positions)

  def _prefill(
    self,
    x_BTD: Array,
    state: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, Array]:
    u_BTD = x_BTD.astype(self.dtype)
    c_BTD, state = causal_conv(
      u_BTD,
      self.kernel[...],
      self.bias[...],
      initial_state=state,
      segment_ids=segment_ids,
      axes=axes,
    )
    return c_BTD * self.gate(u_BTD) + u_BTD, state


class ShortConv(nnx.Module):
  """The convolution c_t alone, which Mamba and Hyena use too.

  Parameters: kernel (K, D), bias (D,).
  """

  def __init__(
    self, width: int, taps: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
  ):
    self.kernel, self.bias = initial_taps(width, taps, param_dtype, rngs)

  def __call__(
    self, x_BTD: Array, past_BKD: Array, segment_ids: Array | None = None
  ) -> tuple[Array, Array]:
    """Return c (B, T, D) in the dtype of x, and the last K − 1 tokens.

    Args:
      x_BTD: the tokens.
      past_BKD: the K − 1 tokens before them, (B, K − 1, D).
      segment_ids: integers (B, T). None: each row is one document.
    """
    return causal_conv(
      x_BTD,
      self.kernel[...],
      self.bias[...],
      initial_state=past_BKD,
      segment_ids=segment_ids,
    )


def initial_taps(
  width: int, taps: int, dtype: jnp.dtype, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param]:
  """Return a kernel (K, D) and a bias (D,), uniform in ±1/√K.

  This is PyTorch's default for a depthwise convolution.
  """
  bound = taps**-0.5

  def uniform(*shape: int) -> nnx.Param:
    return nnx.Param(
      jax.random.uniform(
        rngs.params(), shape, dtype, minval=-bound, maxval=bound
      )
    )

  return uniform(taps, width), uniform(width)
