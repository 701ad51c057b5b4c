"""The walk of a Hopper kernel over the chunks of a slice of time.

Two warpgroups share a walk. For each chunk

    state warpgroup                        output warpgroup
    ---------------                        ----------------
    wait: inputs of the chunk              wait: the state before the chunk
    write its features to shared memory    fetch a later chunk's inputs
    signal: features written               wait: inputs of the chunk
    add it to the state in registers       compute what passes through the state
    wait: the state was read               wait: features written
    write the new state to shared memory   signal: the state was read
    signal: state written                  add the tokens of the chunk itself,
                                           write the outputs

No data depends on the wait for the features, which only the state warpgroup
reads. It keeps the two warpgroups in step: the state is updated while the
output warpgroup works on the chunk itself.

A program has two such walks, or one with float32. A kernel that only sums a
state has no output warpgroup, and twice as many walks in a program. Barriers
are in shared memory, and `warpgroup.Shared` names them. Inputs are copied by
TMA, one chunk or two ahead.
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

from pallas_kernels.polynomial.gpu import features, tiles
from pallas_kernels.polynomial.gpu.documents import (
  OF_STATE_AFTER,
  OF_STATE_BEFORE,
)
from pallas_kernels.polynomial.gpu.launch import (
  HALF_BLOCKS,
  PART,
  SQUARE_BLOCKS,
  TILE,
  C,
  Launch,
)
from pallas_kernels.polynomial.gpu.tiles import LAYOUT, f32
from pallas_kernels.polynomial.gpu.warpgroup import Place, Shared, Work

# Inputs that are PART columns wide.
FEATURE_INPUTS = ("q", "k", "qj", "kj", "q_low", "k_low")
SHARED_MEMORY = 230_000  # bytes of a program, without alignment and barriers


class Steps(NamedTuple):
  """The steps of a kernel with one chunk, as functions (work, chunk, slot).

  `chunk` is the number of the chunk in the row, `slot` the stage that holds its
  inputs.

  Attributes:
    write_features: writes `shared.phi` and `shared.extended`.
    summed_tiles: returns (x_s, values_s), the tiles of queries or keys and of
      their values that are added to the state. It takes (work, slot).
    through_state: returns what the chunk gets from tokens outside it.
    finish: takes that result as a fourth argument, adds the tokens of the chunk
      itself where the launch is fused, and writes the outputs. None in kernels
      that only sum a state.
  """

  write_features: Callable
  summed_tiles: Callable
  through_state: Callable | None = None
  finish: Callable | None = None


class Staging(NamedTuple):
  """Shared memory from which an output is copied to HBM.

  Attributes:
    name: the name in `Work.staging`.
    shape: of one walk's tile.
    swizzle: the layout for the copy; None for plain float32 values.
  """

  name: str
  shape: tuple[int, ...]
  swizzle: tuple | None


def value_staging(name: str, launch: Launch) -> Staging:
  """Describe the staging of a value tile."""
  swizzle = tiles.output_swizzle(launch, launch.P)
  return Staging(name, (C, launch.tile_width), swizzle)


@dataclasses.dataclass(frozen=True)
class Arrays:
  """The arrays that a kernel reads and writes.

  Attributes:
    streams: by name, the inputs (B, T, H, ·) that are read chunk by chunk.
    per_token: by name, the inputs with one value a token, (B, ·, T padded to
      chunks). The second axis is 1, or H · value_tiles.
    states: KVᵀ and KK before the slices in the order of the walk, perhaps the
      count of their tokens, too; or () for zeros.
    outputs: shapes and dtypes of the outputs.
    staging: shared memory for the outputs.
    write_states: whether to write the states after the slices, too.
    from_end: whether to walk from the last chunk to the first.
  """

  streams: dict[str, Array]
  per_token: dict[str, Array]
  states: tuple = ()
  outputs: tuple = ()
  staging: Sequence[Staging] = ()
  write_states: bool = False
  from_end: bool = False


def feature_streams(launch: Launch, **arrays: Array) -> dict[str, Array]:
  """Name the streams of queries and keys: "q"; for pairs also "qj", part j."""
  if not launch.pairs:
    return arrays
  return arrays | {f"{name}j": x for name, x in arrays.items()}


def _high_and_low(streams: dict[str, Array]) -> dict[str, Array]:
  """Split float32 inputs into two of bfloat16 each, which sum to 16 bits."""
  tiles_of = {}
  for name, x in streams.items():
    # XLA may drop a conversion to bfloat16 and back, but not this rounding.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    tiles_of[name] = high.astype(jnp.bfloat16)
    tiles_of[tiles.low_name(name)] = (x - high).astype(jnp.bfloat16)
  return tiles_of


def run(name: str, launch: Launch, steps: Steps, arrays: Arrays) -> list[Array]:
  """Run a kernel over the grid (slices, groups of walks).

  Args:
    name: of the kernel, in a profile.
    launch: the static record of the launch.
    steps: what the kernel does with a chunk.
    arrays: what it reads and writes.

  Returns:
    The outputs; then, where `write_states` asks for them, KVᵀ and KK after each
    slice (`state_shapes`).
  """
  if launch.float32:
    streams = _high_and_low(arrays.streams)
    arrays = dataclasses.replace(arrays, streams=streams)
  state_only = steps.finish is None
  per_program = launch.warpgroups if state_only else launch.warpgroups // 2
  scratch = _scratch(launch, arrays, per_program, state_only=state_only)
  if _bytes(scratch) > SHARED_MEMORY:
    launch = dataclasses.replace(launch, stages=1)
    scratch = _scratch(launch, arrays, per_program, state_only=state_only)
  names = (*arrays.streams, *arrays.per_token)
  has_count = len(arrays.states) == 3

  def body(*refs, inputs, rolls, loaded, operand, shared, staging):
    input_refs, (rolls_ref, *rest) = refs[: len(names)], refs[len(names) :]
    states = rest[: len(arrays.states)]
    outputs = rest[len(arrays.states) :]
    copies = [
      (x, ref, inputs[x]) for x, ref in zip(names, input_refs, strict=True)
    ]
    w = lax.axis_index("w")
    in_program = w if state_only else lax.div(w, 2)

    @pl.when(w == 0)
    def _():
      if not launch.pairs:
        plgpu.copy_gmem_to_smem(rolls_ref, rolls, loaded.at[0])
        return
      for half in range(2):
        plgpu.copy_gmem_to_smem(
          rolls_ref.at[half], rolls.at[half], loaded.at[0]
        )

    def walk(role) -> None:
      here = _place(launch, in_program, per_program)
      count = jnp.zeros((), f32)
      if has_count:
        count = states[2][here.s, here.b, here.h]
      work = Work(
        launch,
        here,
        _of_walk(shared, in_program, state_only=state_only),
        {x: buffer.at[in_program] for x, buffer in inputs.items()},
        {x: buffer.at[in_program] for x, buffer in staging.items()},
        outputs[: len(arrays.outputs)],
        rolls.at[here.half] if launch.pairs else rolls,
        operand.at[w] if launch.by_shared else None,
        count,
      )

      def chunk_at(i):
        step = here.chunks - 1 - i if arrays.from_end else i
        return here.first_chunk + step

      fetch = functools.partial(_fetch, work, copies)
      plgpu.barrier_wait(loaded.at[0])
      role(work, steps, chunk_at, fetch)

    state_role = functools.partial(
      _state_warpgroup,
      before=states[:2],
      after=outputs[len(arrays.outputs) :],
      from_end=arrays.from_end,
    )
    exists = (
      lax.axis_index("n") * per_program + in_program < launch.B * launch.walks
    )
    if state_only:
      pl.when(exists)(lambda: walk(state_role))
    else:
      is_output = lax.rem(w, 2) == 1
      pl.when(exists & ~is_output)(lambda: walk(state_role))
      pl.when(exists & is_output)(lambda: walk(_output_warpgroup))

  kernel = plgpu.kernel(
    body,
    out_type=[
      *arrays.outputs,
      *(state_shapes(launch) if arrays.write_states else ()),
    ],
    scratch_types=scratch,
    compiler_params=tiles.compiler_params(),
    kernel_name=f"polynomial_{launch.kernel_prefix}{name}",
    grid=(launch.slices, -(-launch.B * launch.walks // per_program)),
    grid_names=("s", "n"),
    num_threads=launch.warpgroups,
    thread_name="w",
  )
  return kernel(
    *arrays.streams.values(),
    *arrays.per_token.values(),
    jnp.asarray(features.rolling_matrices(launch), launch.dtype),
    *arrays.states,
  )


def state_shapes(launch: Launch) -> list[jax.ShapeDtypeStruct]:
  """Describe KVᵀ and KK of all slices: (slices, B, walks, TILE, ·) float32."""
  at = (launch.slices, launch.B, launch.walks, TILE)
  return [
    jax.ShapeDtypeStruct((*at, launch.E), f32),
    jax.ShapeDtypeStruct((*at, PART), f32),
  ]


# The two warpgroups.


def _output_warpgroup(work: Work, steps: Steps, chunk_at, fetch) -> None:
  """Write the outputs of each chunk; fetch the inputs for both warpgroups."""
  assert steps.through_state is not None and steps.finish is not None
  here, shared, stages = work.here, work.shared, work.launch.stages
  n = here.in_program
  for i in range(stages):
    pl.when(i < here.chunks)(functools.partial(fetch, chunk_at(i), i))

  def step(i, _):
    slot = lax.rem(i, stages)
    at = chunk_at(i), slot
    plgpu.barrier_wait(shared.state_written.at[n])
    # The state holds the last chunk now, so that both warpgroups have used its
    # inputs, and its stage is free.
    ahead = i - 1 + stages
    pl.when((i > 0) & (ahead < here.chunks))(
      lambda: fetch(chunk_at(ahead), lax.rem(ahead, stages))
    )
    plgpu.barrier_wait(shared.copied.at[n * stages + slot])
    from_outside = steps.through_state(work, *at)
    plgpu.barrier_wait(shared.features_written.at[n])
    plgpu.barrier_arrive(shared.state_read.at[n])
    steps.finish(work, *at, from_outside)
    return ()

  lax.fori_loop(0, here.chunks, step, ())
  plgpu.wait_smem_to_gmem(0)


def _state_warpgroup(
  work: Work, steps: Steps, chunk_at, fetch, *, before, after, from_end: bool
) -> None:
  """Keep the state in registers, and add each chunk to it.

  Args:
    work: the work of this warpgroup.
    steps: what the kernel does with a chunk.
    chunk_at: the chunk of each step of the walk.
    fetch: starts the copies of a chunk's inputs into a stage.
    before: references to KVᵀ and KK before the slices, or ().
    after: references to which to write those after the slices, or ().
    from_end: whether the walk is from the end. The state is one of cotangents
      then, which `gradient_scale` has brought into range.
  """
  launch, here, shared = work.launch, work.here, work.shared
  n, stages, state_only = here.in_program, launch.stages, steps.finish is None
  scale = 1.0 if from_end else launch.state_scale
  nothing = tiles.zeros((C, TILE), launch.array_dtype)
  tiles.store(shared.extended, ..., tiles.operand(launch, nothing))
  plgpu.commit_smem()
  state = _load_state(before, here, launch, from_end=from_end)
  if state_only:
    for i in range(stages):
      pl.when(i < here.chunks)(functools.partial(fetch, chunk_at(i), i))
  else:
    _write_state(work, *state, scale)
    plgpu.barrier_arrive(shared.state_written.at[n])

  def step(i, state):
    slot = lax.rem(i, stages)
    at = chunk_at(i), slot
    plgpu.barrier_wait(shared.copied.at[n * stages + slot])
    steps.write_features(work, *at)
    plgpu.commit_smem()
    if not state_only:
      plgpu.barrier_arrive(shared.features_written.at[n])
    state = _reset_at_boundary(work, slot, state)
    state = _update(work, state, *steps.summed_tiles(work, slot))
    if state_only:
      plgpu.commit_smem()  # the update has read the chunk's inputs and features
      ahead = i + stages
      pl.when(ahead < here.chunks)(lambda: fetch(chunk_at(ahead), slot))
      return state
    plgpu.barrier_wait(shared.state_read.at[n])
    _write_state(work, *state, scale)
    plgpu.barrier_arrive(shared.state_written.at[n])
    return state

  kv, kk = lax.fori_loop(0, here.chunks, step, state)
  if after:
    after[0][here.state_index] = kv
    after[1][here.state_index] = kk


def _load_state(refs, here: Place, launch: Launch, *, from_end: bool):
  """Load (KVᵀ, KK) before the slice into registers; zeros if there are none.

  The arrays may have an entry for each slice, or one more: the states at all
  slice boundaries. A walk from the end starts from the later boundary.
  """
  if not refs:
    return tiles.zeros((TILE, launch.E)), tiles.zeros((TILE, PART))
  shift = refs[0].shape[0] - launch.slices if from_end else 0
  at = (here.s + shift, *here.state_index[1:])
  load = functools.partial(plgpu.load, layout=LAYOUT, optimized=False)
  return load(refs[0].at[at]), load(refs[1].at[at])


def _reset_at_boundary(work: Work, slot, state):
  """Set the state to zeros where a document begins or ends in the chunk.

  It does not where one token, and so all of them, is of the document of the
  states before and after the chunk.
  """
  if not work.launch.segments:
    return state
  both = OF_STATE_BEFORE | OF_STATE_AFTER
  unbroken = (work.inputs["codes"][slot, 0] & both) == both
  return tuple(jnp.where(unbroken, x, jnp.zeros_like(x)) for x in state)


def _update(work: Work, state, x_s, values_s) -> tuple[Any, Any]:
  """Add valuesᵀ φ to KVᵀ, and k̃ᵀ k to KK, on the tensor core."""
  kv, kk = state
  extended, phi = work.shared.extended, work.shared.phi
  kv, kk = tiles.add_mmas(
    work,
    (kv, (tiles.transpose(values_s), phi)),
    (kk, (tiles.transpose(extended), x_s)),
  )
  return kv, kk


def _write_state(work: Work, kv, kk, scale: float) -> None:
  """Write the tensor core's copy of a state to shared memory."""
  launch, shared = work.launch, work.shared
  kv = tiles.operand(launch, tiles.times(kv, scale))
  tiles.store(shared.kv, ..., kv)
  tiles.store_high_low(shared.kk, tiles.times(kk, scale))
  plgpu.commit_smem()


# Where a walk is, and its inputs.


def _place(launch: Launch, in_program, per_program: int) -> Place:
  """Find the slice, row, head, value tile and term of a walk.

  `per_program` is the number of walks in a program.
  """
  s = lax.axis_index("s")
  n = lax.axis_index("n") * per_program + in_program
  first = s * launch.chunks
  chunks = jnp.minimum(launch.chunks, launch.total_chunks - first)
  b, walk = lax.div(n, launch.walks), lax.rem(n, launch.walks)
  h, tile, term = walk, None, ()
  if not launch.fused:
    h, number = lax.div(h, launch.terms), lax.rem(h, launch.terms)
    term = _term(launch, number)
  if launch.value_tiles > 1:
    h, tile = lax.div(h, launch.value_tiles), lax.rem(h, launch.value_tiles)
  return Place(in_program, s, b, walk, h, tile, first, chunks, *term)


def _term(launch: Launch, number):
  """Return (i, j, half) of a term.

  Squares are (0, 0), (1, 1), …; pairs (0, 1), (0, 2), …, (1, 2), …, two terms
  each. `number` is traced, so that the pair is counted and not looked up.
  """
  if not launch.pairs:
    return number, number, 0
  pair, half = lax.div(number, 2), lax.rem(number, 2)
  i, j, start = 0, pair + 1, 0
  for first in range(1, launch.parts - 1):
    start += launch.parts - first
    later = pair >= start
    i = i + jnp.where(later, 1, 0)
    j = j + jnp.where(later, 1 + first - launch.parts, 0)
  return i, j, half


def _of_walk(shared: Shared, in_program, *, state_only: bool) -> Shared:
  """Select a walk's share of the program's shared memory, except barriers."""
  names = ["phi", "extended", "x", "values"]
  if not state_only:
    names += ["kv", "kk"]
  buffers = {name: getattr(shared, name) for name in names}
  return shared._replace(
    **{
      x: tiles.select(ref, in_program)
      for x, ref in buffers.items()
      if ref is not None
    }
  )


def _fetch(work: Work, copies: list, chunk, slot) -> None:
  """Start the copies of one chunk's inputs; TMA fills with 0 beyond T."""
  launch, here = work.launch, work.here
  barrier = work.shared.copied.at[here.in_program * launch.stages + slot]
  for name, ref, buffer in copies:
    tokens = pl.ds(chunk * C, C)
    target = buffer.at[here.in_program, slot]
    if len(ref.shape) == 3:
      line = 0 if ref.shape[1] == 1 else here.walk
      if not launch.fused and ref.shape[1] > 1:
        line = lax.div(line, launch.terms)  # all terms share r and dz
      source = ref.at[here.b, line, tokens]
    else:
      width = buffer.shape[-1]
      # TMA fills what is beyond the width with 0, too. But a slice that is
      # static and too wide is refused, so that this 0 is a traced one.
      start = 0 if width == ref.shape[-1] else here.b * 0
      if width == TILE and here.tile is not None:
        start = here.tile * TILE
      if not launch.fused and name in FEATURE_INPUTS:
        start = (here.j if name.endswith("j") else here.i) * PART
      source = ref.at[here.b, tokens, here.h, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(source, target, barrier)


# Shared memory.


def _scratch(
  launch: Launch, arrays: Arrays, per_program: int, *, state_only: bool
) -> dict:
  """Describe the shared memory of a program; `body` receives it by name.

  `per_program` is the number of walks in a program.
  """
  stages = launch.stages
  inputs = {
    name: tiles.smem(
      launch,
      per_program,
      stages,
      C,
      PART if name in FEATURE_INPUTS else TILE,
    )
    for name in arrays.streams
  }
  for name, x in arrays.per_token.items():
    inputs[name] = plgpu.SMEM((per_program, stages, C), x.dtype)
  barrier = plgpu.Barrier(num_arrivals=1, num_barriers=per_program)
  tile = functools.partial(tiles.smem, launch, per_program)

  def operand_tile(*shape: int):
    if not launch.float32:
      return tile(*shape)
    return tiles.HighLow(tile(*shape), tile(*shape))

  shared = Shared(
    phi=operand_tile(C, launch.E),
    extended=operand_tile(C, TILE),
    kv=None if state_only else operand_tile(TILE, launch.E),
    kk=None if state_only else tile(2, TILE, PART),
    x=operand_tile(C, PART) if launch.segments else None,
    values=operand_tile(C, TILE) if launch.segments else None,
    copied=plgpu.Barrier(
      num_arrivals=len(inputs), num_barriers=per_program * stages
    ),
    features_written=barrier,
    state_read=barrier,
    state_written=barrier,
  )
  rolls = tiles.smem(launch, PART, SQUARE_BLOCKS * PART)
  if launch.pairs:
    rolls = tiles.smem(launch, 2, PART, HALF_BLOCKS * PART)
  staging = {}
  for name, shape, swizzle in arrays.staging:
    shape = per_program, *shape
    if swizzle is None:
      staging[name] = plgpu.SMEM(shape, f32)
    else:
      dtype = launch.array_dtype
      staging[name] = plgpu.SMEM(shape, dtype, transforms=swizzle)
  operand = None
  if launch.by_shared:
    operand = tiles.smem(launch, launch.warpgroups, C, PART)
  return dict(
    inputs=inputs,
    loaded=plgpu.Barrier(num_arrivals=1 + launch.pairs, num_barriers=1),
    operand=operand,
    rolls=rolls,
    shared=shared,
    staging=staging,
  )


def _bytes(scratch: dict) -> int:
  """Count the bytes of all buffers; barriers are small."""
  leaves = jax.tree.leaves(scratch, is_leaf=lambda x: hasattr(x, "dtype"))
  return sum(
    math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
    for x in leaves
    if not isinstance(x, plgpu.Barrier)
  )
