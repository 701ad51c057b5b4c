"""The TPU kernel of the forward: o, and the state after the last token.

    num_t = Σ_s sim_ts v_s + KVᵀ φ_w(q_t)
    z_t   = Σ_s sim_ts     + q̃_tᵀ (W∘KK) q̃_t
    o_t   = num_t / (z_t + eps)

The sums are over the s of t's chunk. Then KV and KK take up the chunk's keys.
KV is held transposed, (V, E). KV and KK are float32 in VMEM from block to block
of a row. All is divided by c2 (`call.py`).
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
  features,
  weigh_denominator,
)
from pallas_kernels.polynomial.tpu.launch import Refs
from pallas_kernels.polynomial.tpu.masks import (
  Masks,
  make_masks,
  sum_over_seen,
  zero_outside,
)
from pallas_kernels.polynomial.tpu.products import dot, dot_exact_left


def forward(
  q_BRT: Array,
  k_BRT: Array,
  v_BRT: Array,
  start_B1T: Array | None,
  state: tuple[Array, Array] | None,
  call: Call,
  *,
  return_state: bool,
) -> tuple[Array, tuple[Array, Array] | None]:
  """Run the kernel.

  Args:
    q_BRT: queries, R = H·F.
    k_BRT: keys, R = H·F.
    v_BRT: values, R = H·P.
    start_B1T: the position where each token's document starts; None for one
      document a row.
    state: the state before token 0, (KVᵀ_BHVE, KK_BHGG); None for zeros.
    call: the launch.
    return_state: whether to return the state after the last token.

  Returns:
    (o_BRT, (KVᵀ_BHVE, KK_BHGG)); the state is None unless asked for.
  """
  sizes = (call.V, call.E), (call.G, call.G)
  inputs = {
    "k": (k_BRT, launch.token_spec(call.F, call)),
    "v": (v_BRT, launch.token_spec(call.P, call)),
    "q": (q_BRT, launch.token_spec(call.F, call)),
  }
  if start_B1T is not None:
    inputs["starts"] = start_B1T, launch.starts_spec(call)
  inputs |= launch.initial_state(state, sizes, call)
  o = jax.ShapeDtypeStruct(v_BRT.shape, v_BRT.dtype)
  outputs = {"o": (o, launch.token_spec(call.P, call))}
  if return_state:
    outputs |= launch.final_state(sizes, call)
  found = launch.launch(_body, call, inputs, outputs, sizes, "forward")
  if not return_state:
    return found["o"], None
  return found["o"], (found["final_kv"], found["final_kk"])


def _body(refs: Refs, call: Call) -> None:
  chunks.start_state(refs)

  def chunk(head, lanes, position):
    # Stage 1: products of the chunk's tokens.
    kv_ref, kk_ref = refs["kv"].at[head], refs["kk"].at[head]
    masks = make_masks(refs.get("starts"), lanes, position, call)
    k_FC = chunks.load(refs["k"], head, call.F, lanes, masks.valid_1C)
    v_VC = chunks.load(refs["v"], head, call.P, lanes, masks.valid_1C)
    q_FC = chunks.load(refs["q"], head, call.F, lanes)
    a_CC = dot(k_FC, q_FC, (0, 0), call)
    sums = key_sums(k_FC, v_VC, masks, call, by_feature=False)
    yield
    # Stage 2: the sums within the chunk.
    sim_CC = similarity(a_CC, masks, call)
    num_VC = sum_over_seen(v_VC, sim_CC, masks, call)
    z_1C = jnp.sum(sim_CC, axis=0, keepdims=True)
    yield
    # Stage 3: the state, which is read and then updated.
    past_VC, past_1C = _past_sums(q_FC, kv_ref, kk_ref, call)
    chunks.add_to_state(sums, kv_ref, kk_ref, masks, call, by_feature=False)
    z_1C += zero_outside(masks.first_1C, past_1C)
    num_VC += zero_outside(masks.first_1C, past_VC)
    o_VC = num_VC * (1 / (z_1C + call.eps))
    chunks.store(refs["o"], head, call.P, lanes, o_VC)

  chunks.for_each_chunk(chunk, call)
  chunks.finish_state(refs, call)


def key_state(
  k_BRT: Array, v_BRT: Array, start_B1T: Array | None, call: Call
) -> tuple[Array, Array]:
  """Run the kernel without queries: the state alone, from zeros.

  Args:
    k_BRT: keys, R = H·F.
    v_BRT: values, R = H·P.
    start_B1T: as in `forward`.
    call: the launch.

  Returns:
    (KVᵀ_BHVE, KK_BHGG).
  """
  sizes = (call.V, call.E), (call.G, call.G)
  inputs = {
    "k": (k_BRT, launch.token_spec(call.F, call)),
    "v": (v_BRT, launch.token_spec(call.P, call)),
  }
  if start_B1T is not None:
    inputs["starts"] = start_B1T, launch.starts_spec(call)
  outputs = launch.final_state(sizes, call)
  found = launch.launch(
    _key_state_body, call, inputs, outputs, sizes, "key_state"
  )
  return found["final_kv"], found["final_kk"]


def _key_state_body(refs: Refs, call: Call) -> None:
  chunks.start_state(refs)

  def chunk(head, lanes, position):
    kv_ref, kk_ref = refs["kv"].at[head], refs["kk"].at[head]
    masks = make_masks(refs.get("starts"), lanes, position, call)
    k_FC = chunks.load(refs["k"], head, call.F, lanes, masks.valid_1C)
    v_VC = chunks.load(refs["v"], head, call.P, lanes, masks.valid_1C)
    sums = key_sums(k_FC, v_VC, masks, call, by_feature=False)
    yield
    chunks.add_to_state(sums, kv_ref, kk_ref, masks, call, by_feature=False)

  chunks.for_each_chunk(chunk, call)
  chunks.finish_state(refs, call)


def similarity(a_CC: Array, masks: Masks, call: Call) -> Array:
  """Compute sim / c2 from q·k; it is 0 where t does not see s."""
  sim_CC = a_CC * a_CC
  if call.affine:
    sim_CC = a_CC * (a_CC + call.c1) + call.c0
  return jnp.where(masks.seen_CC, sim_CC, 0.0)


def denominator_products(
  q_FC: Array, kk_ref: Any, call: Call
) -> tuple[Array, Array]:
  """Compute (W∘KK) q̃ (G, C) and q̃ᵀ (W∘KK) q̃ (1, C)."""
  q_GC = extend(q_FC.astype(jnp.float32), None, call)
  y_GC = dot_exact_left(weigh_denominator(kk_ref[...], call), q_GC, call)
  return y_GC, jnp.sum(q_GC * y_GC, axis=0, keepdims=True)


def _past_sums(
  q_FC: Array, kv_ref: Any, kk_ref: Any, call: Call
) -> tuple[Array, Array]:
  """Compute what the state adds to num_VC and to z_1C."""
  _, z_1C = denominator_products(q_FC, kk_ref, call)
  num_VC: Any = 0.0
  wide_FC = q_FC.astype(jnp.float32)
  for group, phi_EC in features(wide_FC, call, weighted=True):
    num_VC += dot(kv_ref[:, group.rows], phi_EC, (1, 0), call)
  return num_VC, z_1C


def key_sums(
  k_FC: Array, v_VC: Array, masks: Masks, call: Call, *, by_feature: bool
) -> StateSums:
  """Compute what the chunk's keys add to KV and KK.

  Args:
    k_FC: keys.
    v_VC: values.
    masks: the chunk's masks.
    call: the launch.
    by_feature: whether KV is (E, V), else (V, E).
  """
  k_FC, v_VC = (zero_outside(masks.last_1C, x) for x in (k_FC, v_VC))
  k_FC = k_FC.astype(jnp.float32)
  new_kv = []
  for _, phi_EC in features(k_FC, call, weighted=False):
    pair = (phi_EC, v_VC) if by_feature else (v_VC, phi_EC)
    new_kv.append(dot(*pair, (1, 1), call))
  # The 1 of k̃ is 0 for tokens that do not count.
  one_1C = None
  for mask in (masks.valid_1C, masks.last_1C):
    if mask is not None:
      counts_1C = jnp.where(mask, 1.0, 0.0)
      one_1C = counts_1C if one_1C is None else one_1C * counts_1C
  k_GC = extend(k_FC, one_1C, call)
  return new_kv, dot(k_GC, k_GC, (1, 1), call)
