"""Polynomial attention in chunks: plain jax, linear in time and memory.

A row is cut into chunks of at most 64 tokens. Within a chunk the equations of
`spec.py` are taken as they stand; the tokens before the chunk enter through the
recurrent state. The backward keeps only q, k, v and the state before the row. A
sweep from left to right recomputes the states and gives dq. A sweep from right
to left carries the cotangent of the state, dKV and dKK, and gives dk and dv.

With g = r·do, r = 1 / (Σ sim + eps), dz = −r·(do·o), and J the Jacobian of φ,

    da_ts = (g_t·v_s + dz_t) sim'(q_t·k_s)
    dq_t  = Σ_s da_ts k_s + J(q_t)ᵀ (w ∘ KV g_t) + dz_t (W∘KK + (W∘KK)ᵀ) q̃_t
    dk_s  = Σ_t da_ts q_t + J(k_s)ᵀ (dKV v_s)    + (dKK + dKKᵀ) k̃_s
    dv_s  = Σ_t sim_ts g_t + dKVᵀ φ(k_s)

where the sums Σ_s and Σ_t are over the chunk.

The last chunk is padded with tokens of a document numbered −1. The masks that
separate documents separate them from the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import numerics
from pallas_kernels.polynomial import spec, state as state_lib
from pallas_kernels.polynomial.operator import (
  Kernel,
  add_slice_axis,
  drop_slice_axis,
)
from pallas_kernels.polynomial.state import State
from pallas_kernels.sharding import vary_alike

CHUNK = 64  # the most tokens of a chunk


class Masks(NamedTuple):
  """Which tokens of a chunk see each other, and which see the state.

  Where a row is a single document of whole chunks, there are no masks.

  Attributes:
    documents_B1CC: [t, s]: s ≤ t, and both are of one document.
    first_B1C: the token is of the document of the state before the chunk.
    last_B1C: the token is of the document of the state after the chunk.
    joined_B111: the states before and after the chunk are of one document.
  """

  documents_B1CC: Array
  first_B1C: Array
  last_B1C: Array
  joined_B111: Array


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
  """Return o_BTHP, the state after the last token and that before the first."""
  T, before = q_BTHF.shape[1], add_slice_axis(state)
  runs_NBC = _chunk_runs(runs_BT, T)
  chunks = _cut(T, q_BTHF, k_BTHF, v_BTHP)

  def chunk(state, inputs):
    (q_BHCF, k_BHCF, v_BHCP), masks = inputs
    num_BHCP, z_BHC = _two_sums(q_BHCF, k_BHCF, v_BHCP, state, masks, kernel)
    o_BHCP = num_BHCP / (z_BHC + kernel.eps)[..., None]
    state = _add_keys(state, k_BHCF, v_BHCP, masks, kernel)
    return state, o_BHCP.astype(v_BTHP.dtype)

  state, o_NBCHP = _scan(chunk, state, chunks, runs_NBC)
  return _join(o_NBCHP, T), state if return_state else None, before


def key_state(
  k_BTHF: Array, v_BTHP: Array, runs_BT: Array | None, kernel: Kernel
) -> State:
  """Return the state after the last token, from a zero state."""
  T = k_BTHF.shape[1]

  def chunk(state, inputs):
    (k_BHCF, v_BHCP), masks = inputs
    return _add_keys(state, k_BHCF, v_BHCP, masks, kernel), None

  chunks = _cut(T, k_BTHF, v_BTHP)
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
  """Return dq_BTHF, r_BTH = 1 / (Σ sim + eps) and dz_BTH = −r·(do·o)."""
  T = q_BTHF.shape[1]
  chunks = _cut(T, q_BTHF, k_BTHF, v_BTHP, do_BTHP)

  def chunk(state, inputs):
    (q_BHCF, k_BHCF, v_BHCP, do_BHCP), masks = inputs
    num_BHCP, z_BHC = _two_sums(q_BHCF, k_BHCF, v_BHCP, state, masks, kernel)
    r_BHC = 1 / (z_BHC + kernel.eps)
    g_BHCP = _numerator_cotangent(do_BHCP, r_BHC)
    dz_BHC = -r_BHC * jnp.sum(g_BHCP * num_BHCP, axis=-1)
    da_BHCC = _product_cotangent(
      q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, kernel
    )
    seen = _seen(masks, da_BHCC.shape[-1])
    dq_BHCF = numerics.weighted_sum(da_BHCC, k_BHCF, seen)
    if state is not None:
      dq_BHCF += _query_cotangent(q_BHCF, g_BHCP, dz_BHC, state, masks, kernel)
    state = _add_keys(state, k_BHCF, v_BHCP, masks, kernel)
    return state, (dq_BHCF, r_BHC[..., None], dz_BHC[..., None])

  _, outputs = _scan(
    chunk, drop_slice_axis(before), chunks, _chunk_runs(runs_BT, T)
  )
  dq_BTHF, r_BTH1, dz_BTH1 = (_join(x, T) for x in outputs)
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
  """Return dk_BTHF, dv_BTHP and the cotangent of the state before token 0."""
  T = q_BTHF.shape[1]
  chunks = _cut(
    T, q_BTHF, k_BTHF, v_BTHP, do_BTHP, r_BTH[..., None], dz_BTH[..., None]
  )

  def chunk(dstate, inputs):
    (q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC1, dz_BHC1), masks = inputs
    r_BHC, dz_BHC = r_BHC1[..., 0], dz_BHC1[..., 0]
    g_BHCP = _numerator_cotangent(do_BHCP, r_BHC)
    product_BHCC = _inner(q_BHCF, k_BHCF)
    sim_BHCC = _visible(
      spec.similarity(product_BHCC, kernel.coefficients), masks
    )
    da_BHCC = _product_cotangent(
      q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, kernel
    )
    seen = _seen(masks, da_BHCC.shape[-1]).swapaxes(-1, -2)
    dtype = v_BHCP.dtype
    dk_BHCF = numerics.weighted_sum(da_BHCC.swapaxes(-1, -2), q_BHCF, seen)
    sim_BHCC = sim_BHCC.swapaxes(-1, -2).astype(dtype)
    dv_BHCP = numerics.weighted_sum(sim_BHCC, g_BHCP.astype(dtype), seen)
    if dstate is not None:
      dk_past, dv_past = _key_cotangents(k_BHCF, v_BHCP, dstate, masks, kernel)
      dk_BHCF, dv_BHCP = dk_BHCF + dk_past, dv_BHCP + dv_past
    dstate = _add_queries(dstate, q_BHCF, g_BHCP, dz_BHC, masks, kernel)
    return dstate, (dk_BHCF, dv_BHCP)

  dstate, outputs = _scan(
    chunk, dstate, chunks, _chunk_runs(runs_BT, T), reverse=True
  )
  dk_BTHF, dv_BTHP = (_join(x, T) for x in outputs)
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
  """Return the cotangent of the state before token 0, if the last's is 0."""
  T = q_BTHF.shape[1]
  chunks = _cut(T, q_BTHF, do_BTHP, r_BTH[..., None], dz_BTH[..., None])

  def chunk(dstate, inputs):
    (q_BHCF, do_BHCP, r_BHC1, dz_BHC1), masks = inputs
    g_BHCP = _numerator_cotangent(do_BHCP, r_BHC1[..., 0])
    dz_BHC = dz_BHC1[..., 0]
    return _add_queries(dstate, q_BHCF, g_BHCP, dz_BHC, masks, kernel), None

  runs_NBC = _chunk_runs(runs_BT, T)
  return _scan(chunk, None, chunks, runs_NBC, reverse=True)[0]


# Cutting rows into chunks.


def _chunk_sizes(T: int) -> tuple[int, int]:
  """Return (N, C): chunks of a row and tokens of a chunk, as even as can be."""
  N = -(-T // CHUNK)
  return N, -(-T // N)


def _operand_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Return the dtype of the products' operands.

  float16 is computed in float32, because it has no range for squares.
  """
  return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def _cut(T: int, *arrays_BTH: Array) -> tuple[Array, ...]:
  """Cut (B, T, H, ·) arrays into chunks (N, B, C, H, ·), padded with zeros."""
  N, C = _chunk_sizes(T)

  def cut(x_BTH):
    x_BTH = x_BTH.astype(_operand_dtype(x_BTH.dtype))
    x_BTH = jnp.pad(x_BTH, ((0, 0), (0, N * C - T), (0, 0), (0, 0)))
    x_BNCH = x_BTH.reshape(x_BTH.shape[0], N, C, *x_BTH.shape[2:])
    return jnp.moveaxis(x_BNCH, 1, 0)

  return tuple(cut(x) for x in arrays_BTH)


def _join(x_NBCH: Array, T: int) -> Array:
  """Undo `_cut`: (N, B, C, H, ·) → (B, T, H, ·)."""
  N, B, C = x_NBCH.shape[:3]
  x_BNCH = jnp.moveaxis(x_NBCH, 0, 1)
  return x_BNCH.reshape(B, N * C, *x_BNCH.shape[3:])[:, :T]


def _chunk_runs(
  runs_BT: Array | None, T: int
) -> tuple[Array, Array, Array] | None:
  """Cut document numbers into chunks.

  Returns:
    (runs_NBC, before_NB, after_NB): the document of each token, of the state
    before each chunk and of the state after it. None where no masks are needed.
  """
  N, C = _chunk_sizes(T)
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


def _masks(runs: tuple[Array, Array, Array] | None) -> Masks | None:
  """Make the masks of one chunk from its part of `_chunk_runs`."""
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


def _scan(
  chunk: Callable[[Any, Any], tuple[Any, Any]],
  state: State | None,
  chunks: tuple[Array, ...],
  runs: tuple[Array, Array, Array] | None,
  *,
  reverse: bool = False,
) -> tuple[Any, Any]:
  """Run `chunk(state, (arrays, masks)) → (state, outputs)` over all chunks.

  `chunk` sees (B, H, C, ·) arrays. They are transposed chunk by chunk, while a
  chunk is in the cache, and not all at once.
  """

  def swap_time_and_heads(tree):
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), tree)

  def step(state, inputs):
    arrays_BCH, runs = inputs
    state, outputs_BHC = chunk(
      state, (swap_time_and_heads(arrays_BCH), _masks(runs))
    )
    return state, swap_time_and_heads(outputs_BHC)

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


# The terms of a chunk.


def _seen(masks: Masks | None, C: int) -> Array:
  """Return whether query t of a chunk sees key s, [t, s]."""
  if masks is None:
    return jnp.tril(jnp.ones((1, 1, C, C), bool))
  return masks.documents_B1CC


def _visible(x_BHCC: Array, masks: Masks | None) -> Array:
  """Set to 0 the entries [t, s] where query t does not see key s."""
  return jnp.where(_seen(masks, x_BHCC.shape[-1]), x_BHCC, 0)


def _inner(x_BHCF: Array, y_BHCF: Array) -> Array:
  """Compute x_t·y_s for all pairs of a chunk, in the dtype of sums."""
  return jnp.einsum(
    "bhtf,bhsf->bhts",
    x_BHCF,
    y_BHCF,
    precision=numerics.product_precision(x_BHCF.dtype),
    preferred_element_type=numerics.sum_dtype(x_BHCF.dtype),
  )


def _numerator_cotangent(do_BHCP: Array, r_BHC: Array) -> Array:
  """Compute g = r·do, in the dtype of sums."""
  return do_BHCP.astype(r_BHC.dtype) * r_BHC[..., None]


def _two_sums(q_BHCF, k_BHCF, v_BHCP, state, masks, kernel):
  """Compute each query's Σ sim v and Σ sim, as (num_BHCP, z_BHC)."""
  sim_BHCC = _visible(
    spec.similarity(_inner(q_BHCF, k_BHCF), kernel.coefficients), masks
  )
  z_BHC = sim_BHCC.sum(axis=-1)
  num_BHCP = numerics.weighted_sum(
    sim_BHCC.astype(v_BHCP.dtype), v_BHCP, _seen(masks, v_BHCP.shape[-2])
  )
  if state is None:
    return num_BHCP, z_BHC
  past_num, past_z = state_lib.query_state(q_BHCF, state, kernel.coefficients)
  if masks is not None:
    past_num = jnp.where(masks.first_B1C[..., None], past_num, 0)
    past_z = jnp.where(masks.first_B1C, past_z, 0)
  return num_BHCP + past_num, z_BHC + past_z


def _product_cotangent(
  q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, kernel
):
  """Compute da_BHCC, the cotangent of q_t·k_s within the chunk."""
  # r multiplies the sum do·v. A rounded g = r·do would be off by more than what
  # is left of g·v + dz where the two nearly cancel.
  dsim_BHCC = r_BHC[..., None] * _inner(do_BHCP, v_BHCP) + dz_BHC[..., None]
  c1, c2 = kernel.coefficients.c1, kernel.coefficients.c2
  slope_BHCC = c1 + 2 * c2 * _inner(q_BHCF, k_BHCF)  # of sim, by q·k
  da_BHCC = dsim_BHCC * slope_BHCC
  return _visible(da_BHCC, masks).astype(q_BHCF.dtype)


def _query_cotangent(q_BHCF, g_BHCP, dz_BHC, state, masks, kernel):
  """Compute the cotangent of the queries that comes through the state."""

  def sums(q):
    return state_lib.query_state(q, state, kernel.coefficients)

  (dq_BHCF,) = jax.vjp(sums, q_BHCF)[1]((g_BHCP, dz_BHC))
  dq_BHCF = dq_BHCF.astype(dz_BHC.dtype)
  if masks is None:
    return dq_BHCF
  return jnp.where(masks.first_B1C[..., None], dq_BHCF, 0)


def _key_cotangents(k_BHCF, v_BHCP, dstate, masks, kernel):
  """Compute the cotangents of keys and values that come through the state."""

  def state_of(k, v):
    return state_lib.key_state(k, v, kernel.coefficients)

  grads = jax.vjp(state_of, k_BHCF, v_BHCP)[1](dstate)
  if masks is not None:
    grads = (jnp.where(masks.last_B1C[..., None], x, 0) for x in grads)
  return tuple(x.astype(dstate.kv_BHEP.dtype) for x in grads)


def _carry(old: State | None, new: State, masks: Masks | None) -> State:
  """Add the state that came in to the chunk's own, within one document."""
  if old is None:
    return new
  if masks is not None:
    old = jax.tree.map(lambda x: jnp.where(masks.joined_B111, x, 0), old)
  return jax.tree.map(jnp.add, old, new)


def _add_keys(state, k_BHCF, v_BHCP, masks, kernel):
  """Return the state after the chunk."""
  keep_B1C = None if masks is None else masks.last_B1C
  new = state_lib.key_state(k_BHCF, v_BHCP, kernel.coefficients, keep_B1C)
  return _carry(state, new, masks)


def _add_queries(dstate, q_BHCF, g_BHCP, dz_BHC, masks, kernel):
  """Return the cotangent of the state before the chunk."""
  if masks is not None:
    first_B1C = masks.first_B1C
    q_BHCF = jnp.where(first_B1C[..., None], q_BHCF, 0)
    g_BHCP = jnp.where(first_B1C[..., None], g_BHCP, 0)
    dz_BHC = jnp.where(first_B1C, dz_BHC, 0)
  B, H, _, F = q_BHCF.shape
  zero = state_lib.zero_state(
    B,
    H,
    F,
    g_BHCP.shape[-1],
    coefficients=kernel.coefficients,
    dtype=dz_BHC.dtype,
  )
  # A state that is the same on every device would get a cotangent that is
  # summed over devices. Here each device has its own.
  zero, _ = vary_alike(zero, g_BHCP)

  def sums(state):
    return state_lib.query_state(q_BHCF, state, kernel.coefficients)

  (new,) = jax.vjp(sums, zero)[1]((g_BHCP, dz_BHC))
  return _carry(dstate, new, masks)
