"""Hopper kernels' parts for a half of a pair (i, j) of the features' parts.

    2 (q_i·k_i)(q_j·k_j) = Σ_r 2 (q_i ∘ q_j Π_r)·(k_i ∘ k_j Π_r),  r = 0 … 15

of which a half has eight r. The denominator's state is KK = Σ k_i k_jᵀ, which
both halves have, each with half of its weight:

    z = σ q_iᵀ KK q_j

The streams "q" and "k" are x_i here, and "qj" and "kj" x_j.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.polynomial.gpu import (
  backward,
  documents,
  pipeline,
  tiles as common,
)
from pallas_kernels.polynomial.gpu.backward import DK_GROUP, DQ_GROUP
from pallas_kernels.polynomial.gpu.documents import FIRST, LAST
from pallas_kernels.polynomial.gpu.tiles import (
  LAYOUT,
  C,
  F,
  V,
  Work,
  block,
  f32,
  mma,
  mmas,
  times,
)


def key_states(k, v, rows, call: common.Call) -> list:
  """(KVᵀ, KK) of each slice's own keys: (slices, B, heads, V, ·)."""
  streams = dict(k=k, kj=k, v=v)
  what = pipeline.Launch("key_state", streams, rows, after=True)
  return pipeline.launch(call, KEYS, what)


def query_cotangents(q, do, rows, call: common.Call) -> list:
  """The cotangents before each slice, of the slice's own queries."""
  streams = dict(q=q, qj=q, do=do)
  what = pipeline.Launch(
    "query_cotangent", streams, rows, after=True, left=True
  )
  return pipeline.launch(call, QUERIES, what)


def _store_keys(work: Work, chunk, slot) -> None:
  """The features of the keys, and k_i for the update."""
  del chunk
  call, shared = work.call, work.shared
  _, kj_s = documents.own_rows(work, slot, LAST, "kj", "v")
  x = documents.of_document(work, slot, LAST, _load(work, slot, "k"))
  for blocks in call.groups(common.GROUP):
    rolled = common.roll(work, kj_s, blocks)
    phi = common.key_features(x, rolled, blocks, call)
    common.store_blocks(shared.phi, blocks, phi)
  shared.wide[:, pl.ds(0, F)] = x


def _store_queries(work: Work, chunk, slot) -> None:
  """r times the weighted features of the queries, and dz q_i."""
  del chunk
  call, shared = work.call, work.shared
  _, qj_s = documents.own_rows(work, slot, FIRST, "qj", "do")
  x = documents.of_document(work, slot, FIRST, _load(work, slot, "q"))
  r, dz = backward.of_queries(work, slot)
  for blocks in call.groups(common.GROUP):
    rolled = common.roll(work, qj_s, blocks)
    phi = common.query_features(x, rolled, blocks, call, r)
    common.store_blocks(shared.phi, blocks, phi)
  wide = x.astype(f32) * times(dz, call.square)
  shared.wide[:, pl.ds(0, F)] = wide.astype(call.dtype)


# The parts that sum keys, and queries.
KEYS = pipeline.Parts(
  _store_keys, lambda work, slot: documents.summed(work, slot, "kj", "v")
)
QUERIES = pipeline.Parts(
  _store_queries,
  lambda work, slot: documents.summed(work, slot, "qj", "do"),
)


def through_state(work: Work, chunk, slot):
  """(Σ sim' v, Σ sim') of the tokens before the chunk, (C, V) and (C,)."""
  del chunk
  call = work.call
  q_s, qj_s = (work.inputs[name].at[slot] for name in ("q", "qj"))
  rolled = common.roll_all(work, qj_s)
  x = _load(work, slot, "q")
  phi = common.query_features(x, rolled, range(call.blocks), call)
  num, form = mmas(
    work,
    ((C, V), *common.by_state(work, phi)),
    ((C, F), *_by_kk(work, q_s)),
  )
  z = (form * _load(work, slot, "qj").astype(f32)).sum(axis=1)
  mine = lambda y: documents.of_document(work, slot, FIRST, y)
  return (
    mine(times(num, 1 / call.shrink)),
    mine(times(z, call.square / call.shrink)),
  )


def dq_state(work: Work, chunk, slot):
  """(dnum_i, dnum_j, dden_i, dden_j, z, num), as `backward.dq_state`.

  num is linear in q_i, so that it is q_i·dnum_i.
  """
  del chunk
  call = work.call
  q_s, qj_s, do_s = (work.inputs[name].at[slot] for name in ("q", "qj", "do"))
  x = _load(work, slot, "q")
  dnum_i, dnum_j = common.zeros((C, F)), common.zeros((C, F))
  for blocks in call.groups(DQ_GROUP):
    u, rolled = backward.through(work, do_s, qj_s, blocks)
    part_i, part_j = _through_pair(work, u, rolled, x, blocks)
    dnum_i, dnum_j = dnum_i + part_i, dnum_j + part_j
  dden_j, dden_i = mmas(
    work,
    ((C, F), *_by_kk(work, q_s)),
    ((C, F), *_by_kk(work, qj_s, transposed=True)),
  )
  z = (dden_j * _load(work, slot, "qj").astype(f32)).sum(axis=1)
  num = (dnum_i * x.astype(f32)).sum(axis=1)
  mine = lambda y, factor: documents.of_document(
    work, slot, FIRST, times(y, factor * call.square / call.shrink)
  )
  dnum_i, dnum_j, num = (mine(y, 2.0) for y in (dnum_i, dnum_j, num))
  dden_i, dden_j, z = (mine(y, 1.0) for y in (dden_i, dden_j, z))
  return dnum_i, dnum_j, dden_i, dden_j, z, num


def dkv_state(work: Work, chunk, slot):
  """(dk_i, dk_j, dv) from the queries behind the chunk; (C, F) and (C, V)."""
  del chunk
  call = work.call
  k_s, kj_s, v_s = (work.inputs[name].at[slot] for name in ("k", "kj", "v"))
  x = _load(work, slot, "k")
  dk_j, dk_i = mmas(
    work,
    ((C, F), *_by_kk(work, k_s)),
    ((C, F), *_by_kk(work, kj_s, transposed=True)),
  )
  for blocks in call.groups(DK_GROUP):
    u, rolled = backward.through(work, v_s, kj_s, blocks)
    part_i, part_j = _through_pair(work, u, rolled, x, blocks)
    dk_i, dk_j = dk_i + part_i, dk_j + part_j
  rolled = common.roll_all(work, kj_s)
  phi = common.key_features(x, rolled, range(call.blocks), call)
  dv = mma(work, *common.by_state(work, phi), shape=(C, V))
  mine = lambda y: documents.of_document(work, slot, LAST, y)
  return mine(dk_i), mine(dk_j), mine(dv)


def _load(work: Work, slot, name: str):
  return plgpu.load(work.inputs[name].at[slot], layout=LAYOUT)


def _by_kk(work: Work, x_s, *, transposed: bool = False) -> list:
  """The pairs whose products are x KK, or x KKᵀ."""
  halves = common.halves(work.shared.kk, 0)
  return [(x_s, kk.transpose((1, 0)) if transposed else kk) for kk in halves]


def _through_pair(work: Work, u, rolled, x, blocks: range):
  """J(x_i)ᵀ u and J(x_j)ᵀ u of these blocks, without their weight."""
  first, terms, low = common.zeros((C, F)), [], u.astype(work.call.dtype)
  for n, r in enumerate(blocks):
    first = first + u[:, block(n)] * rolled[:, block(n)].astype(f32)
    back = work.rolls.at[:, pl.ds(r * F, F)].transpose((1, 0))
    terms.append((low[:, block(n)] * x, back))
  return first, mma(work, *terms, shape=(C, F))
