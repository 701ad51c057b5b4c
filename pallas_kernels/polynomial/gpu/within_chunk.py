"""Hopper kernels that finish what the parts of wide features began.

A chunk's own tokens are added to the sums that reach it through the parts'
states (`gpu_parts.py`), with scores of all features, and the results written.
There is no state: a warpgroup does a chunk of a head, and all its values.
"""

import functools

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import documents, tiles as common
from pallas_kernels.polynomial.gpu.launch import C, Call, F, V, pairs_of
from pallas_kernels.polynomial.gpu.tiles import (
  COLUMNS,
  LAYOUT,
  ROWS,
  Place,
  Work,
  add_mma,
  columns,
  f32,
  mma,
  mmas,
  times,
)

HEADS = 2  # warpgroups of a program: 255 registers a thread


def forward(q, k, v, rows, sums, m: int, call: Call) -> list:
  """o (B, T, H, P).

  Args:
    q, k: (B, T, H, m · 16); v: (B, T, H, P).
    rows: z, Σ sim' through the states, (B, H, T filled up); and codes.
    sums: Σ sim' v of the parts (i, i) and of the pairs, as `gpu_parts.py` has
      them.
    m: parts of q and k.
    call: the call as a whole.
  """
  streams = _features(m, q=q, k=k) | _values(call, v=v)
  out = jax.ShapeDtypeStruct((call.B, call.rows, call.H, call.P), call.dtype)
  tiles = (common.values_tile("o", call),)
  role = functools.partial(_forward, m=m)
  return _launch("forward", role, streams, rows, sums, [out], tiles, call)


def backward_queries(q, k, v, do, rows, sums, m: int, call: Call) -> list:
  """dq (B, T, H, m · 16); r and dz, (B, H, T filled up).

  Args:
    rows: z and num through the states, and codes.
    sums: dnum and dden of the parts (i, i), then dnum of i and j and dden of i
      and j of the pairs.
  """
  streams = _features(m, q=q, k=k) | _values(call, v=v, do=do)
  across = jax.ShapeDtypeStruct((call.B, call.H, call.total * C), f32)
  shape = (call.B, call.rows, call.H, m * F)
  outs = [jax.ShapeDtypeStruct(shape, call.dtype), across, across]
  tiles = (("dq", (C, F), common.SWIZZLE_32), ("rows", (2, C), None))
  role = functools.partial(_queries, m=m)
  return _launch("queries", role, streams, rows, sums, outs, tiles, call)


def backward_keys(q, k, v, do, rows, sums, m: int, call: Call) -> list:
  """dk (B, T, H, m · 16) and dv (B, T, H, P).

  Args:
    rows: r and dz, (B, H, T filled up), and codes.
    sums: dk and dv of the parts (i, i), then dk of i and of j and dv of the
      pairs.
  """
  streams = _features(m, q=q, k=k) | _values(call, v=v, do=do)
  at = call.B, call.rows, call.H
  outs = [jax.ShapeDtypeStruct((*at, x), call.dtype) for x in (m * F, call.P)]
  tiles = (
    ("dk", (C, F), common.SWIZZLE_32),
    common.values_tile("dv", call),
  )
  role = functools.partial(_keys, m=m)
  return _launch("keys", role, streams, rows, sums, outs, tiles, call)


def _features(m: int, **arrays) -> dict:
  """Streams by name: an array, where its columns begin, and how many."""
  return {
    f"{name}{i}": (x, i * F, F) for name, x in arrays.items() for i in range(m)
  }


def _values(call: Call, **arrays) -> dict:
  return {
    f"{name}{t}": (x, t * V, V)
    for name, x in arrays.items()
    for t in range(call.tiles)
  }


def _launch(name, role, streams, rows, sums, outs, tiles, call: Call) -> list:
  """Grid (chunks, groups of heads); role(work, chunk, sums)."""
  arrays = [x for x, _, _ in streams.values()] + list(rows.values())
  smem = functools.partial(common.smem, call, HEADS)
  inputs = {x: smem(1, C, width) for x, (_, _, width) in streams.items()}
  for x, row in rows.items():
    inputs[x] = plgpu.SMEM((HEADS, 1, C), row.dtype)
  buffers = {
    x: plgpu.SMEM((HEADS, *shape), f32)
    if swizzle is None
    else smem(*shape, swizzle=swizzle)
    for x, shape, swizzle in tiles
  }

  def body(*refs, inputs, tiles, full, operand):
    first, last = len(arrays), len(arrays) + len(sums)
    sources, parts, outs = refs[:first], refs[first:last], refs[last:]
    w = lax.axis_index("w")
    n, chunk = lax.axis_index("n") * HEADS + w, lax.axis_index("s")
    b, h = lax.div(n, call.H), lax.rem(n, call.H)

    @pl.when(n < call.B * call.H)
    def _():
      work = Work(
        call,
        Place(w, 0, b, h, h, None, chunk, 1),
        None,
        {x: buffer.at[w] for x, buffer in inputs.items()},
        {x: buffer.at[w] for x, buffer in tiles.items()},
        outs,
        None,
        operand.at[w] if call.by_shared else None,
        None,
      )
      _fetch(work, streams, rows, sources, full.at[w], chunk)
      plgpu.barrier_wait(full.at[w])
      role(work, chunk, parts)
      plgpu.wait_smem_to_gmem(0)

  operand = common.smem(call, HEADS, C, F) if call.by_shared else None
  kernel = plgpu.kernel(
    body,
    out_type=outs,
    scratch_types=dict(
      inputs=inputs,
      tiles=buffers,
      full=plgpu.Barrier(num_arrivals=len(inputs), num_barriers=HEADS),
      operand=operand,
    ),
    compiler_params=common.compiler_params(),
    kernel_name=f"polynomial_chunk_{name}",
    grid=(call.total, -(-call.B * call.H // HEADS)),
    grid_names=("s", "n"),
    num_threads=HEADS,
    thread_name="w",
  )
  return kernel(*arrays, *sums)


def _fetch(work: Work, streams, rows, sources, barrier, chunk) -> None:
  """Starts the copies of a chunk; TMA fills what is beyond T or P with 0."""
  here, tokens = work.here, pl.ds(chunk * C, C)
  for name, ref in zip((*streams, *rows), sources, strict=True):
    if name in rows:
      source = ref.at[here.b, 0 if ref.shape[1] == 1 else here.h, tokens]
    else:
      _, start, width = streams[name]
      if width > F and ref.shape[-1] != width:
        start = here.b * 0 + start  # a static slice that is too wide is refused
      source = ref.at[here.b, tokens, here.h, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(source, work.inputs[name].at[0], barrier)


def _stream(work: Work, name: str, count: int) -> list:
  return [work.inputs[f"{name}{n}"].at[0] for n in range(count)]


def _inner(xs: list, ys: list) -> tuple:
  """The product that is Σ x yᵀ over the parts, for `mmas`."""
  pairs = [(x, y.transpose((1, 0))) for x, y in zip(xs, ys, strict=True)]
  return ((C, C), *pairs)


def _row(work: Work, name: str, layout=ROWS):
  return plgpu.load(work.inputs[name].at[0], layout=layout)


def _seen(work: Work, queries: int):
  return documents.seen(work, 0, 0, C, queries=queries)


def _sum(work: Work, chunk, terms):
  """Σ of the parts' sums at this chunk; terms: (array, number of the head)."""
  total, tokens = None, pl.ds(chunk * C, C)
  for ref, head in terms:
    source = ref.at[work.here.b, head, tokens]
    x = plgpu.load(source, layout=LAYOUT, optimized=False)
    total = x if total is None else total + x
  return total


def _all_parts(work: Work, refs, m: int, tile: int) -> list:
  """The terms of a tile of values: all parts of both kinds."""
  at = work.here.h * work.call.tiles + tile
  counts = m, m * (m - 1)
  return [
    (ref, at * count + n)
    for ref, count in zip(refs, counts, strict=True)
    for n in range(count)
  ]


def _of_part(work: Work, refs, m: int, i: int, tiles: int) -> list:
  """The terms of x_i, in this many tiles; refs: of (i, i), of i, of j."""
  own, of_i, of_j = refs
  terms = []
  for tile in range(tiles):
    at = work.here.h * work.call.tiles + tile
    terms.append((own, at * m + i))
    for n, (first, second) in enumerate(pairs_of(m)):
      ref = of_i if first == i else of_j if second == i else None
      if ref is not None:
        start = at * (m * (m - 1)) + 2 * n
        terms += [(ref, start), (ref, start + 1)]
  return terms


def _store(work: Work, name: str, x, target) -> None:
  tile = work.tiles[name]
  plgpu.wait_smem_to_gmem(0)
  tile[...] = x.astype(tile.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile, target)


def _feature_target(work: Work, ref, chunk, i: int):
  here = work.here
  return ref.at[here.b, pl.ds(chunk * C, C), here.h, pl.ds(i * F, F)]


def _value_target(work: Work, ref, chunk, tile: int):
  here, tiles = work.here, work.call.tiles
  here = here._replace(tile=here.b * 0 + tile if tiles > 1 else None)
  return common.values_at(work._replace(here=here), ref, chunk)


def _forward(work: Work, chunk, sums, *, m: int) -> None:
  call = work.call
  (a,) = mmas(work, _inner(_stream(work, "q", m), _stream(work, "k", m)))
  sim = jnp.where(_seen(work, 0), common.polynomial(a, call), 0.0)
  r = 1.0 / (_row(work, "z") + sim.sum(axis=1) + call.eps)
  low = sim.astype(call.dtype)
  for tile, v_s in enumerate(_stream(work, "v", call.tiles)):
    num = _sum(work, chunk, _all_parts(work, sums, m, tile))
    num = add_mma(work, num, (low, v_s.at[:, pl.ds(0, call.width)]))
    o = num * columns(r, call.width)
    _store(work, "o", o, _value_target(work, work.outs[0], chunk, tile))


def _queries(work: Work, chunk, sums, *, m: int) -> None:
  call, here = work.call, work.here
  ks = _stream(work, "k", m)
  do, v = (_stream(work, name, call.tiles) for name in ("do", "v"))
  a, dsim = mmas(work, _inner(_stream(work, "q", m), ks), _inner(do, v))
  seen = _seen(work, 0)
  sim = jnp.where(seen, common.polynomial(a, call), 0.0)
  z = _row(work, "z") + sim.sum(axis=1)
  num = _row(work, "num") + (sim * dsim).sum(axis=1)
  r = 1.0 / (z + call.eps)
  dz = -(num * r) * r
  # r and dz are known before this is rounded, as in `gpu_backward.py`.
  da = (columns(r, C) * dsim + columns(dz, C)) * common.derivative(a, call)
  da = jnp.where(seen, da, 0.0).astype(call.dtype)
  dnums, ddens = (sums[0], sums[2], sums[3]), (sums[1], sums[4], sums[5])
  for i, k_s in enumerate(ks):
    dnum = _sum(work, chunk, _of_part(work, dnums, m, i, call.tiles))
    dden = _sum(work, chunk, _of_part(work, ddens, m, i, 1))
    dq = columns(r, F) * dnum + columns(dz, F) * dden
    dq = add_mma(work, dq, (da, k_s))
    _store(work, "dq", dq, _feature_target(work, work.outs[0], chunk, i))
  row = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=ROWS)
  exists = chunk * C + row < call.T
  rows_s = work.tiles["rows"]
  rows_s[0] = jnp.where(exists, r, 0.0)
  rows_s[1] = jnp.where(exists, dz, 0.0)
  plgpu.commit_smem()
  for n, ref in enumerate(work.outs[1:]):
    target = ref.at[here.b, here.h, pl.ds(chunk * C, C)]
    plgpu.copy_smem_to_gmem(rows_s.at[n], target)


def _keys(work: Work, chunk, sums, *, m: int) -> None:
  """Tiles of scores are [key, query]."""
  call = work.call
  qs = _stream(work, "q", m)
  do, v = (_stream(work, name, call.tiles) for name in ("do", "v"))
  a, dsim = mmas(work, _inner(_stream(work, "k", m), qs), _inner(v, do))
  seen = _seen(work, 1)
  r, dz = (
    lax.broadcast_in_dim(
      times(_row(work, name, COLUMNS), call.grow), (C, C), [1]
    )
    for name in ("r", "dz")
  )
  da = (r * dsim + dz) * common.derivative(a, call)
  da = jnp.where(seen, da, 0.0).astype(call.dtype)
  sim = jnp.where(seen, r * common.polynomial(a, call), 0.0)
  sim = sim.astype(call.dtype)
  dks, dvs = (sums[0], sums[2], sums[3]), (sums[1], sums[4])
  for i, q_s in enumerate(qs):
    dk = times(mma(work, (da, q_s), shape=(C, F)), 1 / call.grow)
    dk = dk + _sum(work, chunk, _of_part(work, dks, m, i, call.tiles))
    _store(work, "dk", dk, _feature_target(work, work.outs[0], chunk, i))
  for tile, do_s in enumerate(do):
    pair = sim, do_s.at[:, pl.ds(0, call.width)]
    dv = times(mma(work, pair, shape=(C, call.width)), 1 / call.grow)
    dv = dv + _sum(work, chunk, _all_parts(work, dvs, m, tile))
    _store(work, "dv", dv, _value_target(work, work.outs[1], chunk, tile))
