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
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial import gpu_common as common
from pallas_kernels.polynomial.gpu_common import LAYOUT, C, F, V, bf16, f32

WARPGROUPS = 4  # of a program: 128 registers a thread


class Shared(NamedTuple):
  """What a walk holds in shared memory, for one head of the program."""

  phi: Any  # (C, E)
  wide: Any  # (C, V): k̃ or dz q̃, with zeros behind it
  kv: Any  # (V, E)
  kk: Any  # (hi and lo, V, F)
  full: Any  # barriers: a stage's copies are there
  ready: Any
  read: Any
  done: Any


class Place(NamedTuple):
  """Where a warpgroup stands."""

  p: Any  # which of the program's heads
  s: Any
  b: Any
  h: Any
  first: Any  # chunk of the slice
  chunks: Any  # of the slice

  @property
  def at(self):
    return self.s, self.b, self.h


class Parts(NamedTuple):
  """A kernel's own parts, of (chunk, slot of its inputs)."""

  features: Callable  # writes phi and wide
  update: Callable  # → (x_s, values_s) whose products the state sums
  through_state: Callable | None = None  # → part
  within: Callable | None = None  # (chunk, slot, part) writes the outputs


def heads(*, alone: bool) -> int:
  """Heads of a program; `alone` without outputs."""
  return WARPGROUPS if alone else WARPGROUPS // 2


def scratch(
  call: common.Call, streams: dict[str, int], rows=(), *, alone: bool = False
) -> dict:
  """Shared memory of a program: the inputs' stages, rolls and `Shared`.

  Args:
    call: the launch.
    streams: widths of the (B, T, H, ·) inputs, by name.
    rows: names of the (B, H, T) inputs.
    alone: whether the state alone is wanted.
  """
  stages, N = call.stages, heads(alone=alone)
  inputs = {
    name: common.smem(N, stages, C, width) for name, width in streams.items()
  }
  for name in rows:
    inputs[name] = plgpu.SMEM((N, stages, C), f32)
  barrier = plgpu.Barrier(num_arrivals=1, num_barriers=N)
  shared = Shared(
    phi=common.smem(N, C, call.E),
    wide=common.smem(N, C, V),
    kv=common.smem(N, V, call.E),
    kk=common.smem(N, 2, V, F),
    full=plgpu.Barrier(num_arrivals=len(inputs), num_barriers=N * stages),
    ready=barrier,
    read=barrier,
    done=barrier,
  )
  if alone:
    unused = plgpu.SMEM((1,), f32)
    shared = shared._replace(kv=unused, kk=unused)
  return inputs | dict(
    shared=shared,
    rolls=common.smem(F, common.CYCLIC * F),
    once=plgpu.Barrier(num_arrivals=1, num_barriers=1),
  )


def launch(
  body, call: common.Call, name: str, *, out, scratch, alone: bool = False
):
  """The kernel: grid (slices, groups of B · H)."""
  return plgpu.kernel(
    body,
    out_type=out,
    scratch_types=scratch,
    compiler_params=common.compiler_params(),
    kernel_name=name,
    grid=(call.slices, -(-call.B * call.H // heads(alone=alone))),
    grid_names=("s", "n"),
    num_threads=WARPGROUPS,
    thread_name="w",
  )


def walk(
  call: common.Call,
  parts_of: Callable,
  streams,
  rows,
  shared: Shared,
  rolls,
  *,
  states=None,
  after=None,
  left: bool = False,
) -> None:
  """Runs a program.

  Args:
    call: the launch.
    parts_of: (place, shared of its head, inputs of its head, count) → `Parts`.
    streams: pairs of a (B, T, H, ·) array and its stages.
    rows: pairs of a (B, H, T) array and its stages.
    shared: of the program.
    rolls: the array Π, its place in shared memory and its barrier.
    states: arrays of the state before the slices, KVᵀ, KK and perhaps the
      count of tokens; None for 0.
    after: arrays for the state behind the slices, or None.
    left: whether to walk from the end.
  """
  w = lax.axis_index("w")
  alone = shared.kv.shape == (1,)
  p = w if alone else lax.div(w, 2)
  n = lax.axis_index("n") * heads(alone=alone) + p

  @pl.when(w == 0)
  def _():
    plgpu.copy_gmem_to_smem(rolls[0], rolls[1], rolls[2].at[0])

  def run(role: Callable) -> None:
    s = lax.axis_index("s")
    first = s * call.chunks
    chunks = jnp.minimum(call.chunks, call.total - first)
    here = Place(p, s, lax.div(n, call.H), lax.rem(n, call.H), first, chunks)
    order = lambda i: first + (chunks - 1 - i if left else i)
    mine = _of_head(shared, p, call.stages)
    fetch = functools.partial(_fetch, here, streams, rows, shared, call)
    inputs = [buffer.at[p] for _, buffer in (*streams, *rows)]
    count = jnp.zeros((), f32)
    if states is not None and len(states) == 3:
      count = states[2][here.at]
    parts = parts_of(here, mine, inputs, count)
    plgpu.barrier_wait(rolls[2].at[0])
    role(call, parts, here, mine, order, fetch)

  keep_state = functools.partial(_state, before=states, after=after)
  exists = n < call.B * call.H
  if alone:
    pl.when(exists)(lambda: run(keep_state))
  else:
    output = lax.rem(w, 2) == 1
    pl.when(exists & ~output)(lambda: run(keep_state))
    pl.when(exists & output)(lambda: run(_output))


def _of_head(shared: Shared, p, stages: int) -> Shared:
  barriers = ("full", "ready", "read", "done")
  if shared.kv.shape == (1,):
    barriers += ("kv", "kk")
  tiles = {
    name: getattr(shared, name).at[p]
    for name in Shared._fields
    if name not in barriers
  }
  return shared._replace(**tiles)


def _output(call, parts: Parts, here: Place, shared: Shared, order, fetch):
  """The warpgroup that writes the outputs; it fetches for both."""
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
    part = parts.through_state(*at)
    plgpu.barrier_wait(shared.ready.at[p])
    plgpu.barrier_arrive(shared.read.at[p])
    parts.within(*at, part)
    return ()

  lax.fori_loop(0, here.chunks, step, ())
  plgpu.wait_smem_to_gmem(0)


def _state(
  call, parts: Parts, here: Place, shared: Shared, order, fetch, *, before,
  after,
):  # fmt: skip
  """The warpgroup that keeps the state."""
  p, stages, alone = here.p, call.stages, parts.within is None
  shared.wide[...] = common.zeros((C, V), bf16)
  plgpu.commit_smem()
  state = _load(before, here, call)
  if alone:
    for i in range(stages):
      pl.when(i < here.chunks)(functools.partial(fetch, order(i), i))
  else:
    _show(shared, *state)
    plgpu.barrier_arrive(shared.done.at[p])

  def step(i, state):
    slot = lax.rem(i, stages)
    at = order(i), slot
    plgpu.barrier_wait(shared.full.at[p * stages + slot])
    parts.features(*at)
    plgpu.commit_smem()
    if not alone:
      plgpu.barrier_arrive(shared.ready.at[p])
    state = _update(state, *parts.update(*at), shared)
    if alone:
      plgpu.commit_smem()  # the update has read its chunk and features
      ahead = i + stages
      pl.when(ahead < here.chunks)(lambda: fetch(order(ahead), slot))
      return state
    plgpu.barrier_wait(shared.read.at[p])
    _show(shared, *state)
    plgpu.barrier_arrive(shared.done.at[p])
    return state

  kv, kk = lax.fori_loop(0, here.chunks, step, state)
  if after is not None:
    after[0][here.at] = kv
    after[1][here.at] = kk


def _load(refs, here: Place, call: common.Call):
  """(KVᵀ, KK) in registers."""
  if refs is None:
    return common.zeros((V, call.E)), common.zeros((V, F))
  load = functools.partial(plgpu.load, layout=LAYOUT, optimized=False)
  return load(refs[0].at[here.at]), load(refs[1].at[here.at])


def _show(shared: Shared, kv, kk) -> None:
  shared.kv[...] = kv.astype(bf16)
  common.store_split(shared.kk, kk)
  plgpu.commit_smem()


def _update(state, x_s, values_s, shared: Shared):
  """KK += [k̃ …]ᵀ k and KVᵀ += vᵀ features, on the tensor core."""

  def run(refs):
    kv, kk = refs
    plgpu.wgmma(kk, shared.wide.transpose((1, 0)), x_s)
    plgpu.wgmma(kv, values_s.transpose((1, 0)), shared.phi)

  return pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in state))


def _fetch(here: Place, streams, rows, shared: Shared, call, chunk, slot):
  """Starts the copies of one chunk; TMA fills what is beyond T with 0."""
  p, b, h = here.p, here.b, here.h
  barrier = shared.full.at[p * call.stages + slot]
  for ref, buffer in streams:
    width = buffer.shape[-1]
    # Not a plain 0: TMA fills what is beyond the width, but a slice that is
    # static and too wide is refused.
    start = 0 if width == ref.shape[-1] else b * 0
    source = ref.at[b, pl.ds(chunk * C, C), h, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(source, buffer.at[p, slot], barrier)
  for ref, buffer in rows:
    source = ref.at[b, h, pl.ds(chunk * C, C)]
    plgpu.copy_gmem_to_smem(source, buffer.at[p, slot], barrier)


def state_shapes(call: common.Call) -> list:
  """Of the states of all slices."""
  at = (call.slices, call.B, call.H, V)
  return [
    jax.ShapeDtypeStruct((*at, call.E), f32),
    jax.ShapeDtypeStruct((*at, F), f32),
  ]
