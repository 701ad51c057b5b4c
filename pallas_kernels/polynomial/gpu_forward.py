"""Hopper kernels of the forward: o, and the state after a slice of time."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial import gpu_common as common, gpu_walk
from pallas_kernels.polynomial.gpu_common import (
  LAYOUT,
  TILE,
  C,
  F,
  V,
  add_mma,
  bf16,
  f32,
  mma,
  mmas,
)


def forward(q, k, v, kv, kk, count, call: common.Call, *, state: bool):
  """o (B, T, H, P) and, where asked for, (KVᵀ, KK) behind each slice.

  Args:
    q, k: (B, T, H, 16) bf16; v: (B, T, H, P) bf16.
    kv, kk, count: the states before the slices, (slices, B, H, …); or None.
    call: the launch.
    state: whether to write the states behind the slices.
  """
  before = kv is not None

  def body(*refs, q, k, v, o, shared, rolls, once):
    q_ref, k_ref, v_ref, rolls_ref, *rest = refs
    states, rest = (rest[:3], rest[3:]) if before else (None, rest)
    o_ref, *after = rest
    gpu_walk.walk(
      call,
      lambda *head: _parts(*head, o, o_ref, rolls, call),
      ((q_ref, q), (k_ref, k), (v_ref, v)),
      (),
      shared,
      (rolls_ref, rolls, once),
      states=states,
      after=after or None,
    )

  out = [jax.ShapeDtypeStruct((call.B, call.rows, call.H, call.P), bf16)]
  scratch = gpu_walk.scratch(call, dict(q=F, k=F, v=V))
  wide = common.SWIZZLE_128 if call.P == V else common.SWIZZLE_32
  scratch["o"] = common.smem(
    gpu_walk.heads(alone=False), C, call.P, swizzle=wide
  )
  return gpu_walk.launch(
    body,
    call,
    "polynomial_forward",
    out=out + gpu_walk.state_shapes(call) * state,
    scratch=scratch,
  )(q, k, v, jnp.asarray(common.rolls(), bf16), *(kv, kk, count) * before)


def _parts(here, shared, inputs, count, o, o_ref, rolls_s, call):
  q, k, v = inputs
  o_s = o.at[here.p]

  def through_state(chunk, slot):
    past = count + ((chunk - here.first) * C).astype(f32)
    return _through_state(q.at[slot], shared, rolls_s, past, call)

  def within(chunk, slot, part):
    num, z = _within(q.at[slot], k.at[slot], v.at[slot], part, call)
    value = num / common.columns(z + call.eps, V)
    plgpu.wait_smem_to_gmem(0)
    o_s[...] = value[:, : call.P].astype(bf16)
    plgpu.commit_smem()
    rows = pl.ds(chunk * C, C)
    plgpu.copy_smem_to_gmem(o_s, o_ref.at[here.b, rows, here.h])

  keys = key_parts(shared, (k, v), rolls_s, call)
  return keys._replace(through_state=through_state, within=within)


def key_parts(shared, inputs, rolls_s, call) -> gpu_walk.Parts:
  """The parts that sum keys."""
  k, v = inputs
  return gpu_walk.Parts(
    lambda chunk, slot: common.store_keys(
      k.at[slot], rolls_s, shared.phi, shared.wide, chunk, call
    ),
    lambda chunk, slot: (k.at[slot], v.at[slot]),
  )


def _through_state(q_s, shared, rolls_s, past, call: common.Call):
  """(Σ sim' v, Σ sim') of the tokens before the chunk, (C, V) and (C,)."""
  rolled = common.roll_all(q_s, rolls_s)
  x = plgpu.load(q_s, layout=LAYOUT)
  phi = common.query_features(x, rolled, range(call.blocks), call)
  kv = lambda r: shared.kv.at[:, pl.ds(r * F, F)].transpose((1, 0))
  num, quadratic, *linear = mmas(
    ((C, V), *[(y, kv(r)) for r, y in enumerate(phi)]),
    *common.denominator(q_s, shared.kk, call),
  )
  form = quadratic + linear[0] if linear else quadratic
  return num, (form * x.astype(f32)).sum(axis=1) + call.c0 * past


def _within(q_s, k_s, v_s, part, call: common.Call):
  """The sums with the tokens of the chunk."""
  num, z = part
  for start in range(0, C, TILE):
    some = pl.ds(start, TILE)
    a = mma((q_s, k_s.at[some].transpose((1, 0))), shape=(C, TILE))
    seen = common.seen(start, queries=0)
    sim = jnp.where(seen, common.polynomial(a, call), 0.0)
    num = add_mma(num, (sim.astype(bf16), v_s.at[some]))
    z = z + sim.sum(axis=1)
  return num, z


def key_states(k, v, call: common.Call):
  """(KVᵀ, KK) of each slice's own keys: (slices, B, H, V, E), (…, V, F)."""

  def body(k_ref, v_ref, rolls_ref, *after, k, v, shared, rolls, once):
    gpu_walk.walk(
      call,
      lambda _, mine, inputs, __: key_parts(mine, inputs, rolls, call),
      ((k_ref, k), (v_ref, v)),
      (),
      shared,
      (rolls_ref, rolls, once),
      after=after,
    )

  return gpu_walk.launch(
    body,
    call,
    "polynomial_key_state",
    out=gpu_walk.state_shapes(call),
    scratch=gpu_walk.scratch(call, dict(k=F, v=V), alone=True),
    alone=True,
  )(k, v, jnp.asarray(common.rolls(), bf16))
