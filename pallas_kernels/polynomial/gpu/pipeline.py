"""The walk of a Hopper kernel over a slice of one head's time.

Two warpgroups share a walk, chunk by chunk:

    state   writes the features of the chunk (ready), adds it to the state,
            which it keeps in registers, and shows the new state (done)
    output  uses the state before the chunk (read), then the chunk itself,
            and writes what comes out

A program has two such pairs, each at a head of its own; where the state alone
is wanted, four `state` warpgroups. Barriers say that a part is finished. The
inputs are fetched a chunk ahead.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial.gpu import tiles as common
from pallas_kernels.polynomial.gpu.documents import FIRST, LAST
from pallas_kernels.polynomial.gpu.launch import PAIR
from pallas_kernels.polynomial.gpu.tiles import (
  LAYOUT,
  C,
  F,
  Place,
  Shared,
  V,
  Work,
  f32,
)

FEATURES = ("q", "k", "qj", "kj")  # streams of queries and keys
WARPGROUPS = 4  # of a program: 128 registers a thread
SHARED_MEMORY = 230_000  # bytes of a program, what aligns and barriers aside


class Parts(NamedTuple):
  """A kernel's own parts, of (work, chunk, slot of its inputs)."""

  features: Callable  # writes phi and wide
  update: Callable  # → (x_s, values_s) whose products the state sums
  through_state: Callable | None = None  # → part
  within: Callable | None = None  # (work, chunk, slot, part) writes the outputs


class Launch(NamedTuple):
  """What a kernel reads and writes."""

  name: str
  streams: dict  # (B, T, H, ·) arrays
  rows: dict  # (B, heads or 1, T filled up to chunks) arrays
  states: tuple = ()  # before the slices: KVᵀ, KK and perhaps the count
  outs: tuple = ()  # shapes of the outputs
  tiles: tuple = ()  # (name, shape, swizzle or None for float32) of a head
  after: bool = False  # whether to write the states behind the slices
  left: bool = False  # whether to walk from the end


def launch(call: common.Call, parts: Parts, what: Launch) -> list:
  """Runs a kernel: grid (slices, groups of heads).

  Returns:
    the outputs, and the states behind the slices where asked for.
  """
  alone = parts.within is None
  N = WARPGROUPS if alone else WARPGROUPS // 2
  scratch = _scratch(call, what, N, alone=alone)
  if _bytes(scratch) > SHARED_MEMORY:
    call = dataclasses.replace(call, stages=1)
    scratch = _scratch(call, what, N, alone=alone)
  count, M = len(what.streams) + len(what.rows), len(what.states)

  def body(*refs, inputs, tiles, shared, rolls, once, operand):
    arrays, rolls_ref, rest = refs[:count], refs[count], refs[count + 1 :]
    states, outs = rest[:M], rest[M:]
    names = (*what.streams, *what.rows)
    pairs = [(x, ref, inputs[x]) for x, ref in zip(names, arrays, strict=True)]
    w = lax.axis_index("w")
    p = w if alone else lax.div(w, 2)

    @pl.when(w == 0)
    def _():
      if not call.pairs:
        plgpu.copy_gmem_to_smem(rolls_ref, rolls, once.at[0])
        return
      for half in range(2):
        plgpu.copy_gmem_to_smem(rolls_ref.at[half], rolls.at[half], once.at[0])

    def run(role) -> None:
      here = _place(call, p, N)
      work = Work(
        call,
        here,
        _of_head(shared, p, alone=alone),
        {name: x.at[p] for name, x in inputs.items()},
        {name: x.at[p] for name, x in tiles.items()},
        outs[: len(what.outs)],
        rolls.at[here.half] if call.pairs else rolls,
        operand.at[w] if call.by_shared else None,
        states[2][here.at[:2] + (here.h,)] if M == 3 else jnp.zeros((), f32),
      )
      order = lambda i: here.first + (here.chunks - 1 - i if what.left else i)
      fetch = functools.partial(_fetch, work, pairs, shared.full, p)
      plgpu.barrier_wait(once.at[0])
      role(work, parts, order, fetch)

    keep = functools.partial(
      _state,
      before=states[:2],
      after=outs[len(what.outs) :],
      left=what.left,
    )
    exists = lax.axis_index("n") * N + p < call.B * call.heads
    if alone:
      pl.when(exists)(lambda: run(keep))
    else:
      output = lax.rem(w, 2) == 1
      pl.when(exists & ~output)(lambda: run(keep))
      pl.when(exists & output)(lambda: run(_output))

  kernel = plgpu.kernel(
    body,
    out_type=[*what.outs, *state_shapes(call) * what.after],
    scratch_types=scratch,
    compiler_params=common.compiler_params(),
    kernel_name=f"polynomial_{call.prefix}{what.name}",
    grid=(call.slices, -(-call.B * call.heads // N)),
    grid_names=("s", "n"),
    num_threads=WARPGROUPS,
    thread_name="w",
  )
  table = common.rolls()
  if call.pairs:
    halves = (range(half * PAIR, F - (1 - half) * PAIR) for half in range(2))
    table = np.stack([common.rolls(blocks) for blocks in halves])
  table = jnp.asarray(table, call.dtype)
  return kernel(
    *what.streams.values(), *what.rows.values(), table, *what.states
  )


def _scratch(call: common.Call, what: Launch, N: int, *, alone: bool) -> dict:
  """Shared memory of a program of N heads."""
  stages = call.stages
  width = lambda name: F if name in FEATURES else V
  inputs = {
    name: common.smem(call, N, stages, C, width(name)) for name in what.streams
  }
  for name, x in what.rows.items():
    inputs[name] = plgpu.SMEM((N, stages, C), x.dtype)
  barrier = plgpu.Barrier(num_arrivals=1, num_barriers=N)
  tile = functools.partial(common.smem, call, N)
  shared = Shared(
    phi=tile(C, call.E),
    wide=tile(C, V),
    kv=None if alone else tile(V, call.E),
    kk=None if alone else tile(2, V, F),
    x=tile(C, F) if call.segments else None,
    values=tile(C, V) if call.segments else None,
    full=plgpu.Barrier(num_arrivals=len(inputs), num_barriers=N * stages),
    ready=barrier,
    read=barrier,
    done=barrier,
  )
  rolls = common.smem(call, F, common.CYCLIC * F)
  if call.pairs:
    rolls = common.smem(call, 2, F, PAIR * F)
  tiles = {}
  for name, shape, swizzle in what.tiles:
    if swizzle is None:
      tiles[name] = plgpu.SMEM((N, *shape), f32)
    else:
      tiles[name] = tile(*shape, swizzle=swizzle)
  return dict(
    inputs=inputs,
    tiles=tiles,
    shared=shared,
    rolls=rolls,
    once=plgpu.Barrier(num_arrivals=1 + call.pairs, num_barriers=1),
    operand=common.smem(call, WARPGROUPS, C, F) if call.by_shared else None,
  )


def _bytes(scratch: dict) -> int:
  leaves = jax.tree.leaves(scratch, is_leaf=lambda x: hasattr(x, "dtype"))
  return sum(
    math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
    for x in leaves
    if not isinstance(x, plgpu.Barrier)
  )


def _place(call: common.Call, p, N: int) -> Place:
  s, n = lax.axis_index("s"), lax.axis_index("n") * N + p
  first = s * call.chunks
  chunks = jnp.minimum(call.chunks, call.total - first)
  b, head = lax.div(n, call.heads), lax.rem(n, call.heads)
  h, tile, part = head, None, ()
  if call.m > 1:
    h, number = lax.div(h, call.parts), lax.rem(h, call.parts)
    part = _part(call, number)
  if call.tiles > 1:
    h, tile = lax.div(h, call.tiles), lax.rem(h, call.tiles)
  return Place(p, s, b, head, h, tile, first, chunks, *part)


def _part(call: common.Call, number):
  """(i, j, half) of a head's part: pairs (0, 1), (0, 2), …, (1, 2), …"""
  if not call.pairs:
    return number, number, 0
  pair, half = lax.div(number, 2), lax.rem(number, 2)
  i, j, start = 0, pair + 1, 0
  for row in range(1, call.m - 1):
    start += call.m - row
    later = pair >= start
    i = i + jnp.where(later, 1, 0)
    j = j + jnp.where(later, 1 + row - call.m, 0)
  return i, j, half


def _of_head(shared: Shared, p, *, alone: bool) -> Shared:
  tiles = ("phi", "wide", "x", "values") + (() if alone else ("kv", "kk"))
  mine = {name: getattr(shared, name) for name in tiles}
  return shared._replace(
    **{name: x.at[p] for name, x in mine.items() if x is not None}
  )


def _output(work: Work, parts: Parts, order, fetch) -> None:
  """The warpgroup that writes the outputs; it fetches for both."""
  call, here, shared = work.call, work.here, work.shared
  p, stages = here.p, call.stages
  for i in range(stages):
    pl.when(i < here.chunks)(functools.partial(fetch, order(i), i))

  def step(i, _):
    slot = lax.rem(i, stages)
    at = order(i), slot
    plgpu.barrier_wait(shared.done.at[p])
    ahead = i - 1 + stages
    pl.when((i > 0) & (ahead < here.chunks))(
      lambda: fetch(order(ahead), lax.rem(ahead, stages))
    )
    plgpu.barrier_wait(shared.full.at[p * stages + slot])
    part = parts.through_state(work, *at)
    plgpu.barrier_wait(shared.ready.at[p])
    plgpu.barrier_arrive(shared.read.at[p])
    parts.within(work, *at, part)
    return ()

  lax.fori_loop(0, here.chunks, step, ())
  plgpu.wait_smem_to_gmem(0)


def _state(
  work: Work, parts: Parts, order, fetch, *, before, after, left: bool
) -> None:
  """The warpgroup that keeps the state."""
  call, here, shared = work.call, work.here, work.shared
  p, stages, alone = here.p, call.stages, parts.within is None
  shrink = 1.0 if left else call.shrink
  shared.wide[...] = common.zeros((C, V), call.dtype)
  plgpu.commit_smem()
  state = _load(before, here, call, left=left)
  if alone:
    for i in range(stages):
      pl.when(i < here.chunks)(functools.partial(fetch, order(i), i))
  else:
    _show(shared, *state, shrink)
    plgpu.barrier_arrive(shared.done.at[p])

  def step(i, state):
    slot = lax.rem(i, stages)
    at = order(i), slot
    plgpu.barrier_wait(shared.full.at[p * stages + slot])
    parts.features(work, *at)
    plgpu.commit_smem()
    if not alone:
      plgpu.barrier_arrive(shared.ready.at[p])
    state = _update(work, _kept(work, slot, state), *parts.update(work, slot))
    if alone:
      plgpu.commit_smem()  # the update has read its chunk and features
      ahead = i + stages
      pl.when(ahead < here.chunks)(lambda: fetch(order(ahead), slot))
      return state
    plgpu.barrier_wait(shared.read.at[p])
    _show(shared, *state, shrink)
    plgpu.barrier_arrive(shared.done.at[p])
    return state

  kv, kk = lax.fori_loop(0, here.chunks, step, state)
  if after:
    after[0][here.at] = kv
    after[1][here.at] = kk


def _load(refs, here: Place, call: common.Call, *, left: bool):
  """(KVᵀ, KK) in registers.

  Arrays of all borders have one more than there are slices.
  """
  if not refs:
    return common.zeros((V, call.E)), common.zeros((V, F))
  behind = refs[0].shape[0] - call.slices if left else 0
  at = (here.s + behind, *here.at[1:])
  load = functools.partial(plgpu.load, layout=LAYOUT, optimized=False)
  return load(refs[0].at[at]), load(refs[1].at[at])


def _kept(work: Work, slot, state):
  """The state, or zeros where a document begins or ends in the chunk."""
  if not work.call.segments:
    return state
  both = FIRST | LAST
  joined = (work.inputs["codes"][slot, 0] & both) == both
  return tuple(jnp.where(joined, x, jnp.zeros_like(x)) for x in state)


def _show(shared: Shared, kv, kk, shrink: float) -> None:
  shared.kv[...] = common.times(kv, shrink).astype(shared.kv.dtype)
  common.store_split(shared.kk, common.times(kk, shrink))
  plgpu.commit_smem()


def _update(work: Work, state, x_s, values_s):
  """KVᵀ += vᵀ features and KK += [k̃ …]ᵀ k, on the tensor core."""
  kv, kk = state
  wide, phi = work.shared.wide, work.shared.phi
  return tuple(
    common.add_mmas(
      work,
      (kv, (values_s.transpose((1, 0)), phi)),
      (kk, (wide.transpose((1, 0)), x_s)),
    )
  )


def _fetch(work: Work, pairs, full, p, chunk, slot) -> None:
  """Starts the copies of one chunk; TMA fills what is beyond T with 0."""
  call, here = work.call, work.here
  b, barrier = here.b, full.at[p * call.stages + slot]
  for name, ref, buffer in pairs:
    tokens, target = pl.ds(chunk * C, C), buffer.at[p, slot]
    if len(ref.shape) == 3:
      row = 0 if ref.shape[1] == 1 else here.head
      if call.m > 1 and ref.shape[1] > 1:
        row = lax.div(row, call.parts)
      source = ref.at[b, row, tokens]
    else:
      width = buffer.shape[-1]
      # Not a plain 0: TMA fills what is beyond the width, but a slice that is
      # static and too wide is refused.
      start = 0 if width == ref.shape[-1] else b * 0
      if width == V and here.tile is not None:
        start = here.tile * V
      if call.m > 1 and name in FEATURES:
        start = (here.j if name.endswith("j") else here.i) * F
      source = ref.at[b, tokens, here.h, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(source, target, barrier)


def state_shapes(call: common.Call) -> list:
  """Of the states of all slices."""
  at = (call.slices, call.B, call.heads, V)
  return [
    jax.ShapeDtypeStruct((*at, call.E), f32),
    jax.ShapeDtypeStruct((*at, F), f32),
  ]
