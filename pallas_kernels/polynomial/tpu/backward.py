"""The two TPU kernels of the backward, from left to right and back.

With a = q·k, g = r·do, r = 1 / (z + eps) and J the Jacobian of the features,

    do·num = Σ_s sim_ts do_t·v_s + φ_w(q_t)·(KV do_t),   dz = −r² do·num
    da_ts  = (r_t do_t·v_s + dz_t) (c1' + 2 a_ts)
    dq_t   = Σ_s da_ts k_s + r J(q_t)ᵀ (w∘KV do_t) + 2 dz_t (W∘KK) q̃_t
    dk_s   = Σ_t da_ts q_t + J(k_s)ᵀ (dKV v_s)    + 2 dKK k̃_s
    dv_s   = Σ_t sim_ts g_t + dKVᵀ φ(k_s)
    dKV    = Σ_t φ_w(q_t) g_tᵀ,   dKK = W∘Σ_t dz_t q̃_t q̃_tᵀ

`backward_queries` recomputes the state from left to right and gives dq, r and
dz. `backward_keys` carries dKV and dKK from right to left and gives dk and dv.

do·num is not taken from the output o, which is rounded. Where the values of a
row are alike, r do·v and dz nearly cancel, and what is left is smaller than
that rounding.

All is divided by c2 (`call.py`), so r and dz are c2 times those of
`operator.py`. The cotangents of the state are the same.
"""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu import chunks, launch
from pallas_kernels.polynomial.tpu.call import Call
from pallas_kernels.polynomial.tpu.chunks import StateSums
from pallas_kernels.polynomial.tpu.features import (
  extend,
  feature_cotangent,
  features,
  weigh_denominator,
)
from pallas_kernels.polynomial.tpu.forward import (
  denominator_products,
  key_sums,
  similarity,
)
from pallas_kernels.polynomial.tpu.launch import Refs
from pallas_kernels.polynomial.tpu.masks import (
  Masks,
  make_masks,
  sum_over_seen,
  zero_outside,
)
from pallas_kernels.polynomial.tpu.products import (
  dot,
  dot_exact_left,
  dot_exact_right,
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
  """Run the kernel from left to right.

  Args:
    q_BRT: queries, R = H·F.
    k_BRT: keys, R = H·F.
    v_BRT: values, R = H·P.
    do_BRT: the cotangent of o, R = H·P.
    start_B1T: the position where each token's document starts; None for one
      document a row.
    state: the state before token 0, (KV_BHEV, KK_BHGG); None for zeros.
    call: the launch.

  Returns:
    (dq_BRT, r_BH1T, dz_BH1T).
  """
  sizes = (call.E, call.V), (call.G, call.G)
  inputs = {
    "q": (q_BRT, launch.token_spec(call.F, call)),
    "k": (k_BRT, launch.token_spec(call.F, call)),
    "v": (v_BRT, launch.token_spec(call.P, call)),
    "do": (do_BRT, launch.token_spec(call.P, call)),
  }
  if start_B1T is not None:
    inputs["starts"] = start_B1T, launch.starts_spec(call)
  inputs |= launch.initial_state(state, sizes, call)
  dq = jax.ShapeDtypeStruct(q_BRT.shape, q_BRT.dtype)
  scalars = jax.ShapeDtypeStruct((call.B, call.H, 1, call.T), jnp.float32)
  outputs = {
    "dq": (dq, launch.token_spec(call.F, call)),
    "r": (scalars, launch.scalar_spec(call)),
    "dz": (scalars, launch.scalar_spec(call)),
  }
  found = launch.launch(
    _queries_body, call, inputs, outputs, sizes, "backward_queries"
  )
  return found["dq"], found["r"], found["dz"]


def _queries_body(refs: Refs, call: Call) -> None:
  chunks.start_state(refs)

  def chunk(head, lanes, position):
    # Stage 1: products of the chunk's tokens.
    kv_ref, kk_ref = refs["kv"].at[head], refs["kk"].at[head]
    masks = make_masks(refs.get("starts"), lanes, position, call)
    k_FC = chunks.load(refs["k"], head, call.F, lanes, masks.valid_1C)
    v_VC = chunks.load(refs["v"], head, call.P, lanes, masks.valid_1C)
    q_FC = chunks.load(refs["q"], head, call.F, lanes)
    do_VC = chunks.load(refs["do"], head, call.P, lanes)
    a_CC = dot(k_FC, q_FC, (0, 0), call)
    dsim_CC = dot(v_VC, do_VC, (0, 0), call)
    sums = key_sums(k_FC, v_VC, masks, call, by_feature=True)
    yield
    # Stage 2: the sums within the chunk; the state is read and then updated.
    sim_CC = similarity(a_CC, masks, call)
    z_1C = jnp.sum(sim_CC, axis=0, keepdims=True)
    do_num_CC = jnp.where(masks.seen_CC, sim_CC * dsim_CC, 0.0)
    do_num_1C = jnp.sum(do_num_CC, axis=0, keepdims=True)
    past = _past_query_terms(q_FC, do_VC, kv_ref, kk_ref, call)
    chunks.add_to_state(sums, kv_ref, kk_ref, masks, call, by_feature=True)
    yield
    # Stage 3: r, dz and dq.
    past_dq_FC, past_do_num_1C, y_GC, past_z_1C = past
    r_1C = 1 / (z_1C + zero_outside(masks.first_1C, past_z_1C) + call.eps)
    do_num_1C += zero_outside(masks.first_1C, past_do_num_1C)
    dz_1C = -do_num_1C * r_1C * r_1C  # in this order, since r² may be Inf
    da_CC = product_cotangent(a_CC, dsim_CC, r_1C, dz_1C, masks, call)
    dq_FC = sum_over_seen(k_FC, da_CC, masks, call)
    past_dq_FC = r_1C * past_dq_FC + 2 * dz_1C * y_GC[: call.F]
    dq_FC += zero_outside(masks.first_1C, past_dq_FC)
    chunks.store(refs["dq"], head, call.F, lanes, dq_FC)
    refs["r"][head, :, lanes] = r_1C
    refs["dz"][head, :, lanes] = dz_1C

  chunks.for_each_chunk(chunk, call)


def _past_query_terms(
  q_FC: Array, do_VC: Array, kv_ref: Any, kk_ref: Any, call: Call
) -> tuple[Array, Array, Array, Array]:
  """Compute what the state adds to the terms of a query.

  Returns:
    (J(q)ᵀ (w∘KV do) (F, C), φ_w(q)·(KV do) (1, C), (W∘KK) q̃ (G, C),
    q̃ᵀ (W∘KK) q̃ (1, C)).
  """
  y_GC, z_1C = denominator_products(q_FC, kk_ref, call)
  wide_FC = q_FC.astype(jnp.float32)
  first_FC: Any = 0.0
  second_FC: Any = 0.0
  do_num_1C: Any = 0.0
  for group in call.groups():
    u_EC = dot(kv_ref[group.rows], do_VC, (1, 0), call)
    first, second = feature_cotangent(u_EC, group, wide_FC, call, weighted=True)
    first_FC, second_FC = first_FC + first, second_FC + second
    if group.affine:
      x = len(group.shifts) * call.F
      first_FC += call.c1 * u_EC[x : x + call.F]
      do_num_1C = call.c0 * u_EC[x + call.F : x + call.F + 1]
  # q·(first term) is φ_w(q)·u but for the 1.
  do_num_1C += jnp.sum(wide_FC * first_FC, axis=0, keepdims=True)
  return first_FC + second_FC, do_num_1C, y_GC, z_1C


def product_cotangent(
  a_CC: Array,
  dsim_CC: Array,
  r_1C: Array,
  dz_1C: Array,
  masks: Masks,
  call: Call,
) -> Array:
  """Compute da (C, C), the cotangent of q_t·k_s, from dsim = do_t·v_s."""
  slope_CC = 2 * a_CC + call.c1 if call.affine else 2 * a_CC
  da_CC = (r_1C * dsim_CC + dz_1C) * slope_CC
  return jnp.where(masks.seen_CC, da_CC, 0.0)


def backward_keys(
  q_BRT: Array,
  k_BRT: Array,
  v_BRT: Array,
  do_BRT: Array,
  r_BH1T: Array,
  dz_BH1T: Array,
  start_B1T: Array | None,
  dstate: tuple[Array, Array] | None,
  call: Call,
  *,
  return_state: bool,
) -> tuple[Array, Array, tuple[Array, Array] | None]:
  """Run the kernel from right to left.

  Args:
    q_BRT: queries, R = H·F.
    k_BRT: keys, R = H·F.
    v_BRT: values, R = H·P.
    do_BRT: the cotangent of o, R = H·P.
    r_BH1T: of `backward_queries`.
    dz_BH1T: of `backward_queries`.
    start_B1T: the position where each token's document starts; None for one
      document a row.
    dstate: the cotangent of the state after the last token,
      (dKV_BHEV, dKK_BHGG); None for zeros.
    call: the launch.
    return_state: whether to return the cotangent of the state before token 0.

  Returns:
    (dk_BRT, dv_BRT, (dKV_BHEV, dKK_BHGG)); the last is None unless asked for.
  """
  sizes = (call.E, call.V), (call.G, call.G)
  key_spec = launch.token_spec(call.F, call, reverse=True)
  value_spec = launch.token_spec(call.P, call, reverse=True)
  inputs = _query_inputs(q_BRT, do_BRT, r_BH1T, dz_BH1T, call)
  inputs |= {"k": (k_BRT, key_spec), "v": (v_BRT, value_spec)}
  if start_B1T is not None:
    inputs["starts"] = start_B1T, launch.starts_spec(call, reverse=True)
  inputs |= launch.initial_state(dstate, sizes, call)
  outputs = {
    "dk": (jax.ShapeDtypeStruct(k_BRT.shape, k_BRT.dtype), key_spec),
    "dv": (jax.ShapeDtypeStruct(v_BRT.shape, v_BRT.dtype), value_spec),
  }
  if return_state:
    outputs |= launch.final_state(sizes, call)
  found = launch.launch(
    _keys_body, call, inputs, outputs, sizes, "backward_keys"
  )
  if not return_state:
    return found["dk"], found["dv"], None
  return found["dk"], found["dv"], (found["final_kv"], found["final_kk"])


def _query_inputs(
  q_BRT: Array, do_BRT: Array, r_BH1T: Array, dz_BH1T: Array, call: Call
) -> dict[str, launch.Input]:
  """Return the inputs of the queries, with blocks from right to left."""
  scalars = launch.scalar_spec(call, reverse=True)
  return {
    "q": (q_BRT, launch.token_spec(call.F, call, reverse=True)),
    "do": (do_BRT, launch.token_spec(call.P, call, reverse=True)),
    "r": (r_BH1T, scalars),
    "dz": (dz_BH1T, scalars),
  }


def _keys_body(refs: Refs, call: Call) -> None:
  chunks.start_state(refs)

  def chunk(head, lanes, position):
    # Stage 1: products of the chunk's tokens.
    kv_ref, kk_ref = refs["kv"].at[head], refs["kk"].at[head]
    masks = make_masks(refs.get("starts"), lanes, position, call)
    q_FC, do_VC, r_1C, dz_1C = _load_queries(refs, head, lanes, masks, call)
    g_VC = r_1C * do_VC.astype(jnp.float32)
    k_FC = chunks.load(refs["k"], head, call.F, lanes, masks.valid_1C)
    v_VC = chunks.load(refs["v"], head, call.P, lanes, masks.valid_1C)
    a_CC = dot(k_FC, q_FC, (0, 0), call)
    dsim_CC = dot(v_VC, do_VC, (0, 0), call)
    sums = _query_sums(q_FC, g_VC, dz_1C, masks, call)
    yield
    # Stage 2: the sums within the chunk.
    sim_CC = similarity(a_CC, masks, call)
    da_CC = product_cotangent(a_CC, dsim_CC, r_1C, dz_1C, masks, call)
    dk_FC = sum_over_seen(q_FC, da_CC, masks, call, over_queries=True)
    dv_VC = sum_over_seen(g_VC, sim_CC, masks, call, over_queries=True)
    yield
    # Stage 3: the state, which is read and then updated.
    past_dk_FC, past_dv_VC = _past_key_terms(k_FC, v_VC, kv_ref, kk_ref, call)
    chunks.add_to_state(sums, kv_ref, kk_ref, masks, call, by_feature=True)
    dk_FC += zero_outside(masks.last_1C, past_dk_FC)
    dv_VC += zero_outside(masks.last_1C, past_dv_VC)
    chunks.store(refs["dk"], head, call.F, lanes, dk_FC)
    chunks.store(refs["dv"], head, call.P, lanes, dv_VC)

  chunks.for_each_chunk(chunk, call, reverse=True)
  chunks.finish_state(refs, call)


def query_cotangent(
  q_BRT: Array,
  do_BRT: Array,
  r_BH1T: Array,
  dz_BH1T: Array,
  start_B1T: Array | None,
  call: Call,
) -> tuple[Array, Array]:
  """Run the kernel without keys: the cotangent of the state alone, from zeros.

  Args:
    q_BRT: as in `backward_keys`.
    do_BRT: as in `backward_keys`.
    r_BH1T: as in `backward_keys`.
    dz_BH1T: as in `backward_keys`.
    start_B1T: as in `backward_keys`.
    call: the launch.

  Returns:
    (dKV_BHEV, dKK_BHGG), the cotangent of the state before token 0.
  """
  sizes = (call.E, call.V), (call.G, call.G)
  inputs = _query_inputs(q_BRT, do_BRT, r_BH1T, dz_BH1T, call)
  if start_B1T is not None:
    inputs["starts"] = start_B1T, launch.starts_spec(call, reverse=True)
  outputs = launch.final_state(sizes, call)
  found = launch.launch(
    _query_cotangent_body, call, inputs, outputs, sizes, "query_cotangent"
  )
  return found["final_kv"], found["final_kk"]


def _query_cotangent_body(refs: Refs, call: Call) -> None:
  chunks.start_state(refs)

  def chunk(head, lanes, position):
    kv_ref, kk_ref = refs["kv"].at[head], refs["kk"].at[head]
    masks = make_masks(refs.get("starts"), lanes, position, call)
    q_FC, do_VC, r_1C, dz_1C = _load_queries(refs, head, lanes, masks, call)
    g_VC = r_1C * do_VC.astype(jnp.float32)
    sums = _query_sums(q_FC, g_VC, dz_1C, masks, call)
    yield
    chunks.add_to_state(sums, kv_ref, kk_ref, masks, call, by_feature=True)

  chunks.for_each_chunk(chunk, call, reverse=True)
  chunks.finish_state(refs, call)


def _load_queries(
  refs: Refs, head: int, lanes: Any, masks: Masks, call: Call
) -> tuple[Array, Array, Array, Array]:
  """Load a chunk's (q_FC, do_VC, r_1C, dz_1C), with 0 past the last token."""
  q_FC = chunks.load(refs["q"], head, call.F, lanes, masks.valid_1C)
  do_VC = chunks.load(refs["do"], head, call.P, lanes, masks.valid_1C)
  r_1C, dz_1C = (
    zero_outside(masks.valid_1C, refs[name][head, :, lanes])
    for name in ("r", "dz")
  )
  return q_FC, do_VC, r_1C, dz_1C


def _past_key_terms(
  k_FC: Array, v_VC: Array, kv_ref: Any, kk_ref: Any, call: Call
) -> tuple[Array, Array]:
  """Compute J(k)ᵀ (dKV v) + 2 dKK k̃ (F, C) and dKVᵀ φ(k) (V, C)."""
  wide_FC = k_FC.astype(jnp.float32)
  k_GC = extend(wide_FC, None, call)
  dk_FC = 2 * dot_exact_left(kk_ref[...], k_GC, call)[: call.F]
  dv_VC: Any = 0.0
  for group, phi_EC in features(wide_FC, call, weighted=False):
    kv_EV = kv_ref[group.rows].astype(call.dtype)
    dv_VC += dot(kv_EV, phi_EC, (0, 0), call)
    u_EC = dot(kv_EV, v_VC, (1, 0), call)
    first, second = feature_cotangent(
      u_EC, group, wide_FC, call, weighted=False
    )
    dk_FC += first + second
    if group.affine:
      x = len(group.shifts) * call.F
      dk_FC += u_EC[x : x + call.F]
  return dk_FC, dv_VC


def _query_sums(
  q_FC: Array, g_VC: Array, dz_1C: Array, masks: Masks, call: Call
) -> StateSums:
  """Compute what the chunk's queries add to dKV and dKK."""
  q_FC, g_VC, dz_1C = (
    zero_outside(masks.first_1C, x) for x in (q_FC, g_VC, dz_1C)
  )
  q_FC = q_FC.astype(jnp.float32)
  new_kv = [
    dot(phi_EC, g_VC, (1, 1), call)
    for _, phi_EC in features(q_FC, call, weighted=True)
  ]
  q_GC = extend(q_FC, None, call)
  new_GG = dot_exact_right(dz_1C * q_GC, q_GC, call)
  return new_kv, weigh_denominator(new_GG, call)
