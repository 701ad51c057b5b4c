"""Rows of several documents, for the Hopper kernels.

A token has a code, 4 run + 2 last + first: `first` and `last` say whether it is
of the document that the state before its chunk is of, and the state behind it.
A document's Inf or NaN stays out of other documents' states; within a chunk of
64 tokens it may reach those that share it.
"""

from typing import NamedTuple

from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import documents as documents_lib
from pallas_kernels.polynomial.gpu.tiles import (
  COLUMNS,
  LAYOUT,
  ROWS,
  C,
  Call,
  Work,
  columns,
  f32,
  iota,
)

FIRST, LAST = 1, 2  # bits of a token's code


class Documents(NamedTuple):
  """Of rows of several documents; all None where each row is one."""

  codes_B1T: Array | None  # of the tokens, filled up to chunks
  past_B1T: Array | None  # of the token's document, before its chunk
  before_BN: Array | None  # the run before each chunk
  last_BN: Array | None  # the run of each chunk's last token
  all_B: Array | None  # the row is one document
  first_B1T: Array | None  # the token is in the row's first document

  def rows(self, call: Call, *, past: bool = False) -> dict[str, Array]:
    if self.codes_B1T is None:
      return {}
    rows = dict(codes=self.codes_B1T)
    return rows | dict(past=self.past_B1T) if past and call.c0 else rows

  def whole(self, call: Call) -> Array | None:
    """(slices, B): the document before a slice is the one behind it."""
    if self.codes_B1T is None:
      return None
    begins_S = jnp.arange(call.slices) * call.chunks
    ends_S = jnp.minimum(begins_S + call.chunks, call.total) - 1
    return (self.before_BN[:, begins_S] == self.last_BN[:, ends_S]).T


def of_rows(runs_BT: Array | None, call: Call) -> Documents:
  if runs_BT is None:
    return Documents(*[None] * 6)
  B, T = runs_BT.shape
  pad = lambda x, value: jnp.pad(
    x, ((0, 0), (0, call.total * C - T)), constant_values=value
  )
  # Of each chunk: the run before it, of its last token, and what is past.
  last_BN = runs_BT[:, jnp.minimum(jnp.arange(call.total) * C + C, T) - 1]
  before_BN = jnp.pad(last_BN[:, :-1], ((0, 0), (1, 0)))
  token_T = jnp.arange(T, dtype=jnp.int32)
  each = lambda x_BN: jnp.repeat(x_BN, C, axis=1)[:, :T]
  first_BT = runs_BT == each(before_BN)
  past_BT = jnp.maximum(
    (token_T // C * C)[None] - documents_lib.document_starts(runs_BT), 0
  )
  bit = lambda value, where_BT: jnp.where(where_BT, value, 0)
  last_BT = bit(LAST, runs_BT == each(last_BN))
  code_BT = 4 * runs_BT + last_BT + bit(FIRST, first_BT)
  return Documents(
    pad(code_BT.astype(jnp.int32), 4 * 2**28)[:, None],
    pad(past_BT.astype(jnp.float32), 0.0)[:, None],
    before_BN,
    last_BN,
    runs_BT[:, -1] == 0,
    pad(runs_BT == 0, False)[:, None],
  )


def count(runs_BT: Array | None, call: Call) -> Array:
  """Tokens of the last document, (B, H) float32."""
  if runs_BT is None:
    return jnp.full((call.B, call.H), call.T, jnp.float32)
  count_B = (runs_BT == runs_BT[:, -1:]).sum(axis=1).astype(jnp.float32)
  return jnp.broadcast_to(count_B[:, None], (call.B, call.H))


# In the kernels.


def code(work: Work, slot, layout=ROWS, some=slice(None)):
  """The codes of a chunk's tokens, int32."""
  ref = work.inputs["codes"].at[slot]
  return plgpu.load(ref if some == slice(None) else ref.at[some], layout=layout)


def of_document(work: Work, slot, bit: int, x):
  """x (C, ·), and 0 in the rows that are not of the document of this bit."""
  if not work.call.segments:
    return x
  mine = (code(work, slot) & bit) == bit
  mine = jnp.where(mine, 1, 0)
  if x.ndim == 1:
    return jnp.where(mine == 1, x, jnp.zeros_like(x))
  return jnp.where(columns(mine, x.shape[1]) == 1, x, jnp.zeros_like(x))


def seen(work: Work, slot, start: int, width: int, *, queries: int):
  """Whether a query sees a key of its chunk, for some columns of the chunk.

  `queries` is the axis of the queries.
  """
  row, column = iota((C, width), 0), iota((C, width), 1) + start
  seen = row >= column if queries == 0 else column >= row
  if not work.call.segments:
    return seen
  run_C = code(work, slot) >> 2
  run_W = code(work, slot, COLUMNS, pl.ds(start, width)) >> 2
  same = columns(run_C, width) == lax.broadcast_in_dim(run_W, (C, width), [1])
  return seen & same


def past(work: Work, chunk, slot):
  """Tokens of the state before a chunk: a scalar, or (C,) by document."""
  if not work.call.segments:
    return work.count + ((chunk - work.here.first) * C).astype(f32)
  earlier = plgpu.load(work.inputs["past"].at[slot], layout=ROWS)
  first_run = (code(work, slot) >> 2) == 0
  return earlier + jnp.where(first_run, work.count, 0.0)


def own_rows(work: Work, slot, bit: int, x_name: str, values_name: str):
  """x of a chunk, (C, F), and its tile.

  Of several documents, those of the bit's: copies of x and the values, with 0
  for the others, which `summed` then gives.
  """
  x_s = work.inputs[x_name].at[slot]
  x = plgpu.load(x_s, layout=LAYOUT)
  if not work.call.segments:
    return x, x_s
  values = plgpu.load(work.inputs[values_name].at[slot], layout=LAYOUT)
  shared = work.shared
  x = of_document(work, slot, bit, x)
  shared.x[...] = x
  shared.values[...] = of_document(work, slot, bit, values)
  plgpu.commit_smem()
  return x, shared.x


def summed(work: Work, slot, x_name: str, values_name: str):
  """The tiles of x and the values that a chunk adds to the state."""
  if work.call.segments:
    return work.shared.x, work.shared.values
  return work.inputs[x_name].at[slot], work.inputs[values_name].at[slot]
