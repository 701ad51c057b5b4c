"""Hopper kernels of the backward: a sweep to the right for dq, one to the left.

With g = r do the equations are those of `xla_chunked.py`; the features' part of
dq is, for the cyclic blocks,

    J(q)ᵀ u = Σ_r u_r ∘ (q Π_r) + Σ_r (u_r ∘ q) Π_rᵀ

whose second sum is a product on the tensor core.
"""

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial import (
  gpu_common as common,
  gpu_forward,
  gpu_walk,
)
from pallas_kernels.polynomial.gpu_common import (
  CYCLIC,
  LAYOUT,
  TILE,
  C,
  F,
  V,
  add_mma,
  bf16,
  block,
  columns,
  f32,
  mma,
  mmas,
)

_ROWS = LAYOUT.reduce(1)  # a value a row of a tile
_COLUMNS = LAYOUT.reduce(0)


def rows_shape(call: common.Call) -> jax.ShapeDtypeStruct:
  """Of r and dz: (B, H, T filled up to whole chunks), float32."""
  return jax.ShapeDtypeStruct((call.B, call.H, call.total * C), f32)


def backward_queries(q, k, v, do, kv, kk, count, call: common.Call):
  """dq (B, T, H, 16), and r, dz of `rows_shape`."""
  before = kv is not None

  def body(*refs, q, k, v, do, dq, rows, shared, rolls, once):
    states, rest = (refs[5:8], refs[8:]) if before else (None, refs[5:])
    gpu_walk.walk(
      call,
      lambda *head: _query_parts(*head, rest, dq, rows, rolls, call),
      tuple(zip(refs[:4], (q, k, v, do), strict=True)),
      (),
      shared,
      (refs[4], rolls, once),
      states=states,
    )

  N = gpu_walk.heads(alone=False)
  scratch = gpu_walk.scratch(call, dict(q=F, k=F, v=V, do=V))
  scratch["dq"] = common.smem(N, C, F)
  scratch["rows"] = plgpu.SMEM((N, 2, C), f32)  # r and dz
  out = [jax.ShapeDtypeStruct((call.B, call.rows, call.H, F), bf16)]
  return gpu_walk.launch(
    body,
    call,
    "polynomial_backward_queries",
    out=out + [rows_shape(call)] * 2,
    scratch=scratch,
  )(q, k, v, do, jnp.asarray(common.rolls(), bf16), *(kv, kk, count) * before)


def _query_parts(here, shared, inputs, count, out, dq, rows, rolls_s, call):
  q, k, v, do = inputs

  def through_state(chunk, slot):
    past = count + ((chunk - here.first) * C).astype(f32)
    return _dq_state(q.at[slot], do.at[slot], shared, rolls_s, past, call)

  def within(chunk, slot, part):
    found = _dq_within(*(x.at[slot] for x in inputs), part, call)
    _store_dq(found, chunk, out, dq.at[here.p], rows.at[here.p], here, call)

  keys = gpu_forward.key_parts(shared, (k, v), rolls_s, call)
  return keys._replace(through_state=through_state, within=within)


def _store_dq(found, chunk, out, dq_s, rows_s, here, call):
  value, r, dz = found
  rows = pl.ds(chunk * C, C)
  exists = (
    chunk * C + plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=_ROWS)
    < call.T
  )
  plgpu.wait_smem_to_gmem(0)
  dq_s[...] = value.astype(bf16)
  rows_s[0] = jnp.where(exists, r, 0.0)
  rows_s[1] = jnp.where(exists, dz, 0.0)
  plgpu.commit_smem()
  dq_ref, r_ref, dz_ref = out
  plgpu.copy_smem_to_gmem(dq_s, dq_ref.at[here.b, rows, here.h])
  plgpu.copy_smem_to_gmem(rows_s.at[0], r_ref.at[here.b, here.h, rows])
  plgpu.copy_smem_to_gmem(rows_s.at[1], dz_ref.at[here.b, here.h, rows])


def _dq_state(q_s, do_s, shared, rolls_s, past, call):
  """(dnum, dden, z, num) of the tokens before the chunk.

  dq = r dnum + dz dden, the gradients of do·Σ sim v and of Σ sim. The sums are
  homogeneous of degree 2 in q where sim is a square, so that num = do·Σ sim v
  is q·dnum / 2, with the same rounding as dnum's; it is None there.
  """
  x = plgpu.load(q_s, layout=LAYOUT)
  xf = x.astype(f32)
  dnum, num = common.zeros((C, F)), None
  for blocks in call.groups:
    u, rolled = _through(do_s, q_s, shared, rolls_s, blocks)
    if not call.square:
      phi = common.query_features(x, rolled, blocks, call)
      for i, phi_r in enumerate(phi):
        dot = (u[:, block(i)] * phi_r.astype(f32)).sum(axis=1)
        num = dot if num is None else num + dot
    dnum = _through_cyclic(dnum, u, rolled, x, rolls_s, blocks, weighted=True)
    if call.c1 and CYCLIC in blocks:
      dnum = dnum + u[:, block(CYCLIC - blocks.start)] * call.c1
  quadratic, *linear = mmas(*common.denominator(q_s, shared.kk, call))
  form = quadratic + linear[0] if linear else quadratic
  z = (form * xf).sum(axis=1) + call.c0 * past
  return dnum, quadratic + form, z, num


def _dq_within(q_s, k_s, v_s, do_s, part, call):
  """dq (C, F), r (C,) and dz (C,)."""
  dnum, dden, z, num = part
  for start in range(0, C, TILE):
    some = pl.ds(start, TILE)
    a, dsim = mmas(
      ((C, TILE), (q_s, k_s.at[some].transpose((1, 0)))),
      ((C, TILE), (do_s, v_s.at[some].transpose((1, 0)))),
    )
    seen = common.seen(start, queries=0)
    sim = jnp.where(seen, common.polynomial(a, call), 0.0)
    slope = jnp.where(seen, common.derivative(a, call), 0.0)
    z = z + sim.sum(axis=1)
    if num is not None:
      num = num + (sim * dsim).sum(axis=1)
    more = mmas(
      ((C, F), (slope.astype(bf16), k_s.at[some])),
      ((C, F), ((slope * dsim).astype(bf16), k_s.at[some])),
    )
    dden, dnum = dden + more[0], dnum + more[1]
  if num is None:
    xf = plgpu.load(q_s, layout=LAYOUT).astype(f32)
    num = (dnum * xf).sum(axis=1) * 0.5
  r = 1.0 / (z + call.eps)
  dz = -(num * r) * r
  return columns(r, F) * dnum + columns(dz, F) * dden, r, dz


def _through(value_s, x_s, shared, rolls_s, blocks: range):
  """u = value KV of these blocks, (C, 16 a block); and x Π, in bf16."""
  kv = shared.kv.at[:, pl.ds(blocks.start * F, len(blocks) * F)]
  products = [((C, len(blocks) * F), (value_s, kv))]
  rolls = common.some(rolls_s, blocks)
  if rolls is not None:
    products.append(((C, rolls.shape[1]), (x_s, rolls)))
  u, *rolled = mmas(*products)
  return u, rolled[0].astype(bf16) if rolled else None


def _through_cyclic(sum_, u, rolled, x, rolls_s, blocks, *, weighted: bool):
  """sum + J(x)ᵀ u of the cyclic ones of these blocks."""
  terms, twice, low = [], x + x, u.astype(bf16)
  for i, r in enumerate(blocks):
    if r >= CYCLIC:
      break
    heavy = weighted and common.weight(r) == 2.0
    part = u[:, block(i)] * rolled[:, block(i)].astype(f32)
    sum_ = sum_ + (part + part if heavy else part)
    back = rolls_s.at[:, pl.ds(r * F, F)].transpose((1, 0))
    terms.append((low[:, block(i)] * (twice if heavy else x), back))
  return sum_ + mma(*terms, shape=(C, F)) if terms else sum_


def backward_keys(q, k, v, do, r, dz, kv, kk, call, *, state: bool):
  """dk, dv and, where asked for, the cotangents before each slice.

  `kv` and `kk` are the cotangents behind the slices, or None.
  """
  after = kv is not None

  def body(*refs, q, k, v, do, r, dz, dk, dv, shared, rolls, once):
    states, rest = (refs[7:9], refs[9:]) if after else (None, refs[7:])
    gpu_walk.walk(
      call,
      lambda *head: _key_parts(*head[:3], rest, (dk, dv), rolls, call),
      tuple(zip(refs[:4], (q, k, v, do), strict=True)),
      tuple(zip(refs[4:6], (r, dz), strict=True)),
      shared,
      (refs[6], rolls, once),
      states=states,
      after=rest[2:] or None,
      left=True,
    )

  N = gpu_walk.heads(alone=False)
  scratch = gpu_walk.scratch(call, dict(q=F, k=F, v=V, do=V), ("r", "dz"))
  wide = common.SWIZZLE_128 if call.P == V else common.SWIZZLE_32
  scratch["dk"] = common.smem(N, C, F)
  scratch["dv"] = common.smem(N, C, call.P, swizzle=wide)
  out = [
    jax.ShapeDtypeStruct((call.B, call.rows, call.H, F), bf16),
    jax.ShapeDtypeStruct((call.B, call.rows, call.H, call.P), bf16),
  ]
  return gpu_walk.launch(
    body,
    call,
    "polynomial_backward_keys",
    out=out + gpu_walk.state_shapes(call) * state,
    scratch=scratch,
  )(q, k, v, do, r, dz, jnp.asarray(common.rolls(), bf16), *(kv, kk) * after)


def _key_parts(here, shared, inputs, out, tiles, rolls_s, call):
  q, k, v, do, r, dz = inputs

  def within(chunk, slot, part):
    dk, dv = _dkv_within(*(x.at[slot] for x in (q, k, v, do, dz)), part, call)
    plgpu.wait_smem_to_gmem(0)
    dk_s, dv_s = (x.at[here.p] for x in tiles)
    dk_s[...] = dk.astype(bf16)
    dv_s[...] = dv[:, : call.P].astype(bf16)
    plgpu.commit_smem()
    at = here.b, pl.ds(chunk * C, C), here.h
    plgpu.copy_smem_to_gmem(dk_s, out[0].at[at])
    plgpu.copy_smem_to_gmem(dv_s, out[1].at[at])

  queries = _sum_parts(shared, (q, do, r, dz), rolls_s, call)
  return queries._replace(
    through_state=lambda chunk, slot: _dkv_state(
      k.at[slot], v.at[slot], shared, rolls_s, call
    ),
    within=within,
  )


def _sum_parts(shared, inputs, rolls_s, call) -> gpu_walk.Parts:
  """The parts that sum queries; g = r do replaces do."""
  q, do, _, _ = inputs
  return gpu_walk.Parts(
    lambda chunk, slot: _store_queries(
      *(x.at[slot] for x in inputs), rolls_s, shared, call
    ),
    lambda chunk, slot: (q.at[slot], do.at[slot]),
  )


def _store_queries(q_s, do_s, r_s, dz_s, rolls_s, shared, call):
  """g = r do over do, the weighted features of the queries, and dz q̃."""
  r = plgpu.load(r_s, layout=_ROWS)
  do = plgpu.load(do_s, layout=LAYOUT).astype(f32)
  do_s[...] = (do * columns(r, V)).astype(bf16)
  x = plgpu.load(q_s, layout=LAYOUT)
  for blocks in call.groups:
    rolled = common.roll(q_s, rolls_s, blocks)
    phi = common.query_features(x, rolled, blocks, call)
    common.store_blocks(shared.phi, blocks, phi)
  dz = plgpu.load(dz_s, layout=_ROWS)
  shared.wide[:, pl.ds(0, F)] = (x.astype(f32) * columns(dz, F)).astype(bf16)
  if call.c1:
    line = jnp.where(common.iota((C, F), 1) == 0, columns(dz, F) * call.c1, 0.0)
    shared.wide[:, pl.ds(F, F)] = line.astype(bf16)


def _dkv_state(k_s, v_s, shared, rolls_s, call):
  """dk (C, F) and dv (C, V) from the queries behind the chunk."""
  x = plgpu.load(k_s, layout=LAYOUT)
  halves = common.halves(shared.kk, 0)
  dk = 2.0 * mma(*[(k_s, half) for half in halves], shape=(C, F))
  if call.c1:
    one = common.two_columns(1.0, 0.0)
    halves = common.halves(shared.kk, F)
    dk = dk + mma(*[(one, half) for half in halves], shape=(C, F))
  dv = common.zeros((C, V))
  for blocks in call.groups:
    u, rolled = _through(v_s, k_s, shared, rolls_s, blocks)
    phi = common.key_features(x, rolled, blocks, call)
    kv = lambda r: shared.kv.at[:, pl.ds(r * F, F)].transpose((1, 0))
    terms = [(y, kv(r)) for r, y in zip(blocks, phi, strict=True)]
    dv = add_mma(dv, *terms)
    dk = _through_cyclic(dk, u, rolled, x, rolls_s, blocks, weighted=False)
    if call.c1 and CYCLIC in blocks:
      dk = dk + u[:, block(CYCLIC - blocks.start)]
  return dk, dv


def _dkv_within(q_s, k_s, v_s, g_s, dz_s, part, call):
  """The sums with the queries of the chunk; tiles are [key, query]."""
  dk, dv = part
  for start in range(0, C, TILE):
    some = pl.ds(start, TILE)
    a, dsim = mmas(
      ((C, TILE), (k_s, q_s.at[some].transpose((1, 0)))),
      ((C, TILE), (v_s, g_s.at[some].transpose((1, 0)))),
    )
    dz = plgpu.load(dz_s.at[some], layout=_COLUMNS)
    dsim = dsim + lax.broadcast_in_dim(dz, (C, TILE), [1])
    seen = common.seen(start, queries=1)
    da = jnp.where(seen, dsim * common.derivative(a, call), 0.0)
    sim = jnp.where(seen, common.polynomial(a, call), 0.0)
    dk = dk + mma((da.astype(bf16), q_s.at[some]), shape=(C, F))
    dv = add_mma(dv, (sim.astype(bf16), g_s.at[some]))
  return dk, dv


def query_cotangents(q, do, r, dz, call: common.Call):
  """The cotangents before each slice, of the slice's own queries."""

  def body(*refs, q, do, r, dz, shared, rolls, once):
    gpu_walk.walk(
      call,
      lambda here, mine, inputs, _: _sum_parts(mine, inputs, rolls, call),
      tuple(zip(refs[:2], (q, do), strict=True)),
      tuple(zip(refs[2:4], (r, dz), strict=True)),
      shared,
      (refs[4], rolls, once),
      after=refs[5:],
    )

  streams = dict(q=F, do=V)
  return gpu_walk.launch(
    body,
    call,
    "polynomial_query_cotangent",
    out=gpu_walk.state_shapes(call),
    scratch=gpu_walk.scratch(call, streams, ("r", "dz"), alone=True),
    alone=True,
  )(q, do, r, dz, jnp.asarray(common.rolls(), bf16))
