"""The walk of a program over the chunks of a slice of time.

A program walks one slice of one row, for a group of W = 64 channels. It holds a
tile (W, N) of states in the registers of one warpgroup, laid out as the tensor
core's results are: four neighbouring threads share a channel. Inputs come by
TMA into shared memory, one chunk of C tokens ahead.

TMA fills what is beyond the last token with 0. A step Δ = 0 leaves the state as
it is, so that a last chunk with fewer tokens needs no mask.

Where rows × groups give too few programs, time is cut into slices, which are
walked at once. A first kernel sums what the tokens of each slice add to the
state, and its steps Δ. A second one starts each slice from

    h ← sum_r + exp(A Σ_r Δ) ∘ h        for all slices r before it

and the backward does the same from the end, with the cotangent of h.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.time_slices import Cut, cut_time

W = 64  # channels of a program, as a tensor core's tile has rows
C = 32  # tokens of a chunk; one state a chunk is kept for the backward
f32 = jnp.float32

# Each of a Hopper GPU's 132 multiprocessors runs four programs at once, or two
# of the backward. These numbers were computed and not yet measured.
CUT = Cut(enough=200, programs=4 * 132, least=8)

STATES = plgpu.Layout.WGMMA  # of a tile (W, N)
CHANNELS = STATES.reduce(1)  # one value for each of its channels
VECTOR = STATES.reduce(0)  # B or C of a token, one value for each state
_STAGES = 2  # chunks of inputs in shared memory


@dataclasses.dataclass(frozen=True)
class Launch:
  """The static record of a kernel launch.

  Attributes:
    B: rows of the batch.
    T: tokens of a row.
    G: groups of W channels.
    N: states of a channel, a multiple of 8.
    dtype: of the arrays with tokens; sums and states are float32.
    documents: whether rows hold several documents.
    slices: slices of time, which different programs walk at once.
    chunks: chunks of a slice; the last slice may have fewer.
  """

  B: int
  T: int
  G: int
  N: int
  dtype: Any
  documents: bool
  slices: int
  chunks: int

  @property
  def total_chunks(self) -> int:
    """Chunks of a row."""
    return -(-self.T // C)

  @property
  def padded_T(self) -> int:
    """Tokens of whole chunks, which the outputs have; see `store_chunk`."""
    return self.total_chunks * C


def make_launch(x_BTGW: Array, states: int, *, documents: bool) -> Launch:
  """Return the launch of a call, with time cut into slices.

  Args:
    x_BTGW: the input, of which shape and dtype are read.
    states: N.
    documents: whether rows hold several documents.
  """
  B, T, G, _ = x_BTGW.shape
  cut = cut_time(-(-T // C), B * G, CUT)
  return Launch(B, T, G, states, x_BTGW.dtype, documents, *cut)


class Place(NamedTuple):
  """A program's part of the arrays; all are traced integers."""

  b: Any  # the row
  s: Any  # the slice of time
  g: Any  # the group of channels
  first: Any  # the slice's first chunk
  chunks: Any  # how many chunks it has


def place(launch: Launch, skipped: int = 0) -> Place:
  """Find the part of this program.

  Args:
    launch: the launch.
    skipped: slices before the first one that the launch walks.
  """
  b, s, g = (lax.axis_index(name) for name in ("b", "s", "g"))
  s = s + skipped
  first = s * launch.chunks
  chunks = jnp.minimum(launch.chunks, launch.total_chunks - first)
  return Place(b, s, g, first, chunks)


# Registers.


def load_states(ref_WN) -> Array:
  """Load a tile of states from HBM or shared memory."""
  return plgpu.load(ref_WN, layout=STATES, optimized=False)


def load_channels(ref_W) -> Array:
  """Load one value for each channel, as float32."""
  return plgpu.load(ref_W, layout=CHANNELS, optimized=False).astype(f32)


def load_vector(ref_N) -> Array:
  """Load B or C of a token, as float32."""
  return plgpu.load(ref_N, layout=VECTOR, optimized=False).astype(f32)


def over_states(x_W: Array, launch: Launch) -> Array:
  """Repeat one value a channel over its states, (W, N)."""
  return lax.broadcast_in_dim(x_W, (W, launch.N), [0])


def over_channels(x_N: Array, launch: Launch) -> Array:
  """Repeat B or C of a token over the channels, (W, N)."""
  return lax.broadcast_in_dim(x_N, (W, launch.N), [1])


def zero_states(launch: Launch) -> Array:
  """Return a tile of zeros."""
  return plgpu.layout_cast(jnp.zeros((W, launch.N), f32), STATES)


def zero_channels() -> Array:
  """Return zeros, one for each channel."""
  return plgpu.layout_cast(jnp.zeros(W, f32), CHANNELS)


def load_rates(A_ref, here: Place) -> Array:
  """Load A / log 2, so that exp(Δ A) is a power of 2."""
  return load_states(A_ref.at[here.b, here.g]) * f32(1 / math.log(2))


def decay(delta_W: Array, rates_WN: Array, launch: Launch) -> Array:
  """Return exp(Δ A) of a token, or of all tokens with this sum of Δ."""
  return jnp.exp2(over_states(delta_W, launch) * rates_WN)


def zero_if(condition, x: Array) -> Array:
  """Return zeros if the condition holds, else x; also where x is NaN."""
  return jnp.where(condition, jnp.zeros_like(x), x)


# The walk.


class Stream(NamedTuple):
  """An input that is copied to shared memory chunk by chunk.

  Attributes:
    shape: of a chunk.
    dtype: of the array.
    chunk: takes (the array in HBM, place, chunk) and returns a chunk's part.
  """

  shape: tuple[int, ...]
  dtype: Any
  chunk: Callable[[Any, Place, Any], Any]


def channel_stream(launch: Launch) -> Stream:
  """Describe an array (B, T, G, W)."""
  tokens = lambda ref, here, i: ref.at[here.b, pl.ds(i * C, C), here.g]
  return Stream((C, W), launch.dtype, tokens)


def vector_stream(launch: Launch) -> Stream:
  """Describe an array (B, T, N)."""
  tokens = lambda ref, here, i: ref.at[here.b, pl.ds(i * C, C)]
  return Stream((C, launch.N), launch.dtype, tokens)


def start_stream() -> Stream:
  """Describe whether each token starts a document: int32 (B, whole chunks)."""
  tokens = lambda ref, here, i: ref.at[here.b, pl.ds(i * C, C)]
  return Stream((C,), jnp.int32, tokens)


def state_stream(launch: Launch) -> Stream:
  """Describe the states before each chunk, (B, chunks, G, W, N) float32."""
  chunk = lambda ref, here, i: ref.at[here.b, i, here.g]
  return Stream((W, launch.N), f32, chunk)


def scratch(streams: dict[str, Stream]) -> dict[str, Any]:
  """Describe the shared memory of the streams, and their barriers."""
  buffers = {
    name: plgpu.SMEM((_STAGES, *x.shape), x.dtype)
    for name, x in streams.items()
  }
  copied = plgpu.Barrier(num_arrivals=len(streams), num_barriers=_STAGES)
  return dict(buffers=buffers, copied=copied)


def walk(
  streams: dict[str, Stream],
  refs: dict[str, Any],
  here: Place,
  shared: dict[str, Any],
  step: Callable[[Any, dict[str, Any], Any], Any],
  carry: Any,
  *,
  from_end: bool = False,
) -> Any:
  """Run carry = step(chunk, inputs, carry) over the chunks of the slice.

  At the start of a step all threads have left the step before, and its copies
  to HBM have read their shared memory.

  Args:
    streams: the inputs.
    refs: their arrays in HBM, by name, perhaps among others.
    here: the program's part.
    shared: what `scratch` described.
    step: takes the chunk's number in the row and its inputs in shared memory.
    carry: what goes from step to step, in registers.
    from_end: whether to walk from the last chunk to the first.
  """
  buffers, copied = shared["buffers"], shared["copied"]

  def chunk_at(i):
    return here.first + (here.chunks - 1 - i if from_end else i)

  def fetch(i):
    slot = lax.rem(i, _STAGES)
    for name, stream in streams.items():
      source = stream.chunk(refs[name], here, chunk_at(i))
      target = buffers[name].at[slot]
      plgpu.copy_gmem_to_smem(source, target, copied.at[slot])

  def run(i, carry):
    plgpu.commit_smem()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pl.when(i + 1 < here.chunks)(lambda: fetch(i + 1))
    slot = lax.rem(i, _STAGES)
    plgpu.barrier_wait(copied.at[slot])
    inputs = {name: buffers[name].at[slot] for name in streams}
    return step(chunk_at(i), inputs, carry)

  fetch(0)
  carry = lax.fori_loop(0, here.chunks, run, carry)
  plgpu.wait_smem_to_gmem(0)
  return carry


def store_chunk(buffer_s, target) -> None:
  """Start the copy of a chunk's results from shared memory to HBM.

  The target must have all C tokens. Where a chunk lies in HBM without gaps (one
  group of channels, say), Mosaic copies its bytes as they are: those beyond the
  last token would go to the next row.
  """
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer_s, target)


def tokens_of(launch: Launch, ref, here: Place, chunk):
  """Select a chunk of an output (B, T, G, W)."""
  return channel_stream(launch).chunk(ref, here, chunk)


def join_slices(
  launch: Launch,
  here: Place,
  state_WN: Array,
  rates_WN: Array,
  refs: dict[str, Any],
  *,
  from_end: bool = False,
) -> Array:
  """Return the state before this slice, from that before the first one.

  Args:
    launch: the launch.
    here: the program's part.
    state_WN: the state before the first slice. With `from_end`, the cotangent
      of the state after the last one.
    rates_WN: A / log 2.
    refs: "sums" and "steps", what slices add and their sums of Δ, of all
      slices but the last; with `from_end` of all but the first. With documents
      also "broken", in which slices a document starts.
    from_end: whether to join the slices after this one.
  """
  if launch.slices == 1:
    return state_WN

  def join(i, state_WN):
    s = launch.slices - 1 - i if from_end else i
    at = here.b, s - 1 if from_end else s, here.g
    sum_WN = load_states(refs["sums"].at[at])
    steps_W = load_channels(refs["steps"].at[at])
    past_WN = decay(steps_W, rates_WN, launch) * state_WN
    if launch.documents:
      past_WN = zero_if(refs["broken"][here.b, s] != 0, past_WN)
    return sum_WN + past_WN

  count = launch.slices - 1 - here.s if from_end else here.s
  return lax.fori_loop(0, count, join, state_WN)


def kernel(
  name: str,
  launch: Launch,
  body: Callable[..., None],
  arrays: dict[str, Array],
  outputs: dict[str, jax.ShapeDtypeStruct],
  scratch_types: dict[str, Any],
  *,
  slices: int,
  sum_bytes: int = 0,
) -> dict[str, Array]:
  """Run body(refs, shared) in a program for each slice, row and group.

  Args:
    name: the kernel's name in a profile.
    launch: the launch.
    body: takes the references of arrays and outputs by name, and those of
      shared memory by name.
    arrays: the inputs.
    outputs: shapes and dtypes of the outputs.
    scratch_types: the shared memory.
    slices: how many slices are walked.
    sum_bytes: shared memory for sums over the warps of a program.

  Returns:
    The outputs, by name.
  """

  def run(*refs, **shared):
    names = (*arrays, *outputs)
    body(dict(zip(names, refs, strict=True)), shared)

  call = plgpu.kernel(
    run,
    out_type=list(outputs.values()),
    scratch_types=scratch_types,
    grid=(launch.B, slices, launch.G),
    grid_names=("b", "s", "g"),
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,  # exp2 of float32 to 2⁻²²
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=sum_bytes,
    ),
  )
  return dict(zip(outputs, call(*arrays.values()), strict=True))


def slice_outputs(launch: Launch) -> dict[str, jax.ShapeDtypeStruct]:
  """Describe what the kernels that sum slices return."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=f32)
  each = launch.B, launch.slices - 1, launch.G, W
  return dict(sums=shape((*each, launch.N)), steps=shape(each))


def sub_chunks(
  tokens: int,
  step: Callable[[Sequence[Any], Any], Any],
  carry: Any,
  *,
  count: int | None = None,
  from_end: bool = False,
) -> Any:
  """Run carry = step([t, t + 1, …], carry) over sub-chunks of a chunk.

  Their tokens are unrolled, so that loads and exponentials of several tokens
  run at once.

  Args:
    tokens: of a sub-chunk, a divisor of C.
    step: takes a sub-chunk's tokens, counted in the chunk.
    carry: what goes from step to step.
    count: how many of the first sub-chunks. None: all.
    from_end: whether to run the last sub-chunk first.
  """
  count = C // tokens if count is None else count

  def run(i, carry):
    first = (count - 1 - i if from_end else i) * tokens
    return step([first + j for j in range(tokens)], carry)

  return lax.fori_loop(0, count, run, carry)
