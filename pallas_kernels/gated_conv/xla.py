"""A gated short convolution, causal, over packed documents."""

import functools

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import numerics
from pallas_kernels.documents import document_runs
from pallas_kernels.sharding import ShardAxes, map_over_mesh, sum_over_tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def gated(
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
  y_BTD = c_BTD * numerics.add_bias(z_BTD, of_z_D) + u_BTD
  return y_BTD, (u_BTD, z_BTD, kernel_KD, bias_D, of_z_D)


def _backward(axes, kept, dy_BTD):
  from pallas_kernels.gated_conv import gpu  # takes long to import

  def run(u_BTD, z_BTD, dy_BTD, *parameters):
    du_BTD, dz_BTD, sums = gpu.backward(u_BTD, z_BTD, dy_BTD, *parameters)
    return du_BTD, dz_BTD, sum_over_tokens(sums, axes)

  u_BTD, z_BTD, *parameters = kept
  inputs, outputs = ("r", "r", "r", "w", "w", "w"), ("r", "r", "w")
  run = map_over_mesh(run, axes, inputs=inputs, outputs=outputs)
  wide = [x.astype(jnp.float32) for x in parameters]
  du_BTD, dz_BTD, sums = run(u_BTD, z_BTD, dy_BTD, *wide)
  sums = sums[:-2], sums[-2], sums[-1]
  to = [x.astype(p.dtype) for x, p in zip(sums, parameters, strict=True)]
  return du_BTD, dz_BTD, *to


gated.defvjp(_forward, _backward)


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
  scaled = map(numerics.scale_channels, taps, kernel_KD)
  c_BTD = numerics.add_bias(next(scaled), bias_D)
  for scaled_BTD in scaled:
    c_BTD += scaled_BTD
  return c_BTD, after_BKD
