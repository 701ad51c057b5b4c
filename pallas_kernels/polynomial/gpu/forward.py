"""The forward on Hopper: what a walk does with a chunk of tokens.

`_through_state` is what the queries get from tokens before the chunk,
`_finish` the scores within the chunk; `pipeline.py` has the loop over chunks
that calls them. With sim' of `launch.Launch` and its eps,

    o_t = Σ_{s ≤ t} sim'_ts v_s / (Σ_{s ≤ t} sim'_ts + eps)

    tokens before the chunk     Σ_s sim'_ts v_s = φ(q_t) KV
                                Σ_s sim'_ts     = q̃_tᵀ (W ∘ KK) q̃_t
    tokens of the chunk         scores a = q kᵀ, sim' of them, sim' v

Afterwards the chunk's keys are added: KVᵀ += vᵀ φ(k), KK += k̃ᵀ k.
"""

import jax
from jax import Array
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  documents,
  feature_pairs,
  features,
  partial_sums,
  pipeline,
  tiles,
)
from pallas_kernels.polynomial.gpu.documents import (
  OF_STATE_AFTER,
  OF_STATE_BEFORE,
)
from pallas_kernels.polynomial.gpu.launch import PART, TILE, C, Launch
from pallas_kernels.polynomial.gpu.tiles import (
  SCORE_COLUMNS,
  add_mma,
  columns,
  f32,
  mma,
  mmas,
  operand,
  store,
  times,
)
from pallas_kernels.polynomial.gpu.warpgroup import Work


def forward(
  q: Array,
  k: Array,
  v: Array,
  per_token: dict[str, Array],
  states: tuple,
  launch: Launch,
  *,
  write_states: bool,
) -> tuple[list[Array], list[Array]]:
  """Run the forward of one launch.

  Args:
    q: (B, T, H, 16 · parts), padded as `launch.Plan` pads it.
    k: likewise.
    v: (B, T, H, P), padded likewise.
    per_token: the codes and past of documents, (B, 1, T padded), or {}.
    states: KVᵀ and KK before the slices and their counts, or ().
    launch: the static record of the launch.
    write_states: whether to return the states after the slices.

  Returns:
    (outputs, states). The outputs of a fused launch are [o (B, T, H, P)]. Else
    they are the sums through the states, float32, one for each walk:
    [Σ sim' v (B, walks, T, tile width), Σ sim' (B, walks, T)]. The states are
    [KVᵀ, KK] after each slice, or [].
  """
  steps = feature_pairs.FORWARD if launch.pairs else FORWARD
  if launch.fused:
    shape = (launch.B, launch.padded_T, launch.H, launch.P)
    outputs = (jax.ShapeDtypeStruct(shape, launch.array_dtype),)
    staging = (pipeline.value_staging("o", launch),)
    steps = steps._replace(finish=_finish)
  else:
    outputs, staging = partial_sums.outputs(
      launch, [launch.tile_width], vectors=1
    )
    steps = steps._replace(finish=partial_sums.write)
  arrays = pipeline.Arrays(
    pipeline.feature_streams(launch, q=q, k=k) | dict(v=v),
    per_token,
    states,
    outputs,
    staging,
    write_states=write_states,
  )
  found = pipeline.run("forward", launch, steps, arrays)
  return found[: len(outputs)], found[len(outputs) :]


def key_states(
  k: Array, v: Array, per_token: dict[str, Array], launch: Launch
) -> list[Array]:
  """Sum the state of each slice's own keys.

  Args:
    k: (B, T, H, 16 · parts), padded.
    v: (B, T, H, P), padded.
    per_token: the codes of documents, or {}.
    launch: the static record of the launch.

  Returns:
    [KVᵀ, KK], each (slices, B, walks, TILE, ·) float32.
  """
  steps = feature_pairs.SUM_KEYS if launch.pairs else SUM_KEYS
  streams = pipeline.feature_streams(launch, k=k) | dict(v=v)
  arrays = pipeline.Arrays(streams, per_token, write_states=True)
  return pipeline.run("key_state", launch, steps, arrays)


# What a state of keys sums.


def _write_key_features(work: Work, chunk, slot) -> None:
  """Write φ(k), and k̃ with the constant feature twice, for the update."""
  launch, shared = work.launch, work.shared
  x, k_s = documents.load_masked(work, slot, OF_STATE_AFTER, "k", "v")
  one = None
  if launch.affine:
    one = _exists(work, chunk)
    one = documents.mask(work, slot, OF_STATE_AFTER, one)
  for blocks in launch.block_groups(features.BLOCKS_AT_ONCE):
    rolled = features.roll(work, k_s, blocks)
    phi = features.key_features(x, rolled, blocks, launch, one)
    features.store_blocks(work, blocks, phi)
  first, second = ((slice(None), pl.ds(n * PART, PART)) for n in (0, 1))
  store(shared.extended, first, operand(launch, x))
  if one is not None:
    ones = tiles.two_columns(launch.array_dtype, one)
    store(shared.extended, second, operand(launch, ones))


def _exists(work: Work, chunk):
  """Make 1.0 for the tokens of a chunk that are in the row, (C, PART)."""
  exists = chunk * C + tiles.iota((C, PART), 0) < work.launch.T
  return jnp.where(exists, 1.0, 0.0)


def _summed_keys(work: Work, slot):
  return documents.summed_tiles(work, slot, "k", "v")


# What a chunk of queries gets.


def _through_state(work: Work, chunk, slot):
  """Compute what the tokens before the chunk add, from the state.

  Returns:
    Σ sim' v (C, TILE) and Σ sim' (C,), float32.
  """
  launch, q_s = work.launch, tiles.read(work, slot, "q")
  rolled = features.roll_all(work, q_s)
  x = tiles.load(work, slot, "q")
  phi = features.query_features(x, rolled, range(launch.blocks), launch)
  numerator, *products = mmas(
    work,
    ((C, TILE), *features.times_kv(work, phi)),
    *features.denominator_products(work, q_s),
  )
  _, form = features.denominator_forms(work, products)
  z = (form * x.astype(f32)).sum(axis=1)
  if launch.c0:
    z = z + launch.c0 * documents.past_tokens(work, chunk, slot)
  numerator = documents.mask(
    work, slot, OF_STATE_BEFORE, times(numerator, 1 / launch.state_scale)
  )
  return numerator, documents.mask(work, slot, OF_STATE_BEFORE, z)


def _finish(work: Work, chunk, slot, from_outside) -> None:
  """Add the tokens of the chunk, divide, and write o."""
  launch, o_s = work.launch, work.staging["o"]
  q_s, k_s, v_s = (tiles.read(work, slot, name) for name in "qkv")
  numerator, z = from_outside
  for start in range(0, C, SCORE_COLUMNS):
    some = pl.ds(start, SCORE_COLUMNS)
    operands = q_s, tiles.transpose(tiles.select(k_s, some))
    a = mma(work, operands, shape=(C, SCORE_COLUMNS))
    seen = documents.causal_mask(work, slot, start, SCORE_COLUMNS, query_axis=0)
    sim = jnp.where(seen, tiles.polynomial(a, launch), 0.0)
    numerator = add_mma(
      work, numerator, (operand(launch, sim), tiles.select(v_s, some))
    )
    z = z + sim.sum(axis=1)
  o = numerator / columns(z + launch.eps, TILE)
  plgpu.wait_smem_to_gmem(0)  # the copy of the last chunk's o has read o_s
  o_s[...] = o[:, : launch.tile_width].astype(launch.array_dtype)
  plgpu.commit_smem()
  target = tiles.value_columns(work, work.outputs[0], chunk)
  plgpu.copy_smem_to_gmem(o_s, target)


SUM_KEYS = pipeline.Steps(_write_key_features, _summed_keys)
FORWARD = SUM_KEYS._replace(through_state=_through_state)
