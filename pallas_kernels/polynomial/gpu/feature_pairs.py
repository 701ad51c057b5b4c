"""The steps of a walk whose term is a half of a pair, where F > 16.

A pair (i, j) of the parts of queries and keys adds to (q·k)²

    2 (q_i·k_i)(q_j·k_j) = Σ_r 2 (q_i ∘ q_j Π_r)·(k_i ∘ k_j Π_r),  r = 0 … 15

and each of its two halves has eight of these feature blocks. The denominator's
state is KK = Σ k_i k_jᵀ. Both halves have all of it and take half of its weight
2, so that for each

    Σ sim' = c2 q_iᵀ KK q_j

The inputs "q" and "k" are part i here, "qj" and "kj" part j. The functions are
those of `forward.py` and `backward.py`, which do the squares.
"""

import jax.experimental.pallas as pl

from pallas_kernels.polynomial.gpu import documents, features, pipeline
from pallas_kernels.polynomial.gpu.documents import (
  OF_STATE_AFTER,
  OF_STATE_BEFORE,
)
from pallas_kernels.polynomial.gpu.launch import PART, TILE, C
from pallas_kernels.polynomial.gpu.tiles import (
  f32,
  load,
  mma,
  mmas,
  times,
  zeros,
)
from pallas_kernels.polynomial.gpu.warpgroup import Work

# What a state sums.


def _write_key_features(work: Work, chunk, slot) -> None:
  """Write the features of the keys, and k_i, for the update."""
  del chunk
  launch, shared = work.launch, work.shared
  _, kj_s = documents.load_masked(work, slot, OF_STATE_AFTER, "kj", "v")
  x = documents.mask(work, slot, OF_STATE_AFTER, load(work, slot, "k"))
  for blocks in launch.block_groups(features.BLOCKS_AT_ONCE):
    rolled = features.roll(work, kj_s, blocks)
    phi = features.key_features(x, rolled, blocks, launch)
    features.store_blocks(work, blocks, phi)
  shared.extended[:, pl.ds(0, PART)] = x


def _summed_keys(work: Work, slot):
  return documents.summed_tiles(work, slot, "kj", "v")


def _write_query_features(work: Work, chunk, slot) -> None:
  """Write r times the weighted features of the queries, and dz q_i."""
  del chunk
  launch, shared = work.launch, work.shared
  _, qj_s = documents.load_masked(work, slot, OF_STATE_BEFORE, "qj", "do")
  x = documents.mask(work, slot, OF_STATE_BEFORE, load(work, slot, "q"))
  r, dz = features.query_factors(work, slot)
  for blocks in launch.block_groups(features.BLOCKS_AT_ONCE):
    rolled = features.roll(work, qj_s, blocks)
    phi = features.query_features(x, rolled, blocks, launch, r)
    features.store_blocks(work, blocks, phi)
  extended = x.astype(f32) * times(dz, launch.c2)
  shared.extended[:, pl.ds(0, PART)] = extended.astype(launch.dtype)


def _summed_queries(work: Work, slot):
  return documents.summed_tiles(work, slot, "qj", "do")


# What a chunk gets from tokens outside it, through the state.


def _through_state(work: Work, chunk, slot):
  """Compute Σ sim' v (C, TILE) and Σ sim' (C,) of the tokens before."""
  del chunk
  launch = work.launch
  q_s, qj_s = (work.inputs[name].at[slot] for name in ("q", "qj"))
  rolled = features.roll_all(work, qj_s)
  x = load(work, slot, "q")
  phi = features.query_features(x, rolled, range(launch.blocks), launch)
  numerator, form = mmas(
    work,
    ((C, TILE), *features.times_kv(work, phi)),
    ((C, PART), *features.times_kk(work, q_s)),
  )
  z = (form * load(work, slot, "qj").astype(f32)).sum(axis=1)
  numerator = times(numerator, 1 / launch.state_scale)
  numerator = documents.mask(work, slot, OF_STATE_BEFORE, numerator)
  z = times(z, launch.c2 / launch.state_scale)
  return numerator, documents.mask(work, slot, OF_STATE_BEFORE, z)


def _query_gradients(work: Work, chunk, slot):
  """Compute what dq gets from the tokens before the chunk.

  Returns:
    (dnum_i, dnum_j, dden_i, dden_j, z, num): as `backward._query_gradients`
    returns them, for q_i and for q_j. num is linear in q_i, so that it is
    q_i·dnum_i.
  """
  del chunk
  launch = work.launch
  q_s, qj_s, do_s = (work.inputs[name].at[slot] for name in ("q", "qj", "do"))
  x = load(work, slot, "q")
  dnum_i, dnum_j = zeros((C, PART)), zeros((C, PART))
  for blocks in launch.block_groups(features.QUERY_GRADIENT_BLOCKS):
    u, rolled = features.through_features(work, do_s, qj_s, blocks)
    of_i, of_j = features.pair_gradients(work, u, rolled, x, blocks)
    dnum_i, dnum_j = dnum_i + of_i, dnum_j + of_j
  dden_j, dden_i = mmas(
    work,
    ((C, PART), *features.times_kk(work, q_s)),
    ((C, PART), *features.times_kk(work, qj_s, transposed=True)),
  )
  z = (dden_j * load(work, slot, "qj").astype(f32)).sum(axis=1)
  num = (dnum_i * x.astype(f32)).sum(axis=1)

  def scaled(y, weight):
    y = times(y, weight * launch.c2 / launch.state_scale)
    return documents.mask(work, slot, OF_STATE_BEFORE, y)

  dnum_i, dnum_j, num = (scaled(y, 2.0) for y in (dnum_i, dnum_j, num))
  dden_i, dden_j, z = (scaled(y, 1.0) for y in (dden_i, dden_j, z))
  return dnum_i, dnum_j, dden_i, dden_j, z, num


def _key_gradients(work: Work, chunk, slot):
  """Compute dk_i, dk_j (C, PART) and dv (C, TILE) from the queries after."""
  del chunk
  launch = work.launch
  k_s, kj_s, v_s = (work.inputs[name].at[slot] for name in ("k", "kj", "v"))
  x = load(work, slot, "k")
  dk_j, dk_i = mmas(
    work,
    ((C, PART), *features.times_kk(work, k_s)),
    ((C, PART), *features.times_kk(work, kj_s, transposed=True)),
  )
  for blocks in launch.block_groups(features.KEY_GRADIENT_BLOCKS):
    u, rolled = features.through_features(work, v_s, kj_s, blocks)
    of_i, of_j = features.pair_gradients(work, u, rolled, x, blocks)
    dk_i, dk_j = dk_i + of_i, dk_j + of_j
  rolled = features.roll_all(work, kj_s)
  phi = features.key_features(x, rolled, range(launch.blocks), launch)
  dv = mma(work, *features.times_kv(work, phi), shape=(C, TILE))
  dk_i, dk_j, dv = (
    documents.mask(work, slot, OF_STATE_AFTER, y) for y in (dk_i, dk_j, dv)
  )
  return dk_i, dk_j, dv


SUM_KEYS = pipeline.Steps(_write_key_features, _summed_keys)
FORWARD = SUM_KEYS._replace(through_state=_through_state)
BACKWARD_QUERIES = SUM_KEYS._replace(through_state=_query_gradients)
SUM_QUERIES = pipeline.Steps(_write_query_features, _summed_queries)
BACKWARD_KEYS = SUM_QUERIES._replace(through_state=_key_gradients)
