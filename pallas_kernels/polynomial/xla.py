"""Polynomial attention in chunks: plain XLA, linear in time and memory.

Within a chunk of C tokens the equations of `spec.py` are taken as they stand;
what came before the chunk enters through the state. The backward keeps only
q, k, v and the state before them: a sweep to the right rebuilds the states and
gives dq, a sweep to the left carries the state's cotangent and gives dk and dv,

    da_ts = (g_t·v_s + dz_t) sim'(q_t·k_s)
    dq_t  = Σ_s da_ts k_s + J(q_t)ᵀ (w ∘ KV g_t) + dz_t (W∘KK + (W∘KK)ᵀ) q̃_t
    dk_s  = Σ_t da_ts q_t + J(k_s)ᵀ (dKV v_s)    + (dKK + dKKᵀ) k̃_s
    dv_s  = Σ_t sim_ts g_t + dKVᵀ features(k_s)

with J the Jacobian of the features. A row's tail is filled up to a whole chunk
with tokens of a document of their own, numbered −1, which the masks of
documents keep from the others.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import numerics
from pallas_kernels.polynomial import spec
from pallas_kernels.polynomial.passes import Kernel, keep, kept
from pallas_kernels.polynomial.spec import State
from pallas_kernels.sharding import vary_alike

CHUNK = 64


class Masks(NamedTuple):
  """Of one chunk: who sees whom; None in rows of one unbroken document."""

  documents_B1CC: Array  # [t, s]: s ≤ t, in one document
  first_B1C: Array  # in the document that the state before belongs to
  last_B1C: Array  # in the document that the state after belongs to
  joined_B111: Array  # these two are one document


def forward(
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  runs_BT: Array | None,
  state: State | None,
  kernel: Kernel,
  *,
  return_state: bool,
) -> tuple[Array, State | None, State | None]:
  """o_BTHP, the state after the last token, and the one before the first."""
  T, before = q_BTHF.shape[1], keep(state)
  runs_NBC = _chunk_runs(runs_BT, T)
  chunks = _chunks(T, q_BTHF, k_BTHF, v_BTHP)

  def chunk(state, inputs):
    (q_BHCF, k_BHCF, v_BHCP), masks = inputs
    num_BHCP, z_BHC = _scores(q_BHCF, k_BHCF, v_BHCP, state, masks, kernel)
    o_BHCP = num_BHCP / (z_BHC + kernel.eps)[..., None]
    state = _add_keys(state, k_BHCF, v_BHCP, masks, kernel)
    return state, o_BHCP.astype(v_BTHP.dtype)

  state, o_NBCHP = _scan(chunk, state, chunks, runs_NBC)
  return _whole(o_NBCHP, T), state if return_state else None, before


def key_state(
  k_BTHF: Array, v_BTHP: Array, runs_BT: Array | None, kernel: Kernel
) -> State:
  """The state after the last token, from a zero state."""
  T = k_BTHF.shape[1]

  def chunk(state, inputs):
    (k_BHCF, v_BHCP), masks = inputs
    return _add_keys(state, k_BHCF, v_BHCP, masks, kernel), None

  chunks = _chunks(T, k_BTHF, v_BTHP)
  return _scan(chunk, None, chunks, _chunk_runs(runs_BT, T))[0]


def backward_queries(
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  do_BTHP: Array,
  runs_BT: Array | None,
  before: State | None,
  kernel: Kernel,
) -> tuple[Array, Array, Array]:
  """dq_BTHF, r_BTH = 1 / (Σ sim + eps) and dz_BTH = −r·(do·o)."""
  T = q_BTHF.shape[1]
  chunks = _chunks(T, q_BTHF, k_BTHF, v_BTHP, do_BTHP)

  def chunk(state, inputs):
    (q_BHCF, k_BHCF, v_BHCP, do_BHCP), masks = inputs
    num_BHCP, z_BHC = _scores(q_BHCF, k_BHCF, v_BHCP, state, masks, kernel)
    r_BHC = 1 / (z_BHC + kernel.eps)
    g_BHCP = _normalised(do_BHCP, r_BHC)
    dz_BHC = -r_BHC * jnp.sum(g_BHCP * num_BHCP, axis=-1)
    inner = q_BHCF, k_BHCF, v_BHCP, do_BHCP
    da_BHCC = _d_scores(*inner, r_BHC, dz_BHC, masks, kernel)
    dq_BHCF = spec.contract(da_BHCC, k_BHCF, _documents(masks))
    if state is not None:
      dq_BHCF += _d_query(q_BHCF, g_BHCP, dz_BHC, state, masks, kernel)
    state = _add_keys(state, k_BHCF, v_BHCP, masks, kernel)
    return state, (dq_BHCF, r_BHC[..., None], dz_BHC[..., None])

  _, outputs = _scan(chunk, kept(before), chunks, _chunk_runs(runs_BT, T))
  dq_BTHF, r_BTH1, dz_BTH1 = (_whole(x, T) for x in outputs)
  return dq_BTHF.astype(q_BTHF.dtype), r_BTH1[..., 0], dz_BTH1[..., 0]


def backward_keys(
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  do_BTHP: Array,
  r_BTH: Array,
  dz_BTH: Array,
  runs_BT: Array | None,
  dstate: State | None,
  kernel: Kernel,
  *,
  return_state: bool,
) -> tuple[Array, Array, State | None]:
  """dk_BTHF, dv_BTHP and the cotangent of the state before token 0."""
  T = q_BTHF.shape[1]
  chunks = _chunks(
    T, q_BTHF, k_BTHF, v_BTHP, do_BTHP, r_BTH[..., None], dz_BTH[..., None]
  )

  def chunk(dstate, inputs):
    (q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC1, dz_BHC1), masks = inputs
    r_BHC, dz_BHC = r_BHC1[..., 0], dz_BHC1[..., 0]
    g_BHCP = _normalised(do_BHCP, r_BHC)
    a_BHCC = _inner(q_BHCF, k_BHCF)
    sim_BHCC = _visible(spec.polynomial(a_BHCC, kernel.coefficients), masks)
    inner = q_BHCF, k_BHCF, v_BHCP, do_BHCP
    da_BHCC = _d_scores(*inner, r_BHC, dz_BHC, masks, kernel)
    seen, dtype = _documents(masks, by_key=True), v_BHCP.dtype
    dk_BHCF = spec.contract(da_BHCC.swapaxes(-1, -2), q_BHCF, seen)
    sim_BHCC = sim_BHCC.swapaxes(-1, -2).astype(dtype)
    dv_BHCP = spec.contract(sim_BHCC, g_BHCP.astype(dtype), seen)
    if dstate is not None:
      dk_past, dv_past = _d_key(k_BHCF, v_BHCP, dstate, masks, kernel)
      dk_BHCF, dv_BHCP = dk_BHCF + dk_past, dv_BHCP + dv_past
    dstate = _add_queries(dstate, q_BHCF, g_BHCP, dz_BHC, masks, kernel)
    return dstate, (dk_BHCF, dv_BHCP)

  dstate, outputs = _scan(
    chunk, dstate, chunks, _chunk_runs(runs_BT, T), reverse=True
  )
  dk_BTHF, dv_BTHP = (_whole(x, T) for x in outputs)
  dk_BTHF, dv_BTHP = dk_BTHF.astype(k_BTHF.dtype), dv_BTHP.astype(v_BTHP.dtype)
  return dk_BTHF, dv_BTHP, dstate if return_state else None


def query_cotangent(
  q_BTHF: Array,
  do_BTHP: Array,
  r_BTH: Array,
  dz_BTH: Array,
  runs_BT: Array | None,
  kernel: Kernel,
) -> State:
  """The cotangent of the state before token 0, from these queries alone."""
  T = q_BTHF.shape[1]
  chunks = _chunks(T, q_BTHF, do_BTHP, r_BTH[..., None], dz_BTH[..., None])

  def chunk(dstate, inputs):
    (q_BHCF, do_BHCP, r_BHC1, dz_BHC1), masks = inputs
    g_BHCP, dz_BHC = _normalised(do_BHCP, r_BHC1[..., 0]), dz_BHC1[..., 0]
    return _add_queries(dstate, q_BHCF, g_BHCP, dz_BHC, masks, kernel), None

  runs_NBC = _chunk_runs(runs_BT, T)
  return _scan(chunk, None, chunks, runs_NBC, reverse=True)[0]


# Cutting into chunks.


def _chunk_count(T: int) -> tuple[int, int]:
  """(N, C), the chunks as even as they can be."""
  N = -(-T // CHUNK)
  return N, -(-T // N)


def _operand(dtype) -> jnp.dtype:
  """float16 has no room for the squares: it is computed in float32."""
  return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def _chunks(T: int, *arrays_BTH: Array) -> tuple[Array, ...]:
  """(B, T, H, ·) → (N, B, C, H, ·), filled up with zeros."""
  N, C = _chunk_count(T)

  def cut(x_BTH):
    x_BTH = x_BTH.astype(_operand(x_BTH.dtype))
    x_BTH = jnp.pad(x_BTH, ((0, 0), (0, N * C - T), (0, 0), (0, 0)))
    x_BNCH = x_BTH.reshape(x_BTH.shape[0], N, C, *x_BTH.shape[2:])
    return jnp.moveaxis(x_BNCH, 1, 0)

  return tuple(cut(x) for x in arrays_BTH)


def _whole(x_NBCH: Array, T: int) -> Array:
  """(N, B, C, H, ·) → (B, T, H, ·)."""
  N, B, C = x_NBCH.shape[:3]
  x_BNCH = jnp.moveaxis(x_NBCH, 0, 1)
  return x_BNCH.reshape(B, N * C, *x_BNCH.shape[3:])[:, :T]


def _chunk_runs(runs_BT: Array | None, T: int):
  """Per chunk: its runs_BC and the runs of the states before and after it."""
  N, C = _chunk_count(T)
  if runs_BT is None:
    if N * C == T:
      return None
    runs_BT = jnp.zeros((1, T), jnp.int32)
  ends_N = jnp.minimum(jnp.arange(1, N + 1) * C, T) - 1
  after_NB = runs_BT[:, ends_N].T
  before_NB = jnp.concatenate([runs_BT[:, :1].T, after_NB[:-1]])
  runs_BT = jnp.pad(runs_BT, ((0, 0), (0, N * C - T)), constant_values=-1)
  runs_NBC = jnp.moveaxis(runs_BT.reshape(-1, N, C), 1, 0)
  return runs_NBC, before_NB, after_NB


def _masks(runs) -> Masks | None:
  if runs is None:
    return None
  runs_BC, before_B, after_B = runs
  C = runs_BC.shape[1]
  causal_1CC = jnp.tril(jnp.ones((1, C, C), bool))
  documents_BCC = (runs_BC[:, :, None] == runs_BC[:, None]) & causal_1CC
  return Masks(
    documents_BCC[:, None],
    (runs_BC == before_B[:, None])[:, None],
    (runs_BC == after_B[:, None])[:, None],
    (before_B == after_B)[:, None, None, None],
  )


def _scan(chunk, state, chunks, runs, *, reverse=False):
  """chunk(state, (arrays, masks)) → (state, outputs) over all chunks.

  The chunk sees (B, H, C, ·) arrays: turned one at a time, while they are in
  the cache.
  """
  turn = lambda tree: jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), tree)

  def step(state, inputs):
    arrays_BCH, runs = inputs
    state, outputs_BHC = chunk(state, (turn(arrays_BCH), _masks(runs)))
    return state, turn(outputs_BHC)

  inputs = (chunks, runs)
  first = jax.tree.map(lambda x: x[0], inputs)
  if chunks[0].shape[0] == 1:
    state, outputs = step(state, first)
    return state, jax.tree.map(lambda x: x[None], outputs)
  if state is None:
    shapes, _ = jax.eval_shape(lambda x: step(None, x), first)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  state, _ = vary_alike(state, inputs)
  return jax.lax.scan(step, state, inputs, reverse=reverse)


# The parts of a chunk.


def _documents(masks: Masks | None, *, by_key: bool = False) -> Array | None:
  if masks is None:
    return None
  documents_B1CC = masks.documents_B1CC
  return documents_B1CC.swapaxes(-1, -2) if by_key else documents_B1CC


def _visible(x_BHCC: Array, masks: Masks | None) -> Array:
  """x, with 0 where the query does not see the key."""
  C = x_BHCC.shape[-1]
  causal_CC = jnp.tril(jnp.ones((1, 1, C, C), bool))
  seen = causal_CC if masks is None else masks.documents_B1CC
  return jnp.where(seen, x_BHCC, 0)


def _inner(x_BHCF: Array, y_BHCF: Array) -> Array:
  """x_t·y_s, in the accumulator's dtype."""
  return jnp.einsum(
    "bhtf,bhsf->bhts",
    x_BHCF,
    y_BHCF,
    precision=numerics.product_precision(x_BHCF.dtype),
    preferred_element_type=numerics.sum_dtype(x_BHCF.dtype),
  )


def _normalised(do_BHCP: Array, r_BHC: Array) -> Array:
  """g = r·do."""
  return do_BHCP.astype(r_BHC.dtype) * r_BHC[..., None]


def _scores(q_BHCF, k_BHCF, v_BHCP, state, masks, kernel):
  """(numerator_BHCP, denominator_BHC) of the chunk's queries."""
  sim_BHCC = _visible(
    spec.polynomial(_inner(q_BHCF, k_BHCF), kernel.coefficients), masks
  )
  z_BHC = sim_BHCC.sum(axis=-1)
  num_BHCP = spec.contract(
    sim_BHCC.astype(v_BHCP.dtype), v_BHCP, _documents(masks)
  )
  if state is None:
    return num_BHCP, z_BHC
  past_num, past_z = spec.query_state(q_BHCF, state, kernel.coefficients)
  if masks is not None:
    past_num = jnp.where(masks.first_B1C[..., None], past_num, 0)
    past_z = jnp.where(masks.first_B1C, past_z, 0)
  return num_BHCP + past_num, z_BHC + past_z


def _d_scores(q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, kernel):
  """da_BHCC, the cotangent of q_t·k_s within the chunk.

  r meets do·v after the sum: a rounded g = r·do would be off by more than what
  is left of g·v + dz where the two nearly cancel.
  """
  dsim_BHCC = r_BHC[..., None] * _inner(do_BHCP, v_BHCP) + dz_BHC[..., None]
  a_BHCC = _inner(q_BHCF, k_BHCF)
  da_BHCC = dsim_BHCC * spec.derivative(a_BHCC, kernel.coefficients)
  return _visible(da_BHCC, masks).astype(q_BHCF.dtype)


def _d_query(q_BHCF, g_BHCP, dz_BHC, state, masks, kernel):
  """The cotangent that reaches the queries through the state."""
  through = lambda q: spec.query_state(q, state, kernel.coefficients)
  (dq_BHCF,) = jax.vjp(through, q_BHCF)[1]((g_BHCP, dz_BHC))
  dq_BHCF = dq_BHCF.astype(dz_BHC.dtype)
  if masks is None:
    return dq_BHCF
  return jnp.where(masks.first_B1C[..., None], dq_BHCF, 0)


def _d_key(k_BHCF, v_BHCP, dstate, masks, kernel):
  """The cotangents that reach keys and values through the state."""
  through = lambda k, v: spec.key_state(k, v, kernel.coefficients)
  grads = jax.vjp(through, k_BHCF, v_BHCP)[1](dstate)
  if masks is not None:
    grads = (jnp.where(masks.last_B1C[..., None], x, 0) for x in grads)
  return tuple(x.astype(dstate.kv_BHEP.dtype) for x in grads)


def _carry(old: State | None, new: State, masks: Masks | None) -> State:
  """A chunk's own sums, on top of its neighbour's in one document."""
  if old is None:
    return new
  if masks is not None:
    old = jax.tree.map(lambda x: jnp.where(masks.joined_B111, x, 0), old)
  return jax.tree.map(jnp.add, old, new)


def _add_keys(state, k_BHCF, v_BHCP, masks, kernel):
  """The state after the chunk."""
  keep_B1C = None if masks is None else masks.last_B1C
  new = spec.key_state(k_BHCF, v_BHCP, kernel.coefficients, keep_B1C)
  return _carry(state, new, masks)


def _add_queries(dstate, q_BHCF, g_BHCP, dz_BHC, masks, kernel):
  """The cotangent of the state before the chunk."""
  if masks is not None:
    first_B1C = masks.first_B1C
    q_BHCF = jnp.where(first_B1C[..., None], q_BHCF, 0)
    g_BHCP = jnp.where(first_B1C[..., None], g_BHCP, 0)
    dz_BHC = jnp.where(first_B1C, dz_BHC, 0)
  B, H, _, F = q_BHCF.shape
  zero = spec.zero_state(
    B,
    H,
    F,
    g_BHCP.shape[-1],
    coefficients=kernel.coefficients,
    dtype=dz_BHC.dtype,
  )
  # The cotangent of a state that is whole would be summed over devices.
  zero, _ = vary_alike(zero, g_BHCP)
  through = lambda state: spec.query_state(q_BHCF, state, kernel.coefficients)
  (new,) = jax.vjp(through, zero)[1]((g_BHCP, dz_BHC))
  return _carry(dstate, new, masks)
