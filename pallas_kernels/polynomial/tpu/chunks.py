"""How a TPU kernel walks the chunks of its block, and keeps the state."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu.call import SUBLANES, Call
from pallas_kernels.polynomial.tpu.launch import Refs, time_block
from pallas_kernels.polynomial.tpu.masks import Masks, zero_outside

# What a chunk adds to KV, a sum for each group of features, and to KK.
StateSums = tuple[list[Array], Array]


def for_each_chunk(
  work: Callable[[int, Any, Any], Iterator[None]],
  call: Call,
  *,
  reverse: bool = False,
) -> None:
  """Run `work(head, lanes, position)` for each head and chunk of the block.

  `work` is a generator, and the code between two yields is a stage. The stages
  of different chunks are interleaved, but each stage runs for one chunk after
  another in order of time. The code that reads or writes the state must
  therefore stand in the same stage of every chunk.

  Args:
    work: takes the head, the chunk's lanes in the block, and the position in
      the row of the chunk's first token.
    call: the launch.
    reverse: whether chunks, and blocks, run from the end of the row.
  """
  step = pl.program_id(2)
  first = time_block(call, reverse=reverse)(step) * call.block

  def span(i, carry):
    start = (call.block // call.span - 1 - i if reverse else i) * call.span
    offsets = range(0, call.span, call.chunk)
    chunks = []
    for offset in reversed(offsets) if reverse else offsets:
      for head in range(call.heads):
        lane = start + offset
        chunks.append(work(head, _lanes(lane, call), first + lane))
    _interleave(chunks)
    return carry

  if call.span == call.block:
    span(0, None)
  else:
    jax.lax.fori_loop(0, call.block // call.span, span, None)


def _interleave(chunks: list[Iterator[None]]) -> None:
  """Run the stages of all chunks, each chunk one stage later than the previous.

  The compiler stays near the order of the program. So the first products of a
  chunk stand before the last sums of the previous chunk, and fill the time in
  which those sums wait for results.
  """
  running: list[Iterator[None]] = []
  while chunks or running:
    running = chunks[:1] + running
    chunks = chunks[1:]
    running = [chunk for chunk in running if _run_stage(chunk)]


def _run_stage(chunk: Iterator[None]) -> bool:
  """Run the next stage of a chunk; return whether more stages follow."""
  try:
    next(chunk)
  except StopIteration:
    return False
  return True


def _lanes(start: Any, call: Call) -> Any:
  """Return the lanes of the chunk that starts at a lane of the block."""
  if not isinstance(start, int):
    start = pl.multiple_of(start, call.chunk)
  return pl.ds(start, call.chunk)


def load(
  ref: Any, head: int, rows: int, lanes: Any, mask_1C: Array | None = None
) -> Array:
  """Load a head's rows of a chunk, padded with zeros to whole tiles.

  Args:
    ref: a block of `token_spec`.
    head: of the step's heads.
    rows: rows of a head in the block.
    lanes: the chunk's lanes.
    mask_1C: tokens to keep; the others are 0. None keeps all.
  """
  x = ref[pl.ds(head * rows, rows), lanes]
  if rows % SUBLANES:
    zeros = jnp.zeros((-rows % SUBLANES, x.shape[1]), jnp.float32)
    x = jnp.concatenate([x.astype(jnp.float32), zeros])
  return zero_outside(mask_1C, x).astype(ref.dtype)


def store(ref: Any, head: int, rows: int, lanes: Any, x: Array) -> None:
  """Store a head's rows of a chunk, without the padding of `load`."""
  ref[pl.ds(head * rows, rows), lanes] = x[:rows].astype(ref.dtype)


def start_state(refs: Refs) -> None:
  """At a row's first step, set the state in VMEM to the initial one or to 0."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    for name in ("kv", "kk"):
      ref, initial = refs[name], refs.get(f"initial_{name}")
      ref[...] = jnp.zeros_like(ref) if initial is None else initial[...]


def finish_state(refs: Refs, call: Call) -> None:
  """At a row's last step, write the state out, if the call returns it."""
  if "final_kv" not in refs:
    return

  @pl.when(pl.program_id(2) == call.steps - 1)
  def _():
    for name in ("kv", "kk"):
      refs[f"final_{name}"][...] = refs[name][...]


def add_to_state(
  sums: StateSums,
  kv_ref: Any,
  kk_ref: Any,
  masks: Masks,
  call: Call,
  *,
  by_feature: bool,
) -> None:
  """Add the sums of a chunk to the state, which is 0 first for a new document.

  Args:
    sums: what the chunk adds.
    kv_ref: (E, V) `by_feature`, else (V, E).
    kk_ref: (G, G).
    masks: the chunk's masks.
    call: the launch.
    by_feature: whether features are the rows of `kv_ref`.
  """
  new_kv, new_kk_GG = sums
  for group, new in zip(call.groups(), new_kv, strict=True):
    at = (group.rows, slice(None)) if by_feature else (slice(None), group.rows)
    kv_ref[at] = zero_outside(masks.joined_11, kv_ref[at]) + new
  kk_ref[...] = zero_outside(masks.joined_11, kk_ref[...]) + new_kk_GG
