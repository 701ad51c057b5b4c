"""The TPU kernels of the forward: o, and the state after the last token.

    num_t = Σ_s sim_ts v_s + KVᵀ φ_w(q_t)
    z_t   = Σ_s sim_ts     + q̃_tᵀ (W∘KK) q̃_t
    o_t   = num_t / (z_t + eps)

over the s of t's chunk; then KV and KK take the chunk's keys up. KVᵀ (P, E)
and KK are float32 in VMEM from block to block of a row. All is divided by c2.
"""

import functools

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu import chunks as common
from pallas_kernels.polynomial.tpu.chunks import Call, Masks


def forward(
  q_BRT: Array | None,
  k_BRT: Array,
  v_BRT: Array,
  start_B1T: Array | None,
  state: tuple[Array, Array] | None,
  call: Call,
  *,
  return_state: bool,
) -> tuple[Array | None, tuple[Array, Array] | None]:
  """(o_BRT, (KVᵀ_BHPE, KK_BHGG)); without q the state alone."""
  has_q, has_ids, has_state = (x is not None for x in (q_BRT, start_B1T, state))
  inputs = [
    (k_BRT, common.tokens(call.F, call)),
    (v_BRT, common.tokens(call.P, call)),
  ]
  sizes = (call.V, call.E), (call.G, call.G)
  if has_q:
    inputs.append((q_BRT, common.tokens(call.F, call)))
  if has_ids:
    inputs.append((start_B1T, common.starts(call)))
  inputs += common.states_in(state, sizes, call)
  outputs = []
  if has_q:
    shape = jax.ShapeDtypeStruct(v_BRT.shape, v_BRT.dtype)
    outputs.append((shape, common.tokens(call.P, call)))
  if return_state:
    outputs += common.states_out(sizes, call)
  body = functools.partial(
    _body, call=call, flags=(has_q, has_ids, has_state, return_state)
  )
  name = "forward" if has_q else "key_state"
  found = list(common.run(body, call, inputs, outputs, sizes, name))
  o = found.pop(0) if has_q else None
  return o, tuple(found) if return_state else None


def _body(*refs, call: Call, flags):
  has_q, has_ids, has_state, return_state = flags
  refs = list(refs)
  k_ref, v_ref = refs.pop(0), refs.pop(0)
  q_ref = refs.pop(0) if has_q else None
  start_ref = refs.pop(0) if has_ids else None
  before = (refs.pop(0), refs.pop(0)) if has_state else None
  kk_ref, kv_ref = refs.pop(), refs.pop()
  o_ref = refs.pop(0) if has_q else None

  common.begin((kv_ref, kk_ref), before)

  def chunk(head, at, begin):
    kv, kk = kv_ref.at[head], kk_ref.at[head]
    m = common.masks(start_ref, at, begin, call)
    k_FC = common.load(k_ref, head, call.F, at, m.valid_1C)
    v_PC = common.load(v_ref, head, call.P, at, m.valid_1C)
    if has_q:
      q_FC = common.load(q_ref, head, call.F, at)
      a_CC = common.dot(k_FC, q_FC, (0, 0), call)
    new = key_sums(k_FC, v_PC, m, call, by_feature=False)
    yield
    if has_q:
      sim_CC = similarity(a_CC, m, call)
      num_PC = common.seen_sum(v_PC, sim_CC, m, call)
      z_1C = jnp.sum(sim_CC, axis=0, keepdims=True)
    yield
    if has_q:
      past_PC, past_1C = _past(q_FC, kv, kk, call)
    common.take_up(new, kv, kk, m, call, by_feature=False)
    if has_q:
      z_1C += common.only(m.first_1C, past_1C)
      num_PC += common.only(m.first_1C, past_PC)
      o_PC = num_PC * (1 / (z_1C + call.eps))
      common.store(o_ref, head, call.P, at, o_PC)

  common.each_chunk(chunk, call)

  if return_state:
    common.end((kv_ref, kk_ref), refs, call)


def similarity(a_CC: Array, m: Masks, call: Call) -> Array:
  """sim / c2 of q·k, 0 where it is not seen."""
  sim_CC = a_CC * a_CC
  if call.affine:
    sim_CC = a_CC * (a_CC + call.c1) + call.c0
  return jnp.where(m.seen_CC, sim_CC, 0.0)


def through_kk(q_FC, kk_ref, call: Call) -> tuple[Array, Array]:
  """((W∘KK) q̃, q̃ᵀ (W∘KK) q̃)."""
  q_GC = common.extend(q_FC.astype(jnp.float32), None, call)
  y_GC = common.dot_left(common.weighted(kk_ref[...], call), q_GC, call)
  return y_GC, jnp.sum(q_GC * y_GC, axis=0, keepdims=True)


def _past(q_FC, kv_ref, kk_ref, call: Call) -> tuple[Array, Array]:
  """num_PC and z_1C of the state."""
  _, z_1C = through_kk(q_FC, kk_ref, call)
  num_PC = 0.0
  phi = common.features(q_FC.astype(jnp.float32), call, weighted=True)
  for group, phi_EC in phi:
    num_PC += common.dot(kv_ref[:, call.rows(group)], phi_EC, (1, 0), call)
  return num_PC, z_1C


def key_sums(
  k_FC, v_PC, m: Masks, call: Call, *, by_feature: bool
) -> tuple[list[Array], Array]:
  """What the chunk's keys add to KV, by groups of features, and to KK."""
  k_FC, v_PC = (common.only(m.last_1C, x) for x in (k_FC, v_PC))
  k_FC = k_FC.astype(jnp.float32)
  new = []
  for _, phi_EC in common.features(k_FC, call, weighted=False):
    pair = (phi_EC, v_PC) if by_feature else (v_PC, phi_EC)
    new.append(common.dot(*pair, (1, 1), call))
  one_1C = None
  for mask in (m.valid_1C, m.last_1C):
    if mask is not None:
      one = jnp.where(mask, 1.0, 0.0)
      one_1C = one if one_1C is None else one_1C * one
  k_GC = common.extend(k_FC, one_1C, call)
  return new, common.dot(k_GC, k_GC, (1, 1), call)
