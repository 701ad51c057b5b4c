"""The TPU kernels of the backward: a sweep to the right, one to the left.

With g = r·do, r = 1 / (z + eps) and J the Jacobian of the features,

    do·num = Σ_s sim_ts do_t·v_s + φ_w(q_t)·(KV do_t),   dz = −r² do·num
    da_ts  = (r_t do_t·v_s + dz_t) (c1' + 2 a_ts)
    dq_t   = Σ_s da_ts k_s + r J(q_t)ᵀ (w∘KV do_t) + 2 dz_t (W∘KK) q̃_t
    dk_s   = Σ_t da_ts q_t + J(k_s)ᵀ (dKV v_s)    + 2 dKK k̃_s
    dv_s   = Σ_t sim_ts g_t + dKVᵀ φ(k_s)
    dKV    = Σ_t φ_w(q_t) g_tᵀ,   dKK = W∘Σ_t dz_t q̃_t q̃_tᵀ

do·num is not taken from the rounded o: where rows are alike, what is left of
r do·v + dz would be smaller than that rounding. All is divided by c2, so r and
dz are c2 times those of `spec.py`; the cotangents of the state are the same.
"""

import functools

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu import chunks as common
from pallas_kernels.polynomial.tpu.chunks import Call, Masks
from pallas_kernels.polynomial.tpu.forward import (
  key_sums,
  similarity,
  through_kk,
)


def backward_queries(
  q_BRT: Array,
  k_BRT: Array,
  v_BRT: Array,
  do_BRT: Array,
  start_B1T: Array | None,
  state: tuple[Array, Array] | None,
  call: Call,
) -> tuple[Array, Array, Array]:
  """dq_BRT, r_BH1T, dz_BH1T; the state is (KV_BHEP, KK_BHGG)."""
  inputs = [
    (q_BRT, common.tokens(call.F, call)),
    (k_BRT, common.tokens(call.F, call)),
    (v_BRT, common.tokens(call.P, call)),
    (do_BRT, common.tokens(call.P, call)),
  ]
  sizes = (call.E, call.V), (call.G, call.G)
  if start_B1T is not None:
    inputs.append((start_B1T, common.starts(call)))
  inputs += common.states_in(state, sizes, call)
  row = jax.ShapeDtypeStruct((call.B, call.H, 1, call.T), jnp.float32)
  dq = jax.ShapeDtypeStruct(q_BRT.shape, q_BRT.dtype)
  outputs = [
    (dq, common.tokens(call.F, call)),
    (row, common.scalars(call)),
    (row, common.scalars(call)),
  ]
  body = functools.partial(
    _queries_body,
    call=call,
    has_ids=start_B1T is not None,
    has_state=state is not None,
  )
  return tuple(
    common.run(body, call, inputs, outputs, sizes, "backward_queries")
  )


def _queries_body(*refs, call: Call, has_ids: bool, has_state: bool):
  q_ref, k_ref, v_ref, do_ref, *refs = refs
  start_ref = refs.pop(0) if has_ids else None
  before = (refs.pop(0), refs.pop(0)) if has_state else None
  dq_ref, r_ref, dz_ref, kv_ref, kk_ref = refs

  common.begin((kv_ref, kk_ref), before)

  def chunk(head, at, begin):
    kv, kk = kv_ref.at[head], kk_ref.at[head]
    m = common.masks(start_ref, at, begin, call)
    k_FC = common.load(k_ref, head, call.F, at, m.valid_1C)
    v_PC = common.load(v_ref, head, call.P, at, m.valid_1C)
    q_FC = common.load(q_ref, head, call.F, at)
    do_PC = common.load(do_ref, head, call.P, at)
    a_CC = common.dot(k_FC, q_FC, (0, 0), call)
    dsim_CC = common.dot(v_PC, do_PC, (0, 0), call)
    new = key_sums(k_FC, v_PC, m, call, by_feature=True)
    yield
    sim_CC = similarity(a_CC, m, call)
    z_1C = jnp.sum(sim_CC, axis=0, keepdims=True)
    num_CC = jnp.where(m.seen_CC, sim_CC * dsim_CC, 0.0)
    num_1C = jnp.sum(num_CC, axis=0, keepdims=True)
    past = _past(q_FC, do_PC, kv, kk, call)
    common.take_up(new, kv, kk, m, call, by_feature=True)
    yield
    past_FC, past_num_1C, y_GC, past_z_1C = past
    r_1C = 1 / (z_1C + common.only(m.first_1C, past_z_1C) + call.eps)
    num_1C += common.only(m.first_1C, past_num_1C)
    dz_1C = -num_1C * r_1C * r_1C  # r² alone may be Inf
    da_CC = d_scores(a_CC, dsim_CC, r_1C, dz_1C, m, call)
    dq_FC = common.seen_sum(k_FC, da_CC, m, call)
    past_FC = r_1C * past_FC + 2 * dz_1C * y_GC[: call.F]
    dq_FC += common.only(m.first_1C, past_FC)
    common.store(dq_ref, head, call.F, at, dq_FC)
    r_ref[head, :, at] = r_1C
    dz_ref[head, :, at] = dz_1C

  common.each_chunk(chunk, call)


def _past(q_FC, do_PC, kv_ref, kk_ref, call: Call):
  """J(q)ᵀ (w∘KV do), φ_w(q)·(KV do), (W∘KK) q̃ and q̃ᵀ (W∘KK) q̃."""
  y_GC, z_1C = through_kk(q_FC, kk_ref, call)
  wide_FC = q_FC.astype(jnp.float32)
  first_FC = second_FC = num_1C = 0.0
  for group in call.groups():
    u_EC = common.dot(kv_ref[call.rows(group)], do_PC, (1, 0), call)
    one, two = common.pull(u_EC, group, wide_FC, call, weighted=True)
    first_FC, second_FC = first_FC + one, second_FC + two
    if group[2]:
      x = len(group[1]) * call.F
      first_FC += call.c1 * u_EC[x : x + call.F]
      num_1C = call.c0 * u_EC[x + call.F : x + call.F + 1]
  num_1C += jnp.sum(wide_FC * first_FC, axis=0, keepdims=True)
  return first_FC + second_FC, num_1C, y_GC, z_1C


def d_scores(a_CC, dsim_CC, r_1C, dz_1C, m: Masks, call: Call) -> Array:
  """The cotangent of q_t·k_s."""
  slope_CC = 2 * a_CC + call.c1 if call.affine else 2 * a_CC
  da_CC = (r_1C * dsim_CC + dz_1C) * slope_CC
  return jnp.where(m.seen_CC, da_CC, 0.0)


def backward_keys(
  q_BRT: Array,
  k_BRT: Array | None,
  v_BRT: Array | None,
  do_BRT: Array,
  r_BH1T: Array,
  dz_BH1T: Array,
  start_B1T: Array | None,
  dstate: tuple[Array, Array] | None,
  call: Call,
  *,
  return_state: bool,
) -> tuple[Array | None, Array | None, tuple[Array, Array] | None]:
  """dk_BRT, dv_BRT, (dKV_BHEP, dKK_BHGG); without k and v the last alone."""
  has_k = k_BRT is not None
  tokens = functools.partial(common.tokens, call=call, reverse=True)
  inputs = [
    (q_BRT, tokens(call.F)),
    (do_BRT, tokens(call.P)),
    (r_BH1T, common.scalars(call, reverse=True)),
    (dz_BH1T, common.scalars(call, reverse=True)),
  ]
  sizes = (call.E, call.V), (call.G, call.G)
  outputs = []
  if has_k:
    inputs += [(k_BRT, tokens(call.F)), (v_BRT, tokens(call.P))]
    outputs = [
      (jax.ShapeDtypeStruct(x.shape, x.dtype), tokens(rows))
      for x, rows in ((k_BRT, call.F), (v_BRT, call.P))
    ]
  if start_B1T is not None:
    inputs.append((start_B1T, common.starts(call, reverse=True)))
  inputs += common.states_in(dstate, sizes, call)
  if return_state:
    outputs += common.states_out(sizes, call)
  flags = has_k, start_B1T is not None, dstate is not None, return_state
  body = functools.partial(_keys_body, call=call, flags=flags)
  name = "backward_keys" if has_k else "query_cotangent"
  found = list(common.run(body, call, inputs, outputs, sizes, name))
  dk, dv = (found.pop(0), found.pop(0)) if has_k else (None, None)
  return dk, dv, tuple(found) if return_state else None


def _keys_body(*refs, call: Call, flags):
  has_k, has_ids, has_state, return_state = flags
  q_ref, do_ref, r_ref, dz_ref, *refs = refs
  k_ref, v_ref = (refs.pop(0), refs.pop(0)) if has_k else (None, None)
  start_ref = refs.pop(0) if has_ids else None
  after = (refs.pop(0), refs.pop(0)) if has_state else None
  kk_ref, kv_ref = refs.pop(), refs.pop()
  dk_ref, dv_ref = (refs.pop(0), refs.pop(0)) if has_k else (None, None)

  common.begin((kv_ref, kk_ref), after)

  def chunk(head, at, begin):
    kv, kk = kv_ref.at[head], kk_ref.at[head]
    m = common.masks(start_ref, at, begin, call)
    q_FC = common.load(q_ref, head, call.F, at, m.valid_1C)
    do_PC = common.load(do_ref, head, call.P, at, m.valid_1C)
    r_1C, dz_1C = (
      common.only(m.valid_1C, x[head, :, at]) for x in (r_ref, dz_ref)
    )
    g_PC = r_1C * do_PC.astype(jnp.float32)
    if has_k:
      k_FC = common.load(k_ref, head, call.F, at, m.valid_1C)
      v_PC = common.load(v_ref, head, call.P, at, m.valid_1C)
      a_CC = common.dot(k_FC, q_FC, (0, 0), call)
      dsim_CC = common.dot(v_PC, do_PC, (0, 0), call)
    new = _query_sums(q_FC, g_PC, dz_1C, m, call)
    yield
    if has_k:
      sim_CC = similarity(a_CC, m, call)
      da_CC = d_scores(a_CC, dsim_CC, r_1C, dz_1C, m, call)
      dk_FC = common.seen_sum(q_FC, da_CC, m, call, over_queries=True)
      dv_PC = common.seen_sum(g_PC, sim_CC, m, call, over_queries=True)
    yield
    if has_k:
      past_FC, past_PC = _past_keys(k_FC, v_PC, kv, kk, call)
    common.take_up(new, kv, kk, m, call, by_feature=True)
    if has_k:
      dk_FC += common.only(m.last_1C, past_FC)
      dv_PC += common.only(m.last_1C, past_PC)
      common.store(dk_ref, head, call.F, at, dk_FC)
      common.store(dv_ref, head, call.P, at, dv_PC)

  common.each_chunk(chunk, call, reverse=True)

  if return_state:
    common.end((kv_ref, kk_ref), refs, call)


def _past_keys(k_FC, v_PC, kv_ref, kk_ref, call: Call) -> tuple[Array, Array]:
  """J(k)ᵀ (dKV v) + 2 dKK k̃ and dKVᵀ φ(k)."""
  wide_FC = k_FC.astype(jnp.float32)
  k_GC = common.extend(wide_FC, None, call)
  dk_FC = 2 * common.dot_left(kk_ref[...], k_GC, call)[: call.F]
  dv_PC = 0.0
  for group, phi_EC in common.features(wide_FC, call, weighted=False):
    kv_EP = kv_ref[call.rows(group)].astype(call.dtype)
    dv_PC += common.dot(kv_EP, phi_EC, (0, 0), call)
    u_EC = common.dot(kv_EP, v_PC, (1, 0), call)
    one, two = common.pull(u_EC, group, wide_FC, call, weighted=False)
    dk_FC += one + two
    if group[2]:
      x = len(group[1]) * call.F
      dk_FC += u_EC[x : x + call.F]
  return dk_FC, dv_PC


def _query_sums(
  q_FC, g_PC, dz_1C, m: Masks, call: Call
) -> tuple[list[Array], Array]:
  """What the chunk's queries add to dKV, by groups of features, and to dKK."""
  q_FC, g_PC, dz_1C = (common.only(m.first_1C, x) for x in (q_FC, g_PC, dz_1C))
  q_FC = q_FC.astype(jnp.float32)
  new = [
    common.dot(phi_EC, g_PC, (1, 1), call)
    for _, phi_EC in common.features(q_FC, call, weighted=True)
  ]
  q_GC = common.extend(q_FC, None, call)
  new_GG = common.dot_right(dz_1C * q_GC, q_GC, call)
  return new, common.weighted(new_GG, call)
