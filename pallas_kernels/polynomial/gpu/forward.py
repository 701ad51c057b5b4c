"""Hopper kernels of the forward: o, and the state after a slice of time."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import documents, pipeline, tiles as common
from pallas_kernels.polynomial.gpu.documents import FIRST, LAST
from pallas_kernels.polynomial.gpu.tiles import (
  LAYOUT,
  TILE,
  C,
  F,
  V,
  Work,
  add_mma,
  f32,
  mma,
  mmas,
  times,
)


def forward(q, k, v, rows, states, call: common.Call, *, state: bool) -> list:
  """o (B, T, H, P) and, where asked for, (KVᵀ, KK) behind each slice.

  Args:
    q, k: (B, T, H, 16); v: (B, T, H, P).
    rows: codes and past of the documents, (B, 1, T filled up), or {}.
    states: the states before the slices and their counts, or ().
    call: the launch.
    state: whether to write the states behind the slices.
  """
  shape = (call.B, call.rows, call.H, call.P)
  parts = KEYS._replace(through_state=through_state, within=_within)
  what = pipeline.Launch(
    "forward",
    dict(q=q, k=k, v=v),
    rows,
    states,
    outs=(jax.ShapeDtypeStruct(shape, call.dtype),),
    tiles=(common.values_tile("o", call),),
    after=state,
  )
  return pipeline.launch(call, parts, what)


def key_states(k, v, rows, call: common.Call) -> list:
  """(KVᵀ, KK) of each slice's own keys: (slices, B, heads, V, ·)."""
  what = pipeline.Launch("key_state", dict(k=k, v=v), rows, after=True)
  return pipeline.launch(call, KEYS, what)


def _exists(work: Work, chunk):
  """1.0 for the tokens of a chunk that exist and are summed, (C, F)."""
  call = work.call
  here = chunk * C + common.iota((C, F), 0) < call.T
  return jnp.where(here, 1.0, 0.0)


def _store_keys(work: Work, chunk, slot) -> None:
  """The features of the keys, and k̃ with its ones, for the update."""
  call, shared = work.call, work.shared
  x, k_s = documents.own_rows(work, slot, LAST, "k", "v")
  one = None
  if call.affine:
    one = documents.of_document(work, slot, LAST, _exists(work, chunk))
  for blocks in call.groups(common.GROUP):
    rolled = common.roll(work, k_s, blocks)
    common.store_blocks(
      shared.phi, blocks, common.key_features(x, rolled, blocks, call, one)
    )
  shared.wide[:, pl.ds(0, F)] = x
  if one is not None:
    shared.wide[:, pl.ds(F, F)] = common.two_columns(call.dtype, one)


# The parts that sum keys.
KEYS = pipeline.Parts(
  _store_keys, lambda work, slot: documents.summed(work, slot, "k", "v")
)


def through_state(work: Work, chunk, slot):
  """(Σ sim' v, Σ sim') of the tokens before the chunk, (C, V) and (C,)."""
  call, q_s = work.call, work.inputs["q"].at[slot]
  rolled = common.roll_all(work, q_s)
  x = plgpu.load(q_s, layout=LAYOUT)
  phi = common.query_features(x, rolled, range(call.blocks), call)
  num, *products = mmas(
    work,
    ((C, V), *common.by_state(work, phi)),
    *common.denominator(work, q_s),
  )
  _, form = common.forms(work, products)
  z = (form * x.astype(f32)).sum(axis=1)
  if call.c0:
    z = z + call.c0 * documents.past(work, chunk, slot)
  mine = lambda y: documents.of_document(work, slot, FIRST, y)
  return mine(times(num, 1 / call.shrink)), mine(z)


def _within(work: Work, chunk, slot, part) -> None:
  """Adds the tokens of the chunk, and writes o."""
  call, o_s = work.call, work.tiles["o"]
  q_s, k_s, v_s = (work.inputs[name].at[slot] for name in "qkv")
  num, z = part
  for start in range(0, C, TILE):
    some = pl.ds(start, TILE)
    pair = q_s, k_s.at[some].transpose((1, 0))
    a = mma(work, pair, shape=(C, TILE))
    seen = documents.seen(work, slot, start, TILE, queries=0)
    sim = jnp.where(seen, common.polynomial(a, call), 0.0)
    num = add_mma(work, num, (sim.astype(call.dtype), v_s.at[some]))
    z = z + sim.sum(axis=1)
  value = num / common.columns(z + call.eps, V)
  plgpu.wait_smem_to_gmem(0)
  o_s[...] = value[:, : call.width].astype(call.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(o_s, common.values_at(work, work.outs[0], chunk))
