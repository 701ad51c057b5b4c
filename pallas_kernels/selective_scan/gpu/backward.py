"""The Hopper kernels of the scan's backward.

With g_t the cotangent of h_t, from the last token to the first,

    g_t = dy_t C_tᵀ + a_{t+1} ∘ g_{t+1},   a_t = exp(Δ_t A)
    dC_t = Σ_channels dy_t h_t,   dB_t = Σ_channels g_t (Δ_t ∘ x_t)
    p_t = g_t ∘ a_t ∘ h_{t−1},   dA = Σ_t Δ_t p_t
    dx_t = Δ_t ∘ (g_t B_t),   dΔ_t = x_t ∘ (g_t B_t) + Σ_states A ∘ p_t

A program walks its chunks from the last one. It computes the states of a chunk
again, from the one before the chunk that the forward kept: first those before
each sub-chunk of a few tokens, which go to shared memory, then those of a
sub-chunk's tokens, which stay in registers. So each exponential is computed two
times. Every array with tokens is read or written once; Δ, C and dy are read
twice where time is cut into slices.
"""

import math

import jax
from jax import Array
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.devices import WARPGROUP
from pallas_kernels.selective_scan.gpu.forward import add_drive, advance
from pallas_kernels.selective_scan.gpu.walk import (
  C,
  Launch,
  W,
  channel_stream,
  decay,
  f32,
  join_slices,
  kernel,
  load_channels,
  load_rates,
  load_states,
  load_vector,
  over_channels,
  over_states,
  place,
  scratch,
  slice_outputs,
  start_stream,
  state_stream,
  store_chunk,
  sub_chunks,
  tokens_of,
  vector_stream,
  walk,
  zero_channels,
  zero_if,
  zero_states,
)

SUB_CHUNK = 4  # tokens whose states are in registers at once


def slice_cotangents(
  launch: Launch, arrays: dict[str, Array]
) -> dict[str, Array]:
  """Sum what each slice but the first adds to the cotangent of the state.

  Args:
    launch: the launch, of several slices.
    arrays: "delta", "A", "C", "dy"; "starts" with documents.

  Returns:
    "sums" (B, slices − 1, G, W, N), and "steps" (B, slices − 1, G, W), the sums
    of Δ; float32.
  """
  streams = dict(
    delta=channel_stream(launch),
    dy=channel_stream(launch),
    C=vector_stream(launch),
  )
  if launch.documents:
    streams["starts"] = start_stream()

  def body(refs, shared):
    here = place(launch, skipped=1)
    rates_WN = load_rates(refs["A"], here)

    def step(_, inputs, carry):
      def tokens(each, carry):
        g_WN, steps_W = carry
        for t in reversed(each):
          delta_W = load_channels(inputs["delta"].at[t])
          dy_W = load_channels(inputs["dy"].at[t])
          C_N = load_vector(inputs["C"].at[t])
          g_WN = g_WN + add_drive(launch, dy_W, C_N)
          g_WN = decay(delta_W, rates_WN, launch) * g_WN
          if launch.documents:
            g_WN = zero_if(inputs["starts"][t] != 0, g_WN)
          steps_W = steps_W + delta_W
        return g_WN, steps_W

      return sub_chunks(SUB_CHUNK, tokens, carry, from_end=True)

    carry = zero_states(launch), zero_channels()
    g_WN, steps_W = walk(
      streams, refs, here, shared, step, carry, from_end=True
    )
    at = here.b, here.s - 1, here.g
    refs["sums"].at[at][...] = g_WN
    refs["steps"].at[at][...] = steps_W

  return kernel(
    "selective_scan_slice_cotangents",
    launch,
    body,
    {name: arrays[name] for name in ("A", *streams)},
    slice_outputs(launch),
    scratch(streams),
    slices=launch.slices - 1,
  )


def backward(launch: Launch, arrays: dict[str, Array]) -> dict[str, Array]:
  """Compute the gradients.

  Args:
    launch: the launch.
    arrays: "x", "delta", "A", "B", "C", "dy", "before" (from the forward),
      "dlast" (the cotangent of the last state); "starts" with documents; with
      several slices also what `slice_cotangents` returns, and "broken" if there
      are documents.

  Returns:
    "dx" and "ddelta" (B, padded T, G, W) in x's dtype; in float32 "dh" (B, G,
    W, N), "dA" (B, slices, G, W, N) of each slice, and "dB" and "dC" (B, G,
    padded T, N) of each group of channels.
  """
  streams = {name: channel_stream(launch) for name in ("x", "delta", "dy")}
  streams |= {name: vector_stream(launch) for name in ("B", "C")}
  streams["before"] = state_stream(launch)
  if launch.documents:
    streams["starts"] = start_stream()
  B, T, G, N = launch.B, launch.padded_T, launch.G, launch.N

  def body(refs, shared):
    here = place(launch)
    rates_WN = load_rates(refs["A"], here)
    g_WN = load_states(refs["dlast"].at[here.b, here.g])
    g_WN = join_slices(launch, here, g_WN, rates_WN, refs, from_end=True)

    def step(chunk, inputs, carry):
      _states_before_sub_chunks(launch, inputs, rates_WN, shared["before"])

      def tokens(each, carry):
        return _sub_chunk(launch, inputs, shared, each, rates_WN, carry)

      carry = sub_chunks(SUB_CHUNK, tokens, carry, from_end=True)
      tokens = pl.ds(chunk * C, C)
      # dx and dΔ were written over x and dy.
      for name, buffer in (("dx", "x"), ("ddelta", "dy")):
        target = tokens_of(launch, refs[name], here, chunk)
        store_chunk(inputs[buffer], target)
      for name in ("dB", "dC"):
        store_chunk(shared[name], refs[name].at[here.b, here.g, tokens])
      return carry

    carry = g_WN, zero_states(launch)
    g_WN, dA_WN = walk(streams, refs, here, shared, step, carry, from_end=True)
    refs["dA"].at[here.b, here.s, here.g][...] = dA_WN

    @pl.when(here.s == 0)
    def _():
      refs["dh"].at[here.b, here.g][...] = g_WN

  like = jax.ShapeDtypeStruct((B, T, G, W), launch.dtype)
  wide = lambda *shape: jax.ShapeDtypeStruct((*shape, N), f32)
  outputs = dict(
    dx=like,
    ddelta=like,
    dh=wide(B, G, W),
    dA=wide(B, launch.slices, G, W),
    dB=wide(B, G, T),
    dC=wide(B, G, T),
  )
  own = dict(
    before=plgpu.SMEM((C // SUB_CHUNK, W, N), f32),
    dB=plgpu.SMEM((C, N), f32),
    dC=plgpu.SMEM((C, N), f32),
  )
  return kernel(
    "selective_scan_backward",
    launch,
    body,
    arrays,
    outputs,
    own | scratch(streams),
    slices=launch.slices,
    # Each of 128 threads has two float32 sums of every 8 columns.
    sum_bytes=WARPGROUP * SUB_CHUNK * N,
  )


def _states_before_sub_chunks(launch: Launch, inputs, rates_WN, before_s):
  """Write the state before each sub-chunk of a chunk to shared memory."""

  def tokens(each, h_WN):
    for t in each:
      h_WN, _ = advance(launch, inputs, t, rates_WN, h_WN)
    before_s[each[0] // SUB_CHUNK + 1] = h_WN
    return h_WN

  h_WN = load_states(inputs["before"])
  before_s[0] = h_WN
  sub_chunks(SUB_CHUNK, tokens, h_WN, count=C // SUB_CHUNK - 1)
  plgpu.commit_smem()


def _sub_chunk(launch: Launch, inputs, shared, each, rates_WN, carry):
  """Walk a sub-chunk to its last token and back.

  Args:
    launch: the launch.
    inputs: the chunk's inputs. dx and dΔ are written over x and dy.
    shared: the shared memory of the other results.
    each: the sub-chunk's tokens, counted in the chunk.
    rates_WN: A / log 2.
    carry: a_{t+1} ∘ g_{t+1} for the last token t, and dA so far.
  """
  g_WN, dA_WN = carry
  h_WN = load_states(shared["before"].at[each[0] // SUB_CHUNK])
  forth, dC = [], []
  for t in each:
    x_W, delta_W, dy_W = (
      load_channels(inputs[name].at[t]) for name in ("x", "delta", "dy")
    )
    B_N, C_N = (load_vector(inputs[name].at[t]) for name in ("B", "C"))
    a_WN = decay(delta_W, rates_WN, launch)
    past_WN = a_WN * h_WN
    start = None
    if launch.documents:
      start = inputs["starts"][t] != 0
      past_WN = zero_if(start, past_WN)
    h_WN = past_WN + add_drive(launch, delta_W * x_W, B_N)
    dC.append(over_states(dy_W, launch) * h_WN)
    forth.append((t, x_W, delta_W, dy_W, B_N, C_N, a_WN, past_WN, start))
  # All threads have read x and dy before this sum over them ends.
  _sum_channels(launch, dC, shared["dC"], each)
  dB = []
  for t, x_W, delta_W, dy_W, B_N, C_N, a_WN, past_WN, start in reversed(forth):
    g_WN = g_WN + add_drive(launch, dy_W, C_N)
    p_WN = g_WN * past_WN
    dA_WN = dA_WN + over_states(delta_W, launch) * p_WN
    dB.append(over_states(delta_W * x_W, launch) * g_WN)
    drive_W = (g_WN * over_channels(B_N, launch)).sum(axis=1)
    ddelta_W = (p_WN * rates_WN).sum(axis=1) * f32(math.log(2))
    inputs["x"][t] = (delta_W * drive_W).astype(launch.dtype)
    inputs["dy"][t] = (x_W * drive_W + ddelta_W).astype(launch.dtype)
    g_WN = a_WN * g_WN
    if launch.documents:
      g_WN = zero_if(start, g_WN)
  _sum_channels(launch, dB[::-1], shared["dB"], each)
  return g_WN, dA_WN


def _sum_channels(launch: Launch, tiles: list[Array], sums_s, each) -> None:
  """Write the sum over channels of each token's tile (W, N).

  All tiles are summed at once, because a sum over the warps needs barriers.
  """
  sums = jnp.concatenate(tiles, axis=1).sum(axis=0)
  for j, t in enumerate(each):
    sums_s[t] = sums[j * launch.N : (j + 1) * launch.N]
