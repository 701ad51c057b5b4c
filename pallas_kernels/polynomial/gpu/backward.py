"""The derivative on Hopper: what a walk does with a chunk in the backward.

Two walks. With r = 1 / (Σ sim' + eps), o = r · num, num = Σ sim' v:

`backward_queries` walks from the first token and keeps the state of the keys,
as the forward does. It gives dq, and for each query r and the cotangent of its
denominator, dz:

    dz_t  = −r_t² (do_t · num_t)
    dq_t  = Σ_s da_ts k_s,    da_ts = (r_t do_t·v_s + dz_t) d sim'_ts / da_ts
    before the chunk:  r_t J(q_t)ᵀ (w ∘ KV do_t) + dz_t d(q̃ᵀ (W ∘ KK) q̃)/dq

`backward_keys` walks from the last token, and keeps the cotangent of the state,
dKV = Σ_t r_t w ∘ φ(q_t) do_tᵀ and dKK = Σ_t dz_t W ∘ q̃_t q̃_tᵀ. It gives dk, dv:

    dk_s  = Σ_t da_ts q_t
    dv_s  = Σ_t sim'_ts r_t do_t
    after the chunk:  J(k_s)ᵀ dKV v_s + (dKK + dKKᵀ) k̃_s  and  dKVᵀ φ(k_s)

J is the derivative of the features φ, which `features.add_square_gradient`
applies. r multiplies scores and features; do goes to the tensor core as it is.
r and dz are in float32, and with float16 they are multiplied by
`gradient_scale` in `backward_keys`, so that states of cotangents stay in range.
"""

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  documents,
  feature_pairs,
  features,
  forward,
  partial_sums,
  pipeline,
  tiles,
)
from pallas_kernels.polynomial.gpu.documents import (
  OF_STATE_AFTER,
  OF_STATE_BEFORE,
)
from pallas_kernels.polynomial.gpu.launch import (
  PART,
  SQUARE_BLOCKS,
  TILE,
  C,
  Launch,
)
from pallas_kernels.polynomial.gpu.pipeline import Staging
from pallas_kernels.polynomial.gpu.tiles import (
  FIRST_AXIS,
  SECOND_AXIS,
  add_mma,
  add_mmas,
  block,
  columns,
  f32,
  high_low,
  mma,
  mmas,
  operand,
  store,
  times,
)
from pallas_kernels.polynomial.gpu.warpgroup import Work

# Columns of scores at a time, as they fit the registers.
QUERY_GRADIENT_COLUMNS, KEY_GRADIENT_COLUMNS = 64, 32


def backward_queries(
  q: Array,
  k: Array,
  v: Array,
  do: Array,
  per_token: dict[str, Array],
  states: tuple,
  launch: Launch,
) -> list[Array]:
  """Run the derivative with respect to the queries, of one launch.

  Args:
    q: (B, T, H, 16 · parts), padded as `launch.Plan` pads it.
    k: likewise.
    v: (B, T, H, P), padded likewise.
    do: likewise.
    per_token: the codes and past of documents, (B, 1, T padded), or {}.
    states: KVᵀ and KK before the slices and their counts, or ().
    launch: the static record of the launch.

  Returns:
    A fused launch: [dq (B, T, walks, 16), r, dz (B, walks, T padded)]. dq and
    dz are sums over the values, of which each value tile has its share.
    Else the sums through the states, float32: dnum and dden of x_i for squares,
    dnum of x_i and x_j and dden of x_i and x_j for pairs, each (B, walks, T,
    16); then z and num, (B, walks, T).
  """
  steps = feature_pairs.BACKWARD_QUERIES if launch.pairs else BACKWARD_QUERIES
  if launch.fused:
    vector = jax.ShapeDtypeStruct(
      (launch.B, launch.walks, launch.total_chunks * C), f32
    )
    shape = (launch.B, launch.padded_T, launch.walks, PART)
    dq = jax.ShapeDtypeStruct(shape, launch.array_dtype)
    outputs = (dq, vector, vector)
    staging = (
      Staging("dq", (C, PART), tiles.output_swizzle(launch, PART)),
      Staging("vectors", (2, C), None),
    )
    steps = steps._replace(finish=_finish_queries)
  else:
    widths = [PART] * (4 if launch.pairs else 2)
    outputs, staging = partial_sums.outputs(launch, widths, vectors=2)
    steps = steps._replace(finish=partial_sums.write)
  streams = pipeline.feature_streams(launch, q=q, k=k) | dict(v=v, do=do)
  arrays = pipeline.Arrays(streams, per_token, states, outputs, staging)
  return pipeline.run("backward_queries", launch, steps, arrays)


def backward_keys(
  q: Array,
  k: Array,
  v: Array,
  do: Array,
  per_token: dict[str, Array],
  states: tuple,
  launch: Launch,
  *,
  write_states: bool,
) -> tuple[list[Array], list[Array]]:
  """Run the derivative with respect to the keys and values, of one launch.

  Args:
    q: (B, T, H, 16 · parts), padded as `launch.Plan` pads it.
    k: likewise.
    v: (B, T, H, P), padded likewise.
    do: likewise.
    per_token: r and dz, (B, H · value_tiles, T padded), dz being 0 except in
      the first tile of a head; and the codes of documents.
    states: the cotangents of KVᵀ and KK after the slices, or ().
    launch: the static record of the launch.
    write_states: whether to return the cotangents before the slices.

  Returns:
    (outputs, states). The outputs of a fused launch are dk (B, T, walks, 16),
    of which each value tile has its share, and dv (B, T, H, P). Else they are
    the sums through the states, float32: dk of x_i, for pairs also that of x_j,
    (B, walks, T, 16), and dv (B, walks, T, tile width). The states are the
    cotangents of [KVᵀ, KK] before each slice, or [].
  """
  steps = feature_pairs.BACKWARD_KEYS if launch.pairs else BACKWARD_KEYS
  if launch.fused:
    at = launch.B, launch.padded_T
    outputs = (
      jax.ShapeDtypeStruct((*at, launch.walks, PART), launch.array_dtype),
      jax.ShapeDtypeStruct((*at, launch.H, launch.P), launch.array_dtype),
    )
    staging = (
      Staging("dk", (C, PART), tiles.output_swizzle(launch, PART)),
      pipeline.value_staging("dv", launch),
    )
    steps = steps._replace(finish=_finish_keys)
  else:
    widths = [PART] * (2 if launch.pairs else 1) + [launch.tile_width]
    outputs, staging = partial_sums.outputs(launch, widths, vectors=0)
    steps = steps._replace(finish=partial_sums.write_gradients)
  arrays = pipeline.Arrays(
    pipeline.feature_streams(launch, q=q, k=k) | dict(v=v, do=do),
    per_token,
    states,
    outputs,
    staging,
    write_states=write_states,
    from_end=True,
  )
  found = pipeline.run("backward_keys", launch, steps, arrays)
  return found[: len(outputs)], found[len(outputs) :]


def query_cotangents(
  q: Array, do: Array, per_token: dict[str, Array], launch: Launch
) -> list[Array]:
  """Sum the cotangent of the state before each slice, from its queries alone.

  Args:
    q: (B, T, H, 16 · parts), padded.
    do: (B, T, H, P), padded.
    per_token: as `backward_keys` takes it.
    launch: the static record of the launch.

  Returns:
    The cotangents of [KVᵀ, KK], each (slices, B, walks, TILE, ·) float32.
  """
  steps = feature_pairs.SUM_QUERIES if launch.pairs else SUM_QUERIES
  arrays = pipeline.Arrays(
    pipeline.feature_streams(launch, q=q) | dict(do=do),
    per_token,
    write_states=True,
    from_end=True,
  )
  return pipeline.run("query_cotangent", launch, steps, arrays)


# The walk from the first token: dq, r and dz.


def _query_gradients(work: Work, chunk, slot):
  """Compute what dq gets from the tokens before the chunk.

  dq = r dnum + dz dden, where dnum and dden are the gradients of num = do·Σ
  sim' v and of z = Σ sim'. Where sim' is a square, num is homogeneous of degree
  2 in q. It is q·dnum / 2 then, by Euler's theorem.

  Returns:
    (dnum, dden, z, num): (C, PART) twice and (C,) twice, float32.
  """
  launch = work.launch
  q_s, do_s = (tiles.read(work, slot, name) for name in ("q", "do"))
  x = tiles.load(work, slot, "q")
  dnum, linear, num = tiles.zeros((C, PART)), None, None
  for blocks in launch.block_groups(features.QUERY_GRADIENT_BLOCKS):
    u, rolled = features.through_features(work, do_s, q_s, blocks)
    if launch.affine:
      phi = features.query_features(x, rolled, blocks, launch)
      for i, phi_r in enumerate(phi):
        dot = (u[:, block(i)] * phi_r.astype(f32)).sum(axis=1)
        num = dot if num is None else num + dot
    dnum = features.add_square_gradient(
      work, dnum, u, rolled, x, blocks, weighted=True
    )
    if launch.c1 and SQUARE_BLOCKS in blocks:
      linear = u[:, block(SQUARE_BLOCKS - blocks.start)] * launch.c1
  dnum = times(dnum, launch.c2)
  dnum = dnum if linear is None else dnum + linear
  products = mmas(work, *features.denominator_products(work, q_s))
  quadratic, form = features.denominator_forms(work, products)
  z = (form * x.astype(f32)).sum(axis=1)
  if launch.c0:
    z = z + launch.c0 * documents.past_tokens(work, chunk, slot)
  if num is None:
    num = (dnum * x.astype(f32)).sum(axis=1) * 0.5

  def mask(y):
    return documents.mask(work, slot, OF_STATE_BEFORE, y)

  dnum, num = (mask(times(y, 1 / launch.state_scale)) for y in (dnum, num))
  return dnum, mask(quadratic + form), mask(z), num


def _finish_queries(work: Work, chunk, slot, from_outside) -> None:
  """Add the tokens of the chunk, and write dq, r and dz.

  r and dz are complete before the gradients da of the scores are rounded. Where
  a query sees one key only, the two terms of da are equal and cancel.
  """
  launch, width = work.launch, QUERY_GRADIENT_COLUMNS
  q_s, k_s, v_s, do_s = (
    tiles.read(work, slot, x) for x in ("q", "k", "v", "do")
  )
  dnum, dden, z, num = from_outside
  scores = []
  for start in range(0, C, width):
    some = pl.ds(start, width)
    a, dsim = mmas(
      work,
      ((C, width), (q_s, tiles.transpose(tiles.select(k_s, some)))),
      ((C, width), (do_s, tiles.transpose(tiles.select(v_s, some)))),
    )
    seen = documents.causal_mask(work, slot, start, width, query_axis=0)
    sim = jnp.where(seen, tiles.polynomial(a, launch), 0.0)
    z = z + sim.sum(axis=1)
    num = num + (sim * dsim).sum(axis=1)
    scores.append((start, a, dsim))
  r = 1.0 / (z + launch.eps)
  dz = -(num * r) * r
  dq = columns(r, PART) * dnum + columns(dz, PART) * dden
  for start, a, dsim in scores:
    slope = tiles.derivative(a, launch)
    da = (columns(r, width) * dsim + columns(dz, width)) * slope
    seen = documents.causal_mask(work, slot, start, width, query_axis=0)
    da = jnp.where(seen, da, 0.0)
    k_lines = tiles.select(k_s, pl.ds(start, width))
    dq = add_mma(work, dq, (operand(launch, da), k_lines))
  _write_queries(work, chunk, dq, r, dz)


def _write_queries(work: Work, chunk, dq, r, dz) -> None:
  """Write a chunk's dq, r and dz; r and dz are 0 beyond the end of the row."""
  launch, here = work.launch, work.here
  dq_s, vectors_s = work.staging["dq"], work.staging["vectors"]
  dq_ref, r_ref, dz_ref = work.outputs
  tokens = pl.ds(chunk * C, C)
  token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=FIRST_AXIS)
  exists = chunk * C + token < launch.T
  plgpu.wait_smem_to_gmem(0)
  dq_s[...] = dq.astype(launch.array_dtype)
  vectors_s[0] = jnp.where(exists, r, 0.0)
  vectors_s[1] = jnp.where(exists, dz, 0.0)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(dq_s, dq_ref.at[here.b, tokens, here.walk])
  plgpu.copy_smem_to_gmem(vectors_s.at[0], r_ref.at[here.b, here.walk, tokens])
  plgpu.copy_smem_to_gmem(vectors_s.at[1], dz_ref.at[here.b, here.walk, tokens])


BACKWARD_QUERIES = forward.SUM_KEYS._replace(through_state=_query_gradients)


# The walk from the last token: dk and dv.


def _write_query_features(work: Work, chunk, slot) -> None:
  """Write r times the weighted features of the queries, and dz q̃."""
  del chunk
  launch, shared = work.launch, work.shared
  x, q_s = documents.load_masked(work, slot, OF_STATE_BEFORE, "q", "do")
  r, dz = features.query_factors(work, slot)
  x_f32 = x.astype(f32)
  for blocks in launch.block_groups(features.BLOCKS_AT_ONCE):
    rolled = features.roll(work, q_s, blocks)
    phi = features.query_features(x, rolled, blocks, launch, r)
    features.store_blocks(work, blocks, phi)
  first, second = ((slice(None), pl.ds(n * PART, PART)) for n in (0, 1))
  extended = x_f32 * times(dz, launch.c2)
  store(shared.extended, first, operand(launch, extended))
  if launch.c1:
    line = jnp.where(tiles.iota((C, PART), 1) == 0, dz * launch.c1, 0.0)
    store(shared.extended, second, operand(launch, line))


def _summed_queries(work: Work, slot):
  return documents.summed_tiles(work, slot, "q", "do")


def _key_gradients(work: Work, chunk, slot):
  """Compute dk (C, PART) and dv (C, TILE) from the queries after the chunk."""
  del chunk
  launch = work.launch
  k_s, v_s = (tiles.read(work, slot, name) for name in "kv")
  x = tiles.load(work, slot, "k")
  dk = 2.0 * mma(work, *features.times_kk(work, k_s), shape=(C, PART))
  if launch.c1:
    one = tiles.two_columns(launch.dtype, 1.0, 0.0)
    line = high_low(work.shared.kk, PART)
    dk = dk + mma(work, *[(one, half) for half in line], shape=(C, PART))
  for blocks in launch.block_groups(features.KEY_GRADIENT_BLOCKS):
    u, rolled = features.through_features(work, v_s, k_s, blocks)
    dk = features.add_square_gradient(
      work, dk, u, rolled, x, blocks, weighted=False
    )
    if launch.c1 and SQUARE_BLOCKS in blocks:
      dk = dk + u[:, block(SQUARE_BLOCKS - blocks.start)]
  rolled = features.roll_all(work, k_s)
  phi = features.key_features(x, rolled, range(launch.blocks), launch)
  dv = mma(work, *features.times_kv(work, phi), shape=(C, TILE))
  dk = documents.mask(work, slot, OF_STATE_AFTER, dk)
  return dk, documents.mask(work, slot, OF_STATE_AFTER, dv)


def _finish_keys(work: Work, chunk, slot, from_outside) -> None:
  """Add the queries of the chunk, and write dk and dv.

  The scores are [key, query] here, so that sums over queries are products with
  a left operand in registers.
  """
  launch, here, width = work.launch, work.here, KEY_GRADIENT_COLUMNS
  q_s, k_s, v_s, do_s = (
    tiles.read(work, slot, x) for x in ("q", "k", "v", "do")
  )

  def for_each_key(name, some):
    value = plgpu.load(work.inputs[name].at[slot, some], layout=SECOND_AXIS)
    value = times(value, launch.gradient_scale)
    return lax.broadcast_in_dim(value, (C, width), [1])

  dk, dv = from_outside
  for start in range(0, C, width):
    some = pl.ds(start, width)
    a, dsim = mmas(
      work,
      ((C, width), (k_s, tiles.transpose(tiles.select(q_s, some)))),
      ((C, width), (v_s, tiles.transpose(tiles.select(do_s, some)))),
    )
    r, dz = for_each_key("r", some), for_each_key("dz", some)
    seen = documents.causal_mask(work, slot, start, width, query_axis=1)
    da = (r * dsim + dz) * tiles.derivative(a, launch)
    da = operand(launch, jnp.where(seen, da, 0.0))
    sim = jnp.where(seen, r * tiles.polynomial(a, launch), 0.0)
    dk, dv = add_mmas(
      work,
      (dk, (da, tiles.select(q_s, some))),
      (dv, (operand(launch, sim), tiles.select(do_s, some))),
    )
  plgpu.wait_smem_to_gmem(0)
  dk_s, dv_s = work.staging["dk"], work.staging["dv"]
  dk_s[...] = times(dk, 1 / launch.gradient_scale).astype(launch.array_dtype)
  dv = times(dv, 1 / launch.gradient_scale)
  dv_s[...] = dv[:, : launch.tile_width].astype(launch.array_dtype)
  plgpu.commit_smem()
  tokens = pl.ds(chunk * C, C)
  dk_ref, dv_ref = work.outputs
  plgpu.copy_smem_to_gmem(dk_s, dk_ref.at[here.b, tokens, here.walk])
  plgpu.copy_smem_to_gmem(dv_s, tiles.value_columns(work, dv_ref, chunk))


SUM_QUERIES = pipeline.Steps(_write_query_features, _summed_queries)
BACKWARD_KEYS = SUM_QUERIES._replace(through_state=_key_gradients)
