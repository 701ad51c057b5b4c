"""BaseConv (arXiv 2312.04927): a gated short convolution.

    c_t = w_0 ∘ u_{t−2} + w_1 ∘ u_{t−1} + w_2 ∘ u_t + b
    y_t = c_t ∘ (W u_t + b_W) + u_t

with u = 0 before a document's first token. Where a mesh splits time, each
device takes the K − 1 tokens before its own from its neighbour on the left.

On a Hopper GPU the backward of whole rows of one document is a kernel of its
own, which has no forward mode and no second derivative.
"""

import dataclasses
import functools

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes, document_runs, gated_conv
from pallas_kernels.varying import alike
from rebased_jax import channels
from rebased_jax.mixers import base
from rebased_jax.on_devices import on_devices, over_tokens


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
      y_BTD = _by_kernel(u_BTD, z_BTD, *taps, of_z_D, axes)
    else:
      state = self.init_state(x_BTD.shape[0])
      y_BTD, _ = self.prefill(u_BTD, state, segment_ids=segment_ids, axes=axes)
    return base.take_positions(y_BTD, query_positions)

  def _has_kernel(self, u_BTD, segment_ids, axes: ShardAxes | None) -> bool:
    whole = axes is None or axes.are_alone(axes.batch)
    parameters = self.kernel, self.bias, self.gate.kernel, self.gate.bias
    u_BTD, *_ = alike(u_BTD, *(x[...] for x in parameters))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _by_kernel(
  u_BTD: Array,
  z_BTD: Array,
  kernel_KD: Array,
  bias_D: Array,
  of_z_D: Array,
  axes: ShardAxes | None,
) -> Array:
  """c ∘ (z + of_z) + u, of rows that are one document each."""
  return _forward(u_BTD, z_BTD, kernel_KD, bias_D, of_z_D, axes)[0]


def _forward(u_BTD, z_BTD, kernel_KD, bias_D, of_z_D, axes):
  del axes
  past = kernel_KD.shape[0] - 1
  none_BKD = jnp.zeros_like(u_BTD, shape=(u_BTD.shape[0], past, u_BTD.shape[2]))
  c_BTD, _ = depthwise(kernel_KD, bias_D, u_BTD, none_BKD, None)
  y_BTD = c_BTD * channels.add(z_BTD, of_z_D) + u_BTD
  return y_BTD, (u_BTD, z_BTD, kernel_KD, bias_D, of_z_D)


def _backward(axes, kept, dy_BTD):
  from pallas_kernels.gated_conv import gpu  # takes long to import

  def run(u_BTD, z_BTD, dy_BTD, *parameters):
    du_BTD, dz_BTD, sums = gpu.backward(u_BTD, z_BTD, dy_BTD, *parameters)
    return du_BTD, dz_BTD, over_tokens(sums, axes)

  u_BTD, z_BTD, *parameters = kept
  inputs, outputs = ("r", "r", "r", "w", "w", "w"), ("r", "r", "w")
  run = on_devices(run, axes, inputs=inputs, outputs=outputs)
  wide = [x.astype(jnp.float32) for x in parameters]
  du_BTD, dz_BTD, sums = run(u_BTD, z_BTD, dy_BTD, *wide)
  sums = sums[:-2], sums[-2], sums[-1]
  to = [x.astype(p.dtype) for x, p in zip(sums, parameters, strict=True)]
  return du_BTD, dz_BTD, *to


_by_kernel.defvjp(_forward, _backward)


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


def over_time(
  kernel_KD: Array,
  bias_D: Array,
  x_BTD: Array,
  past_BKD: Array,
  segment_ids: Array | None,
  axes: ShardAxes | None,
) -> tuple[Array, Array]:
  """`depthwise` of rows whose time the mesh may split.

  Raises:
    ValueError: a device holds fewer than K − 1 tokens of a row.
  """
  if axes is None or axes.time is None:
    return depthwise(kernel_KD, bias_D, x_BTD, past_BKD, segment_ids)
  axes.check(x_BTD.shape[0], None, x_BTD.shape[1])
  past, time = past_BKD.shape[1], axes.time
  devices = axes.devices(time)
  if x_BTD.shape[1] < past * devices:
    raise ValueError(
      f"a convolution of {past + 1} taps over a row of {x_BTD.shape[1]} "
      f"tokens, split over {devices} devices: expected at least {past} on each"
    )

  def local(kernel_KD, bias_D, x_BTD, past_BKD, ids_BT):
    here = jax.lax.axis_index(time)
    shift = [(i, i + 1) for i in range(devices - 1)]
    left = lambda x_BT: jax.lax.ppermute(x_BT[:, -past:], time, shift)
    past_BKD = jnp.where(here == 0, past_BKD, left(x_BTD)) if past else past_BKD
    past_ids_BK = None
    if past and ids_BT is not None:
      past_ids_BK = jnp.where(here == 0, ids_BT[:, :1], left(ids_BT))
    c_BTD, after_BKD = depthwise(
      kernel_KD, bias_D, x_BTD, past_BKD, ids_BT, past_ids_BK
    )
    last = jnp.where(here == devices - 1, after_BKD, 0)
    return c_BTD, jax.lax.psum(last, time)

  # Channels are apart: they are split as heads are, where they divide.
  channels = axes.heads
  if channels is not None and x_BTD.shape[-1] % axes.devices(channels):
    channels = None
  tokens = PartitionSpec(axes.batch, time, channels)
  rows = PartitionSpec(axes.batch, None, channels)
  taps, bias = PartitionSpec(None, channels), PartitionSpec(channels)
  return jax.shard_map(
    local,
    in_specs=(taps, bias, tokens, rows, axes.bt()),
    out_specs=(tokens, rows),
    check_vma=False,
  )(kernel_KD, bias_D, x_BTD, past_BKD, segment_ids)


def depthwise(
  kernel_KD: Array,
  bias_D: Array,
  x_BTD: Array,
  past_BKD: Array,
  segment_ids: Array | None,
  past_ids_BK: Array | None = None,
) -> tuple[Array, Array]:
  """c_BTD = bias + Σ_j kernel_j ∘ x_{t−K+1+j}, and the last K − 1 tokens.

  Another document's tokens count as 0, before the row, in it and behind it.
  The past is of the first token's document, unless it has ids of its own.
  """
  T, past = x_BTD.shape[1], past_BKD.shape[1]
  window_BSD = jnp.concatenate([past_BKD, x_BTD], axis=1)  # S = K − 1 + T
  taps = [window_BSD[:, j : j + T] for j in range(past + 1)]
  after_BKD = window_BSD[:, T:]
  if segment_ids is not None:
    if past_ids_BK is None:
      runs_BT = document_runs(segment_ids)
      runs_BS = jnp.pad(runs_BT, ((0, 0), (past, 0)))
    else:
      window_BS = jnp.concatenate([past_ids_BK, segment_ids], axis=1)
      runs_BS = document_runs(window_BS)
      runs_BT = runs_BS[:, past:]
    own = lambda x, j, runs: jnp.where(
      (runs_BS[:, j : j + runs.shape[1]] == runs)[..., None], x, 0
    )
    taps = [own(x, j, runs_BT) for j, x in enumerate(taps)]
    after_BKD = own(after_BKD, T, runs_BT[:, -1:].repeat(past, axis=1))
  scaled = map(channels.scale, taps, kernel_KD)
  c_BTD = channels.add(next(scaled), bias_D)
  for scaled_BTD in scaled:
    c_BTD += scaled_BTD
  return c_BTD, after_BKD
