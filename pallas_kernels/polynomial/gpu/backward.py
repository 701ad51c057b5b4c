"""Hopper kernels of the backward: a sweep to the right for dq, one to the left.

With g = r do the equations are those of `xla_chunked.py`; r goes to the scores
and to the features of the queries, do stays as it is. The features' part of dq
is, for the cyclic blocks,

    J(q)ᵀ u = Σ_r u_r ∘ (q Π_r) + Σ_r (u_r ∘ q) Π_rᵀ

whose second sum is a product on the tensor core.
"""

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  documents,
  forward,
  pipeline,
  tiles as common,
)
from pallas_kernels.polynomial.gpu.documents import FIRST, LAST
from pallas_kernels.polynomial.gpu.tiles import (
  COLUMNS,
  CYCLIC,
  LAYOUT,
  ROWS,
  C,
  F,
  V,
  Work,
  add_mma,
  block,
  columns,
  f32,
  mma,
  mmas,
  times,
)

# Blocks and columns of scores at a time, as they fit the registers.
DQ_GROUP, DQ_TILE = 2, 64
DK_GROUP, DK_TILE = 3, 32


def backward_queries(q, k, v, do, rows, states, call: common.Call) -> list:
  """dq (B, T, heads, 16), and r, dz (B, heads, T filled up to chunks).

  dq and dz are sums over the values: each tile has its own part of them.
  """
  across = jax.ShapeDtypeStruct((call.B, call.heads, call.total * C), f32)
  shape = (call.B, call.rows, call.heads, F)
  what = pipeline.Launch(
    "backward_queries",
    dict(q=q, k=k, v=v, do=do),
    rows,
    states,
    outs=(jax.ShapeDtypeStruct(shape, call.dtype), across, across),
    tiles=(("dq", (C, F), common.SWIZZLE_32), ("rows", (2, C), None)),
  )
  parts = forward.KEYS._replace(through_state=dq_state, within=_dq_within)
  return pipeline.launch(call, parts, what)


def dq_state(work: Work, chunk, slot):
  """(dnum, dden, z, num) of the tokens before the chunk.

  dq = r dnum + dz dden, the gradients of do·Σ sim v and of Σ sim. The sums are
  homogeneous of degree 2 in q where sim is a square, so that num = do·Σ sim v
  is q·dnum / 2.
  """
  call = work.call
  q_s, do_s = (work.inputs[name].at[slot] for name in ("q", "do"))
  x = plgpu.load(q_s, layout=LAYOUT)
  dnum, linear, num = common.zeros((C, F)), None, None
  for blocks in call.groups(DQ_GROUP):
    u, rolled = through(work, do_s, q_s, blocks)
    if call.affine:
      phi = common.query_features(x, rolled, blocks, call)
      for i, phi_r in enumerate(phi):
        dot = (u[:, block(i)] * phi_r.astype(f32)).sum(axis=1)
        num = dot if num is None else num + dot
    dnum = _through_cyclic(work, dnum, u, rolled, x, blocks, weighted=True)
    if call.c1 and CYCLIC in blocks:
      linear = u[:, block(CYCLIC - blocks.start)] * call.c1
  dnum = times(dnum, call.square)
  dnum = dnum if linear is None else dnum + linear
  products = mmas(work, *common.denominator(work, q_s))
  quadratic, form = common.forms(work, products)
  z = (form * x.astype(f32)).sum(axis=1)
  if call.c0:
    z = z + call.c0 * documents.past(work, chunk, slot)
  if num is None:
    num = (dnum * x.astype(f32)).sum(axis=1) * 0.5
  mine = lambda y: documents.of_document(work, slot, FIRST, y)
  dnum, num = (mine(times(y, 1 / call.shrink)) for y in (dnum, num))
  return dnum, mine(quadratic + form), mine(z), num


def _dq_within(work: Work, chunk, slot, part) -> None:
  """Adds the tokens of the chunk, and writes dq, r and dz.

  r and dz are known before the scores' gradients da = (r do·v + dz) sim' are
  rounded: where a query sees one key alone the two terms are equal.
  """
  call = work.call
  q_s, k_s, v_s, do_s = (work.inputs[x].at[slot] for x in ("q", "k", "v", "do"))
  dnum, dden, z, num = part
  tiles = []
  for start in range(0, C, DQ_TILE):
    some = pl.ds(start, DQ_TILE)
    a, dsim = mmas(
      work,
      ((C, DQ_TILE), (q_s, k_s.at[some].transpose((1, 0)))),
      ((C, DQ_TILE), (do_s, v_s.at[some].transpose((1, 0)))),
    )
    seen = documents.seen(work, slot, start, DQ_TILE, queries=0)
    sim = jnp.where(seen, common.polynomial(a, call), 0.0)
    z = z + sim.sum(axis=1)
    num = num + (sim * dsim).sum(axis=1)
    tiles.append((start, a, dsim))
  r = 1.0 / (z + call.eps)
  dz = -(num * r) * r
  dq = columns(r, F) * dnum + columns(dz, F) * dden
  for start, a, dsim in tiles:
    slope = common.derivative(a, call)
    da = (columns(r, DQ_TILE) * dsim + columns(dz, DQ_TILE)) * slope
    da = jnp.where(
      documents.seen(work, slot, start, DQ_TILE, queries=0), da, 0.0
    )
    dq = add_mma(
      work, dq, (da.astype(call.dtype), k_s.at[pl.ds(start, DQ_TILE)])
    )
  _store_dq(work, chunk, dq, r, dz)


def _store_dq(work: Work, chunk, dq, r, dz) -> None:
  call, here = work.call, work.here
  dq_s, rows_s = work.tiles["dq"], work.tiles["rows"]
  dq_ref, r_ref, dz_ref = work.outs
  tokens = pl.ds(chunk * C, C)
  row = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=ROWS)
  exists = chunk * C + row < call.T
  plgpu.wait_smem_to_gmem(0)
  dq_s[...] = dq.astype(call.dtype)
  rows_s[0] = jnp.where(exists, r, 0.0)
  rows_s[1] = jnp.where(exists, dz, 0.0)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(dq_s, dq_ref.at[here.b, tokens, here.head])
  plgpu.copy_smem_to_gmem(rows_s.at[0], r_ref.at[here.b, here.head, tokens])
  plgpu.copy_smem_to_gmem(rows_s.at[1], dz_ref.at[here.b, here.head, tokens])


def through(work: Work, value_s, x_s, blocks: range):
  """u = value KV of these blocks, (C, 16 a block); and x Π, as operands."""
  kv = work.shared.kv.at[:, pl.ds(blocks.start * F, len(blocks) * F)]
  products = [((C, len(blocks) * F), (value_s, kv))]
  rolls = common.some(work.rolls, blocks)
  if rolls is not None:
    products.append(((C, rolls.shape[1]), (x_s, rolls)))
  u, *rolled = mmas(work, *products)
  return u, rolled[0].astype(work.call.dtype) if rolled else None


def _through_cyclic(
  work: Work, sum_, u, rolled, x, blocks: range, *, weighted: bool
):
  """sum + J(x)ᵀ u of the cyclic ones of these blocks, without σ."""
  terms, twice, low = [], x + x, u.astype(work.call.dtype)
  for i, r in enumerate(blocks):
    if r >= CYCLIC:
      break
    heavy = weighted and common.weight(r, work.call) == 2.0
    part = u[:, block(i)] * rolled[:, block(i)].astype(f32)
    sum_ = sum_ + (part + part if heavy else part)
    back = work.rolls.at[:, pl.ds(r * F, F)].transpose((1, 0))
    terms.append((low[:, block(i)] * (twice if heavy else x), back))
  return sum_ + mma(work, *terms, shape=(C, F)) if terms else sum_


def backward_keys(
  q, k, v, do, rows, states, call: common.Call, *, state: bool
) -> list:
  """dk (B, T, heads, 16), dv, and perhaps the cotangents before each slice.

  dk is a sum over the values: each tile has its own part of it.

  Args:
    rows: r, and dz for the first tile of a head and 0 for the others,
      (B, heads, T filled up); and the codes of documents.
    states: the cotangents behind the slices, or ().
  """
  what = pipeline.Launch(
    "backward_keys",
    dict(q=q, k=k, v=v, do=do),
    rows,
    states,
    outs=(
      jax.ShapeDtypeStruct((call.B, call.rows, call.heads, F), call.dtype),
      jax.ShapeDtypeStruct((call.B, call.rows, call.H, call.P), call.dtype),
    ),
    tiles=(
      ("dk", (C, F), common.SWIZZLE_32),
      common.values_tile("dv", call),
    ),
    after=state,
    left=True,
  )
  parts = QUERIES._replace(through_state=dkv_state, within=_dkv_within)
  return pipeline.launch(call, parts, what)


def query_cotangents(q, do, rows, call: common.Call) -> list:
  """The cotangents before each slice, of the slice's own queries."""
  what = pipeline.Launch(
    "query_cotangent", dict(q=q, do=do), rows, after=True, left=True
  )
  return pipeline.launch(call, QUERIES, what)


def _store_queries(work: Work, chunk, slot) -> None:
  """r times the weighted features of the queries, and dz q̃."""
  del chunk
  call, shared = work.call, work.shared
  x, q_s = documents.own_rows(work, slot, FIRST, "q", "do")
  r, dz = of_queries(work, slot)
  xf = x.astype(f32)
  for blocks in call.groups(common.GROUP):
    rolled = common.roll(work, q_s, blocks)
    phi = common.query_features(x, rolled, blocks, call, r)
    common.store_blocks(shared.phi, blocks, phi)
  shared.wide[:, pl.ds(0, F)] = (xf * times(dz, call.square)).astype(call.dtype)
  if call.c1:
    line = jnp.where(common.iota((C, F), 1) == 0, dz * call.c1, 0.0)
    shared.wide[:, pl.ds(F, F)] = line.astype(call.dtype)


def of_queries(work: Work, slot):
  """r and dz of the queries that are summed, grown, (C, F) each."""
  mine = lambda y: documents.of_document(work, slot, FIRST, y)
  return (
    columns(mine(times(plgpu.load(ref, layout=ROWS), work.call.grow)), F)
    for ref in (work.inputs[name].at[slot] for name in ("r", "dz"))
  )


# The parts that sum queries.
QUERIES = pipeline.Parts(
  _store_queries, lambda work, slot: documents.summed(work, slot, "q", "do")
)


def dkv_state(work: Work, chunk, slot):
  """dk (C, F) and dv (C, V) from the queries behind the chunk."""
  del chunk
  call, kk_s = work.call, work.shared.kk
  k_s, v_s = (work.inputs[name].at[slot] for name in "kv")
  x = plgpu.load(k_s, layout=LAYOUT)
  halves = common.halves(kk_s, 0)
  dk = 2.0 * mma(work, *[(k_s, half) for half in halves], shape=(C, F))
  if call.c1:
    one = common.two_columns(call.dtype, 1.0, 0.0)
    halves = common.halves(kk_s, F)
    dk = dk + mma(work, *[(one, half) for half in halves], shape=(C, F))
  for blocks in call.groups(DK_GROUP):
    u, rolled = through(work, v_s, k_s, blocks)
    dk = _through_cyclic(work, dk, u, rolled, x, blocks, weighted=False)
    if call.c1 and CYCLIC in blocks:
      dk = dk + u[:, block(CYCLIC - blocks.start)]
  rolled = common.roll_all(work, k_s)
  phi = common.key_features(x, rolled, range(call.blocks), call)
  dv = mma(work, *common.by_state(work, phi), shape=(C, V))
  mine = lambda y: documents.of_document(work, slot, LAST, y)
  return mine(dk), mine(dv)


def _dkv_within(work: Work, chunk, slot, part) -> None:
  """Adds the queries of the chunk, and writes dk and dv.

  Tiles of scores are [key, query].
  """
  call, here = work.call, work.here
  q_s, k_s, v_s, do_s = (work.inputs[x].at[slot] for x in ("q", "k", "v", "do"))
  across = lambda name, some: lax.broadcast_in_dim(
    times(
      plgpu.load(work.inputs[name].at[slot, some], layout=COLUMNS), call.grow
    ),
    (C, DK_TILE),
    [1],
  )
  dk, dv = part
  for start in range(0, C, DK_TILE):
    some = pl.ds(start, DK_TILE)
    a, dsim = mmas(
      work,
      ((C, DK_TILE), (k_s, q_s.at[some].transpose((1, 0)))),
      ((C, DK_TILE), (v_s, do_s.at[some].transpose((1, 0)))),
    )
    r, dz = across("r", some), across("dz", some)
    seen = documents.seen(work, slot, start, DK_TILE, queries=1)
    da = (r * dsim + dz) * common.derivative(a, call)
    da = jnp.where(seen, da, 0.0).astype(call.dtype)
    sim = jnp.where(seen, r * common.polynomial(a, call), 0.0)
    dk, dv = common.add_mmas(
      work,
      (dk, (da, q_s.at[some])),
      (dv, (sim.astype(call.dtype), do_s.at[some])),
    )
  plgpu.wait_smem_to_gmem(0)
  dk_s, dv_s = work.tiles["dk"], work.tiles["dv"]
  dk_s[...] = times(dk, 1 / call.grow).astype(call.dtype)
  dv_s[...] = times(dv, 1 / call.grow)[:, : call.width].astype(call.dtype)
  plgpu.commit_smem()
  tokens = pl.ds(chunk * C, C)
  plgpu.copy_smem_to_gmem(dk_s, work.outs[0].at[here.b, tokens, here.head])
  plgpu.copy_smem_to_gmem(dv_s, common.values_at(work, work.outs[1], chunk))
