"""The Hopper kernels of the scan's forward.

    h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ,   y_t = h_t C_t

x, Δ, B and C are read once, or twice where time is cut into slices. The state
before each chunk is written for the backward.
"""

from typing import Any

import jax
from jax import Array
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

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
  store_chunk,
  sub_chunks,
  tokens_of,
  vector_stream,
  walk,
  zero_channels,
  zero_if,
  zero_states,
)

SUB_CHUNK = 8  # tokens that are unrolled


def slice_states(launch: Launch, arrays: dict[str, Array]) -> dict[str, Array]:
  """Sum what each slice but the last adds to the state, from zeros.

  Args:
    launch: the launch, of several slices.
    arrays: "x", "delta", "A", "B"; "starts" with documents.

  Returns:
    "sums" (B, slices − 1, G, W, N), and "steps" (B, slices − 1, G, W), the sums
    of Δ; float32.
  """
  streams = _streams(launch, vectors=("B",))

  def body(refs, shared):
    here = place(launch)
    rates_WN = load_rates(refs["A"], here)

    def step(_, inputs, carry):
      def tokens(each, carry):
        h_WN, steps_W = carry
        for t in each:
          h_WN, delta_W = advance(launch, inputs, t, rates_WN, h_WN)
          steps_W = steps_W + delta_W
        return h_WN, steps_W

      return sub_chunks(SUB_CHUNK, tokens, carry)

    carry = zero_states(launch), zero_channels()
    h_WN, steps_W = walk(streams, refs, here, shared, step, carry)
    at = here.b, here.s, here.g
    refs["sums"].at[at][...] = h_WN
    refs["steps"].at[at][...] = steps_W

  return kernel(
    "selective_scan_slice_states",
    launch,
    body,
    {name: arrays[name] for name in ("A", *streams)},
    slice_outputs(launch),
    scratch(streams),
    slices=launch.slices - 1,
  )


def forward(launch: Launch, arrays: dict[str, Array]) -> dict[str, Array]:
  """Compute y, the last state, and the state before each chunk.

  Args:
    launch: the launch.
    arrays: "x", "delta", "A", "B", "C", "h" (the state before the row);
      "starts" with documents; with several slices also what `slice_states`
      returns, and "broken" if there are documents.

  Returns:
    "y" (B, padded T, G, W) in x's dtype; "last" (B, G, W, N) and "before"
    (B, chunks, G, W, N) in float32.
  """
  streams = _streams(launch, vectors=("B", "C"))

  def body(refs, shared):
    here = place(launch)
    rates_WN = load_rates(refs["A"], here)
    h_WN = load_states(refs["h"].at[here.b, here.g])
    h_WN = join_slices(launch, here, h_WN, rates_WN, refs)

    def step(chunk, inputs, h_WN):
      refs["before"].at[here.b, chunk, here.g][...] = h_WN

      def tokens(each, h_WN):
        for t in each:
          h_WN, _ = advance(launch, inputs, t, rates_WN, h_WN)
          C_WN = over_channels(load_vector(inputs["C"].at[t]), launch)
          y_W = (h_WN * C_WN).sum(axis=1)
          shared["y"][t] = y_W.astype(launch.dtype)
        return h_WN

      h_WN = sub_chunks(SUB_CHUNK, tokens, h_WN)
      store_chunk(shared["y"], tokens_of(launch, refs["y"], here, chunk))
      return h_WN

    h_WN = walk(streams, refs, here, shared, step, h_WN)

    @pl.when(here.s == launch.slices - 1)
    def _():
      refs["last"].at[here.b, here.g][...] = h_WN

  B, G, N = launch.B, launch.G, launch.N
  states = lambda *shape: jax.ShapeDtypeStruct((*shape, G, W, N), f32)
  tokens = jax.ShapeDtypeStruct((B, launch.padded_T, G, W), launch.dtype)
  outputs = dict(
    y=tokens, last=states(B), before=states(B, launch.total_chunks)
  )
  return kernel(
    "selective_scan_forward",
    launch,
    body,
    arrays,
    outputs,
    dict(y=plgpu.SMEM((C, W), launch.dtype), **scratch(streams)),
    slices=launch.slices,
  )


def advance(
  launch: Launch, inputs: dict[str, Any], t, rates_WN: Array, h_WN: Array
) -> tuple[Array, Array]:
  """Return the state after token t of a chunk, and the token's Δ."""
  delta_W = load_channels(inputs["delta"].at[t])
  drive_W = delta_W * load_channels(inputs["x"].at[t])
  B_N = load_vector(inputs["B"].at[t])
  past_WN = decay(delta_W, rates_WN, launch) * h_WN
  if launch.documents:
    past_WN = zero_if(inputs["starts"][t] != 0, past_WN)
  return past_WN + add_drive(launch, drive_W, B_N), delta_W


def add_drive(launch: Launch, drive_W: Array, B_N: Array) -> Array:
  """Return (Δ ∘ x) Bᵀ, what a token adds to the state."""
  return over_states(drive_W, launch) * over_channels(B_N, launch)


def _streams(launch: Launch, vectors: tuple[str, ...]):
  """Describe the inputs that are read chunk by chunk."""
  streams = {name: channel_stream(launch) for name in ("x", "delta")}
  streams |= {name: vector_stream(launch) for name in vectors}
  if launch.documents:
    streams["starts"] = start_stream()
  return streams
