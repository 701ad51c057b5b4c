"""BaseConv (arXiv 2312.04927): a gated short convolution.

    c_t = w_0 ∘ u_{t−2} + w_1 ∘ u_{t−1} + w_2 ∘ u_t + b
    y_t = c_t ∘ (W u_t + b_W) + u_t

with u = 0 before a document's first token. Where a mesh splits time, each
device takes the K − 1 tokens before its own from its neighbour on the left.

On a Hopper GPU the backward of whole rows of one document is a kernel of its
own, which has no forward mode and no second derivative.
"""

import dataclasses

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import (
  ShardAxes,
  gated_conv,
)
from pallas_kernels.gated_conv.xla import depthwise, gated, over_time
from pallas_kernels.sharding import vary_alike
from rebased_jax.mixers import base


@dataclasses.dataclass(frozen=True)
class BaseConvConfig(base.MixerConfig):
  """The paper's: three taps."""

  taps: int = 3  # K

  def __post_init__(self):
    base.positive(self, "taps")

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "BaseConv":
    return BaseConv(site.width, self, dtype=site.dtype, rngs=rngs)


class BaseConv(base.Mixer):
  """The short convolution. Parameters: kernel (K, D), bias (D,), gate/….

  The state is the last K − 1 tokens, (B, K − 1, D); a token of another document
  than the last one's is held as 0, which is what it counts for.
  """

  def __init__(
    self,
    width: int,
    config: BaseConvConfig,
    *,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    base.check_made(width, config, BaseConvConfig)
    self.kernel, self.bias = initial_taps(width, config.taps, rngs)
    self.gate = base.linear(width, width, dtype=dtype, use_bias=True, rngs=rngs)
    self.width, self.dtype = width, base.computation(dtype)

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    base.check_rows(self, x_BTD, segment_ids, query_positions=query_positions)
    u_BTD = x_BTD.astype(self.dtype)
    if self._has_kernel(u_BTD, segment_ids, axes):
      taps = self.kernel[...], self.bias[...]
      z_BTD, of_z_D = self.gate.product(u_BTD), self.gate.bias[...]
      y_BTD = gated(u_BTD, z_BTD, *taps, of_z_D, axes)
    else:
      state = self.init_state(x_BTD.shape[0])
      y_BTD, _ = self.prefill(u_BTD, state, segment_ids=segment_ids, axes=axes)
    return base.take_positions(y_BTD, query_positions)

  def _has_kernel(self, u_BTD, segment_ids, axes: ShardAxes | None) -> bool:
    whole = axes is None or axes.are_alone(axes.batch)
    parameters = self.kernel, self.bias, self.gate.kernel, self.gate.bias
    u_BTD, *_ = vary_alike(u_BTD, *(x[...] for x in parameters))
    has_kernel = gated_conv.runs_on(u_BTD, self.kernel.shape[-2])
    return whole and segment_ids is None and has_kernel

  def init_state(self, batch: int) -> Array:
    past = self.kernel.shape[-2] - 1
    return jnp.zeros((batch, past, self.width), self.dtype)

  def prefill(
    self,
    x_BTD: Array,
    state: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, Array]:
    base.check_rows(self, x_BTD, segment_ids, state=state)
    x_BTD = x_BTD.astype(self.dtype)
    c_BTD, state = over_time(
      self.kernel[...], self.bias[...], x_BTD, state, segment_ids, axes
    )
    return c_BTD * self.gate(x_BTD) + x_BTD, state

  def step(self, x_BD: Array, state: Array) -> tuple[Array, Array]:
    base.check_token(self, x_BD, state)
    y_B1D, state = self.prefill(x_BD[:, None], state)
    return y_B1D[:, 0], state


class ShortConv(nnx.Module):
  """The convolution alone, c_t. Parameters: kernel (K, D), bias (D,)."""

  def __init__(self, width: int, taps: int, *, rngs: nnx.Rngs):
    self.kernel, self.bias = initial_taps(width, taps, rngs)

  def __call__(
    self, x_BTD: Array, past_BKD: Array, segment_ids: Array | None = None
  ) -> tuple[Array, Array]:
    """c_BTD, in the dtype of x, and the last K − 1 tokens."""
    return depthwise(
      self.kernel[...], self.bias[...], x_BTD, past_BKD, segment_ids
    )


def initial_taps(
  width: int, taps: int, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param]:
  """kernel (K, D) and bias (D,): PyTorch's default of a depthwise one."""
  bound = taps**-0.5
  uniform = lambda *shape: nnx.Param(
    jax.random.uniform(
      rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound
    )
  )
  kernel = uniform(taps, width)
  return kernel, uniform(width)
