"""A short causal depthwise convolution in XLA, also of rows split over time."""

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.documents import document_runs
from pallas_kernels.numerics import add_bias, scale_channels
from pallas_kernels.sharding import ShardAxes


def causal_conv(
  taps_KD: Array,
  bias_D: Array,
  x_BTD: Array,
  past_BKD: Array,
  segment_ids: Array | None,
  past_ids_BK: Array | None = None,
) -> tuple[Array, Array]:
  """Return c_t = bias + Σ_j taps_j ∘ x_{t−K+1+j}, and the last K − 1 tokens.

  A token of another document than the one looked from counts as 0. That holds
  within the row, for the past, and for the last K − 1 tokens.

  Args:
    taps_KD: (K, D).
    bias_D: (D,).
    x_BTD: the tokens.
    past_BKD: the K − 1 tokens before them.
    segment_ids: integers (B, T); None: a row is one document.
    past_ids_BK: ids of the past; None: it belongs to the first token's
      document.
  """
  T, past = x_BTD.shape[1], past_BKD.shape[1]
  window_BSD = jnp.concatenate([past_BKD, x_BTD], axis=1)  # S = K − 1 + T
  shifted = [window_BSD[:, j : j + T] for j in range(past + 1)]
  after_BKD = window_BSD[:, T:]
  if segment_ids is not None and T > 0:
    if past_ids_BK is None:
      runs_BT = document_runs(segment_ids)
      runs_BS = jnp.pad(runs_BT, ((0, 0), (past, 0)))
    else:
      window_BS = jnp.concatenate([past_ids_BK, segment_ids], axis=1)
      runs_BS = document_runs(window_BS)
      runs_BT = runs_BS[:, past:]

    def own(x, j, runs):
      """Return x from place j of the window on; 0 in other documents."""
      is_own = runs_BS[:, j : j + runs.shape[1]] == runs
      return jnp.where(is_own[..., None], x, 0)

    shifted = [own(x, j, runs_BT) for j, x in enumerate(shifted)]
    after_BKD = own(after_BKD, T, runs_BT[:, -1:].repeat(past, axis=1))
  scaled = map(scale_channels, shifted, taps_KD)
  c_BTD = add_bias(next(scaled), bias_D)
  for scaled_BTD in scaled:
    c_BTD += scaled_BTD
  return c_BTD, after_BKD


def gated_conv(
  u_BTD: Array, z_BTD: Array, taps_KD: Array, bias_D: Array, z_bias_D: Array
) -> Array:
  """Return c ∘ (z + z_bias) + u (B, T, D), of rows of one document each."""
  (B, _, D), K = u_BTD.shape, taps_KD.shape[0]
  none_BKD = jnp.zeros_like(u_BTD, shape=(B, K - 1, D))
  c_BTD, _ = causal_conv(taps_KD, bias_D, u_BTD, none_BKD, None)
  return c_BTD * add_bias(z_BTD, z_bias_D) + u_BTD


def gated_conv_backward(
  u_BTD: Array,
  z_BTD: Array,
  dy_BTD: Array,
  taps_KD: Array,
  bias_D: Array,
  z_bias_D: Array,
) -> tuple[Array, Array, Array]:
  """Return (du, dz, sums); sums (K + 2, D) of taps, bias and z_bias."""
  arrays = u_BTD, z_BTD, taps_KD, bias_D, z_bias_D
  du_BTD, dz_BTD, dtaps_KD, *sums_D = jax.vjp(gated_conv, *arrays)[1](dy_BTD)
  return du_BTD, dz_BTD, jnp.concatenate([dtaps_KD, jnp.stack(sums_D)])


def over_time(
  axes: ShardAxes,
  taps_KD: Array,
  bias_D: Array,
  x_BTD: Array,
  past_BKD: Array,
  segment_ids: Array | None,
) -> tuple[Array, Array]:
  """Return `causal_conv` of rows whose time the mesh splits.

  Each device takes the K − 1 tokens before its slice from its neighbour on the
  left; the first device takes `past_BKD`.

  Raises:
    ValueError: the mesh does not fit batch and time, or a device would hold
      fewer than K − 1 tokens of a row.
  """
  axes.check(x_BTD.shape[0], None, x_BTD.shape[1])
  past, time = past_BKD.shape[1], axes.time
  devices = axes.devices(time)
  if x_BTD.shape[1] < past * devices:
    raise ValueError(
      f"a convolution of {past + 1} taps over a row of {x_BTD.shape[1]} "
      f"tokens, split over {devices} devices: expected at least {past} on each"
    )

  def local(taps_KD, bias_D, x_BTD, past_BKD, ids_BT):
    here = jax.lax.axis_index(time)
    shift = [(i, i + 1) for i in range(devices - 1)]
    left = lambda x_BT: jax.lax.ppermute(x_BT[:, -past:], time, shift)
    past_BKD = jnp.where(here == 0, past_BKD, left(x_BTD)) if past else past_BKD
    past_ids_BK = None
    if past and ids_BT is not None:
      past_ids_BK = jnp.where(here == 0, ids_BT[:, :1], left(ids_BT))
    c_BTD, after_BKD = causal_conv(
      taps_KD, bias_D, x_BTD, past_BKD, ids_BT, past_ids_BK
    )
    last = jnp.where(here == devices - 1, after_BKD, 0)
    return c_BTD, jax.lax.psum(last, time)

  # Channels do not meet in a depthwise convolution. They stay split as heads
  # are, if the number of devices divides them.
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
  )(taps_KD, bias_D, x_BTD, past_BKD, segment_ids)
