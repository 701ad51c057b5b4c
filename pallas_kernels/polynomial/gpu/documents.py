"""Rows of several documents: masks at document boundaries.

A state belongs to one document. Each token has a code

    4 · run + 2 · (its document is that of the state after its chunk)
            + 1 · (its document is that of the state before its chunk)

where `run` numbers the documents of a row and "after" and "before" are in time,
whichever way a kernel walks. Queries of other documents do not read the state;
keys of other documents are not added to it.

Masks are selections, so that an Inf or NaN of one document stays out of the
states of others. Within a chunk of 64 tokens it may reach the documents that
share the chunk.
"""

import dataclasses

from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import documents as documents_lib
from pallas_kernels.polynomial.gpu.launch import C, Launch, Plan
from pallas_kernels.polynomial.gpu.tiles import (
  FIRST_AXIS,
  SECOND_AXIS,
  columns,
  f32,
  iota,
  load,
  operand,
  read,
  store,
)
from pallas_kernels.polynomial.gpu.warpgroup import Work

OF_STATE_BEFORE, OF_STATE_AFTER = 1, 2  # bits of a token's code
_PADDING_CODE = 4 * 2**28  # a document that no token is of


@dataclasses.dataclass(frozen=True)
class Documents:
  """The masks of rows that hold several documents.

  Attributes:
    codes_B1T: int32, the code of each token; T padded to whole chunks.
    past_B1T: float32, the tokens of the token's document that come before its
      chunk and are in the row.
    before_BN: int32, the document of the state before each of N chunks.
    after_BN: int32, the document of the state after each chunk, which is that
      of the chunk's last token.
    single_B: whether the row is a single document.
    first_B1T: whether the token is of the row's first document.
  """

  codes_B1T: Array
  past_B1T: Array
  before_BN: Array
  after_BN: Array
  single_B: Array
  first_B1T: Array


def describe(runs_BT: Array | None, plan: Plan) -> Documents | None:
  """Make the masks of a call; None where each row is one document.

  Args:
    runs_BT: the number of each token's document, 0, 1, …, or None.
    plan: the plan of the call.
  """
  if runs_BT is None:
    return None
  _, T = runs_BT.shape
  N = plan.whole.total_chunks

  def pad(x_BT, value):
    return jnp.pad(x_BT, ((0, 0), (0, N * C - T)), constant_values=value)

  def for_each_token(x_BN):
    return jnp.repeat(x_BN, C, axis=1)[:, :T]

  after_BN = runs_BT[:, jnp.minimum(jnp.arange(N) * C + C, T) - 1]
  before_BN = jnp.pad(after_BN[:, :-1], ((0, 0), (1, 0)))
  token_T = jnp.arange(T, dtype=jnp.int32)
  of_before_BT = runs_BT == for_each_token(before_BN)
  past_BT = jnp.maximum(
    (token_T // C * C)[None] - documents_lib.document_starts(runs_BT), 0
  )
  after_bit_BT = jnp.where(
    runs_BT == for_each_token(after_BN), OF_STATE_AFTER, 0
  )
  code_BT = (
    4 * runs_BT + after_bit_BT + jnp.where(of_before_BT, OF_STATE_BEFORE, 0)
  )
  return Documents(
    pad(code_BT.astype(jnp.int32), _PADDING_CODE)[:, None],
    pad(past_BT.astype(jnp.float32), 0.0)[:, None],
    before_BN,
    after_BN,
    runs_BT[:, -1] == 0,
    pad(runs_BT == 0, False)[:, None],
  )


def kernel_inputs(
  documents: Documents | None, launch: Launch, *, past: bool = False
) -> dict[str, Array]:
  """List the arrays (B, 1, T) that a kernel reads of documents, by name.

  Args:
    documents: the masks, or None.
    launch: the launch.
    past: whether the kernel needs the number of earlier tokens, as those of
      queries do for the constant term.
  """
  if documents is None:
    return {}
  inputs = dict(codes=documents.codes_B1T)
  return (
    inputs | dict(past=documents.past_B1T) if past and launch.c0 else inputs
  )


def unbroken_slices(
  documents: Documents | None, launch: Launch
) -> Array | None:
  """Whether a slice has no document boundary, (slices, B); None: none has one.

  A boundary between a slice and the slice before it counts for the former.
  """
  if documents is None:
    return None
  begins_S = jnp.arange(launch.slices) * launch.chunks
  ends_S = jnp.minimum(begins_S + launch.chunks, launch.total_chunks) - 1
  before_BS = documents.before_BN[:, begins_S]
  return (before_BS == documents.after_BN[:, ends_S]).T


def last_document_tokens(runs_BT: Array | None, launch: Launch) -> Array:
  """Count the tokens of each row's last document, (B, H) float32."""
  B, T, H = launch.B, launch.T, launch.H
  if runs_BT is None:
    return jnp.full((B, H), T, jnp.float32)
  count_B = (runs_BT == runs_BT[:, -1:]).sum(axis=1).astype(jnp.float32)
  return jnp.broadcast_to(count_B[:, None], (B, H))


# In the kernels.


def codes(work: Work, slot, layout=FIRST_AXIS, some=slice(None)):
  """Load the codes of a chunk's tokens, or of some of them."""
  ref = work.inputs["codes"].at[slot]
  return plgpu.load(ref if some == slice(None) else ref.at[some], layout=layout)


def mask(work: Work, slot, bit: int, x):
  """Set x to 0 for the tokens whose code lacks a bit.

  Args:
    work: the work of the warpgroup.
    slot: the stage that holds the chunk's inputs.
    bit: OF_STATE_BEFORE or OF_STATE_AFTER.
    x: (C,) or (C, ·), one value or line of values for each token.
  """
  if not work.launch.segments:
    return x
  mine = (codes(work, slot) & bit) == bit
  mine = jnp.where(mine, 1, 0)  # integers, because booleans do not broadcast
  if x.ndim == 1:
    return jnp.where(mine == 1, x, jnp.zeros_like(x))
  return jnp.where(columns(mine, x.shape[1]) == 1, x, jnp.zeros_like(x))


def causal_mask(work: Work, slot, start: int, width: int, *, query_axis: int):
  """Whether a query attends to a key of its chunk, for some columns of scores.

  Args:
    work: the work of the warpgroup.
    slot: the stage that holds the chunk's inputs.
    start: the first column.
    width: the number of columns.
    query_axis: 0 where the scores are [query, key], 1 where [key, query].
  """
  line, column = iota((C, width), 0), iota((C, width), 1) + start
  seen = line >= column if query_axis == 0 else column >= line
  if not work.launch.segments:
    return seen
  run_C = codes(work, slot) >> 2
  run_W = codes(work, slot, SECOND_AXIS, pl.ds(start, width)) >> 2
  same = columns(run_C, width) == lax.broadcast_in_dim(run_W, (C, width), [1])
  return seen & same


def past_tokens(work: Work, chunk, slot):
  """Count the tokens that the state before a chunk sums.

  A scalar where the row is one document; else (C,), by the document of each
  query.
  """
  if not work.launch.segments:
    earlier = ((chunk - work.here.first_chunk) * C).astype(f32)
    return work.initial_count + earlier
  earlier = plgpu.load(work.inputs["past"].at[slot], layout=FIRST_AXIS)
  first_run = (codes(work, slot) >> 2) == 0
  return earlier + jnp.where(first_run, work.initial_count, 0.0)


def load_masked(work: Work, slot, bit: int, x_name: str, values_name: str):
  """Load the queries or keys that are added to the state.

  Where rows hold several documents, this writes masked copies of x and of the
  values to shared memory, where `summed_tiles` finds them.

  Args:
    work: the work of the warpgroup.
    slot: the stage that holds the chunk's inputs.
    bit: the tokens whose code lacks it become 0.
    x_name: the input of queries or keys.
    values_name: the input of do or v.

  Returns:
    x (C, PART) in registers, and the same in shared memory.
  """
  x, launch, shared = load(work, slot, x_name), work.launch, work.shared
  if not launch.segments:
    return x, read(work, slot, x_name)
  values = load(work, slot, values_name)
  x = mask(work, slot, bit, x)
  store(shared.x, ..., operand(launch, x))
  values = mask(work, slot, bit, values)
  store(shared.values, ..., operand(launch, values))
  plgpu.commit_smem()
  return x, shared.x


def summed_tiles(work: Work, slot, x_name: str, values_name: str):
  """Select the tiles of x and of the values that a chunk adds to the state."""
  if work.launch.segments:
    return work.shared.x, work.shared.values
  return read(work, slot, x_name), read(work, slot, values_name)
