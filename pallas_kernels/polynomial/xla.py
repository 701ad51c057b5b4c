"""Polynomial attention in chunks: plain jax, linear in time and memory.

A row is cut into chunks. Within a chunk the equations of `spec.py` are taken as
they stand; the tokens before the chunk enter through the recurrent state. The
backward keeps only q, k, v and the state before the row. A sweep from left to
right recomputes the states and gives dq. A sweep from right to left carries the
cotangent of the state, dKV and dKK, and gives dk and dv.

Chunks follow each other in spans. All chunks of a span are computed at once:
each sums the state of the tokens in it, and a prefix sum over the span gives
the state that each chunk starts from. There are two forms:

  CHUNKS  a span is one chunk of 64 tokens, which stays in a CPU's cache
  SPANS   a span has as many chunks of 128 tokens as `span_bytes` hold, which
          fills a GPU

With g = r·do, r = 1 / (Σ sim + eps), dz = −r·(do·o), and J the Jacobian of φ,

    da_ts = (g_t·v_s + dz_t) sim'(q_t·k_s)
    dq_t  = Σ_s da_ts k_s + J(q_t)ᵀ (w ∘ KV g_t) + dz_t (W∘KK + (W∘KK)ᵀ) q̃_t
    dk_s  = Σ_t da_ts q_t + J(k_s)ᵀ (dKV v_s)    + (dKK + dKKᵀ) k̃_s
    dv_s  = Σ_t sim_ts g_t + dKVᵀ φ(k_s)

where the sums Σ_s and Σ_t are over the chunk.

The last chunks are padded with tokens of a document numbered −1. The masks that
separate documents separate them from the others.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import numerics
from pallas_kernels.polynomial import spec, state as state_lib
from pallas_kernels.polynomial.coefficients import Coefficients
from pallas_kernels.polynomial.operator import (
  Kernel,
  add_slice_axis,
  drop_slice_axis,
)
from pallas_kernels.polynomial.state import (
  EXACT,
  IN_PARTS,
  State,
  StateProducts,
)
from pallas_kernels.sharding import vary_alike


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


class Tiling(NamedTuple):
  """How a row is cut.

  Attributes:
    M: spans of a row, taken one after the other.
    S: chunks of a span, computed at once.
    C: tokens of a chunk.
  """

  M: int
  S: int
  C: int

  @property
  def is_one_chunk(self) -> bool:
    """Whether a row is one chunk; False where its length is open."""
    return self.M == 1 and self.S == 1


class _Call(NamedTuple):
  """The static numbers that the terms of a chunk take."""

  coefficients: Coefficients
  eps: float
  products: StateProducts


@dataclasses.dataclass(frozen=True)
class PlainPasses:
  """The five passes of `operator.Passes`, in plain jax.

  Attributes:
    chunk: the most tokens of a chunk.
    span_bytes: how much the states and similarities of a span may take. The
      forward and backward together take about 3.5 times as much. With 0 a span
      is one chunk.
    products: how products with states are computed.
  """

  chunk: int
  span_bytes: int
  products: StateProducts

  def forward(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    runs_BT: Array | None,
    state: State | None,
    kernel: Kernel,
    *,
    return_state: bool,
  ) -> tuple[Array, State | None, State | None]:
    """Return o_BTHP, the state after the last token, and the first one."""
    call = self._call(kernel)

    def own(chunk, masks):
      _, k_BHCF, v_BHCP = chunk
      return _sum_keys(k_BHCF, v_BHCP, masks, call)

    def outputs(chunk, masks, state):
      q_BHCF, k_BHCF, v_BHCP = chunk
      num_BHCP, z_BHC = _two_sums(q_BHCF, k_BHCF, v_BHCP, state, masks, call)
      o_BHCP = num_BHCP / (z_BHC + call.eps)[..., None]
      return (o_BHCP.astype(v_BTHP.dtype),)

    after, (o_BTHP,) = _sweep(
      self,
      own,
      outputs,
      state,
      (q_BTHF, k_BTHF, v_BTHP),
      runs_BT,
      call,
      value_features=v_BTHP.shape[-1],
    )
    return o_BTHP, after if return_state else None, add_slice_axis(state)

  def key_state(
    self,
    k_BTHF: Array,
    v_BTHP: Array,
    runs_BT: Array | None,
    kernel: Kernel,
  ) -> State:
    """Return the state after the last token, from a zero state."""
    call = self._call(kernel)

    def own(chunk, masks):
      return _sum_keys(*chunk, masks, call)

    return _sweep(
      self,
      own,
      _nothing,
      None,
      (k_BTHF, v_BTHP),
      runs_BT,
      call,
      value_features=v_BTHP.shape[-1],
    )[0]

  def backward_queries(
    self,
    q_BTHF: Array,
    k_BTHF: Array,
    v_BTHP: Array,
    do_BTHP: Array,
    runs_BT: Array | None,
    before: State | None,
    kernel: Kernel,
  ) -> tuple[Array, Array, Array]:
    """Return dq_BTHF, r_BTH = 1 / (Σ sim + eps) and dz_BTH = −r·(do·o)."""
    call = self._call(kernel)

    def own(chunk, masks):
      _, k_BHCF, v_BHCP, _ = chunk
      return _sum_keys(k_BHCF, v_BHCP, masks, call)

    def outputs(chunk, masks, state):
      q_BHCF, k_BHCF, v_BHCP, do_BHCP = chunk
      num_BHCP, z_BHC = _two_sums(q_BHCF, k_BHCF, v_BHCP, state, masks, call)
      r_BHC = 1 / (z_BHC + call.eps)
      g_BHCP = _numerator_cotangent(do_BHCP, r_BHC)
      dz_BHC = -r_BHC * jnp.sum(g_BHCP * num_BHCP, axis=-1)
      da_BHCC = _product_cotangent(
        q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, call
      )
      seen = _seen(masks, da_BHCC.shape[-1])
      dq_BHCF = numerics.weighted_sum(da_BHCC, k_BHCF, seen)
      if state is not None:
        dq_BHCF += _query_cotangent(q_BHCF, g_BHCP, dz_BHC, state, masks, call)
      return dq_BHCF, r_BHC[..., None], dz_BHC[..., None]

    arrays = (q_BTHF, k_BTHF, v_BTHP, do_BTHP)
    _, (dq_BTHF, r_BTH1, dz_BTH1) = _sweep(
      self,
      own,
      outputs,
      drop_slice_axis(before),
      arrays,
      runs_BT,
      call,
      value_features=do_BTHP.shape[-1],
    )
    return dq_BTHF.astype(q_BTHF.dtype), r_BTH1[..., 0], dz_BTH1[..., 0]

  def backward_keys(
    self,
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
    call = self._call(kernel)

    def own(chunk, masks):
      q_BHCF, _, _, do_BHCP, r_BHC1, dz_BHC1 = chunk
      g_BHCP = _numerator_cotangent(do_BHCP, r_BHC1[..., 0])
      return _sum_queries(q_BHCF, g_BHCP, dz_BHC1[..., 0], masks, call)

    def outputs(chunk, masks, dstate):
      q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC1, dz_BHC1 = chunk
      r_BHC, dz_BHC = r_BHC1[..., 0], dz_BHC1[..., 0]
      g_BHCP = _numerator_cotangent(do_BHCP, r_BHC)
      product_BHCC = _inner(q_BHCF, k_BHCF)
      sim_BHCC = _visible(
        spec.similarity(product_BHCC, call.coefficients), masks
      )
      da_BHCC = _product_cotangent(
        q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, call
      )
      seen = _seen(masks, da_BHCC.shape[-1]).swapaxes(-1, -2)
      dtype = v_BHCP.dtype
      dk_BHCF = numerics.weighted_sum(da_BHCC.swapaxes(-1, -2), q_BHCF, seen)
      sim_BHCC = sim_BHCC.swapaxes(-1, -2).astype(dtype)
      dv_BHCP = numerics.weighted_sum(sim_BHCC, g_BHCP.astype(dtype), seen)
      if dstate is not None:
        dk_past, dv_past = _key_cotangents(k_BHCF, v_BHCP, dstate, masks, call)
        dk_BHCF, dv_BHCP = dk_BHCF + dk_past, dv_BHCP + dv_past
      return dk_BHCF, dv_BHCP

    per_query = (r_BTH[..., None], dz_BTH[..., None])
    arrays = (q_BTHF, k_BTHF, v_BTHP, do_BTHP, *per_query)
    dstate, (dk_BTHF, dv_BTHP) = _sweep(
      self,
      own,
      outputs,
      dstate,
      arrays,
      runs_BT,
      call,
      value_features=do_BTHP.shape[-1],
      reverse=True,
    )
    dk_BTHF = dk_BTHF.astype(k_BTHF.dtype)
    dv_BTHP = dv_BTHP.astype(v_BTHP.dtype)
    return dk_BTHF, dv_BTHP, dstate if return_state else None

  def query_cotangent(
    self,
    q_BTHF: Array,
    do_BTHP: Array,
    r_BTH: Array,
    dz_BTH: Array,
    runs_BT: Array | None,
    kernel: Kernel,
  ) -> State:
    """Return the cotangent of the state before token 0, if the last's is 0."""
    call = self._call(kernel)

    def own(chunk, masks):
      q_BHCF, do_BHCP, r_BHC1, dz_BHC1 = chunk
      g_BHCP = _numerator_cotangent(do_BHCP, r_BHC1[..., 0])
      return _sum_queries(q_BHCF, g_BHCP, dz_BHC1[..., 0], masks, call)

    arrays = (q_BTHF, do_BTHP, r_BTH[..., None], dz_BTH[..., None])
    return _sweep(
      self,
      own,
      _nothing,
      None,
      arrays,
      runs_BT,
      call,
      value_features=do_BTHP.shape[-1],
      reverse=True,
    )[0]

  def _call(self, kernel: Kernel) -> _Call:
    return _Call(kernel.coefficients, kernel.eps, self.products)

  def tiling(self, B: int, T: int, state_BH: State) -> Tiling:
    """Cut B rows of T tokens, as evenly as can be.

    Where `jax.export` leaves B or T open, a span is one chunk.

    Args:
      B: rows.
      T: tokens of a row.
      state_BH: a state of these rows; only its shapes matter.
    """
    N = -(-T // self.chunk)
    C = -(-T // N)
    is_open = not (isinstance(B, int) and isinstance(T, int))
    if self.span_bytes == 0 or is_open:
      return Tiling(N, 1, C)
    H = state_BH.kv_BHEP.shape[1]
    # Of two float32 arrays (C, C) a chunk holds: products, and similarities.
    similarities = 2 * 4 * B * H * C * C
    states = sum(x.size * x.dtype.itemsize for x in state_BH)
    S = max(1, min(N, self.span_bytes // (similarities + states)))
    M = -(-N // S)
    S = -(-N // M)
    return Tiling(M, S, -(-T // (M * S)))


CHUNKS = PlainPasses(chunk=64, span_bytes=0, products=EXACT)
SPANS = PlainPasses(chunk=128, span_bytes=2**30, products=EXACT)


def spans(*, in_parts: bool) -> PlainPasses:
  """Return `SPANS`; `in_parts` says whether 16-bit inputs take `IN_PARTS`."""
  return dataclasses.replace(SPANS, products=IN_PARTS) if in_parts else SPANS


# Cutting rows into spans of chunks.


def _operand_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Return the dtype of the products' operands.

  float16 is computed in float32, because it has no range for squares.
  """
  return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def _cut(x_BTH: Array, tiling: Tiling) -> Array:
  """Cut (B, T, H, ·) into spans (M, S·B, C, H, ·), padded with zeros."""
  B, T = x_BTH.shape[:2]
  M, S, C = tiling
  x_BTH = x_BTH.astype(_operand_dtype(x_BTH.dtype))
  x_BTH = jnp.pad(x_BTH, ((0, 0), (0, M * S * C - T), (0, 0), (0, 0)))
  x_BNCH = x_BTH.reshape(B, M * S, C, *x_BTH.shape[2:])
  return jnp.moveaxis(x_BNCH, 1, 0).reshape(M, S * B, *x_BNCH.shape[2:])


def _join(x_MBCH: Array, T: int, tiling: Tiling) -> Array:
  """Undo `_cut`: (M, S·B, C, H, ·) → (B, T, H, ·)."""
  M, S, C = tiling
  B = x_MBCH.shape[1] // S
  x_NBCH = x_MBCH.reshape(M * S, B, *x_MBCH.shape[2:])
  x_BNCH = jnp.moveaxis(x_NBCH, 0, 1)
  return x_BNCH.reshape(B, M * S * C, *x_BNCH.shape[3:])[:, :T]


def _chunk_runs(
  runs_BT: Array | None, B: int, T: int, tiling: Tiling
) -> tuple[Array, Array, Array] | None:
  """Cut document numbers into spans, as `_cut` does.

  Returns:
    (runs_MBC, before_MB, after_MB), with S·B rows instead of B: the document
    of each token, of the state before each chunk and of the state after it.
    None where no masks are needed.
  """
  M, S, C = tiling
  N = M * S
  if runs_BT is None:
    if N * C == T:
      return None
    # The rows share masks, unless chunks stand in the rows' places too.
    runs_BT = jnp.zeros((1 if S == 1 else B, T), jnp.int32)
  ends_N = jnp.minimum(jnp.arange(1, N + 1) * C, T) - 1
  after_NB = runs_BT[:, ends_N].T
  before_NB = jnp.concatenate([runs_BT[:, :1].T, after_NB[:-1]])
  runs_BT = jnp.pad(runs_BT, ((0, 0), (0, N * C - T)), constant_values=-1)
  runs_NBC = jnp.moveaxis(runs_BT.reshape(-1, N, C), 1, 0)
  return (
    runs_NBC.reshape(M, -1, C),
    before_NB.reshape(M, -1),
    after_NB.reshape(M, -1),
  )


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


# Carrying the state over a row.


def _sweep(
  passes: PlainPasses,
  own: Callable[[tuple[Array, ...], Masks | None], State],
  outputs: Callable[[tuple[Array, ...], Masks | None, Any], tuple[Array, ...]],
  state: State | None,
  arrays_BTH: tuple[Array, ...],
  runs_BT: Array | None,
  call: _Call,
  *,
  value_features: int,
  reverse: bool = False,
) -> tuple[Any, tuple[Array, ...]]:
  """Carry a state over the rows, and compute the outputs of every chunk.

  Where a span has S chunks, `own` and `outputs` see S·B rows instead of B.

  Args:
    passes: how the rows are cut.
    own: (chunk, masks) → the state of a chunk's tokens alone.
    outputs: (chunk, masks, state) → arrays (B, H, C, ·). The state is that of
      the tokens before the chunk, or after it if `reverse`; None for zeros.
    state: the state before the rows, or after them if `reverse`; None for 0.
    arrays_BTH: (B, T, H, ·), queries or keys first; the functions see a chunk
      of each, as (B, H, C, ·).
    runs_BT: the documents of the tokens.
    call: static numbers.
    value_features: P.
    reverse: whether the state goes from the last token to the first.

  Returns:
    (state, outputs): the state after the sweep, and arrays (B, T, H, ·).
  """
  B, T, H, F = arrays_BTH[0].shape
  zero = state_lib.zero_state(
    B,
    H,
    F,
    value_features,
    coefficients=call.coefficients,
    dtype=arrays_BTH[0].dtype,
  )
  tiling = passes.tiling(B, T, zero)
  inputs = (
    tuple(_cut(x_BTH, tiling) for x_BTH in arrays_BTH),
    _chunk_runs(runs_BT, B, T, tiling),
  )

  def swap_time_and_heads(arrays):
    # Chunk by chunk, while a chunk is in the cache, and not all at once.
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)

  def span(state, inputs):
    arrays_BCH, runs = inputs
    chunk, masks = swap_time_and_heads(arrays_BCH), _masks(runs)
    joined_B111 = None if masks is None else masks.joined_B111
    entering, state = _pass_state(
      state, own(chunk, masks), joined_B111, tiling.S, reverse=reverse
    )
    return state, swap_time_and_heads(outputs(chunk, masks, entering))

  if state is None and not tiling.is_one_chunk:
    state = zero
  if tiling.M == 1:
    state, results = span(state, jax.tree.map(lambda x: x[0], inputs))
    results = jax.tree.map(lambda x: x[None], results)
  else:
    state, _ = vary_alike(state, inputs)
    state, results = jax.lax.scan(span, state, inputs, reverse=reverse)
  return state, tuple(_join(x, T, tiling) for x in results)


def _nothing(*_: Any) -> tuple[()]:
  """Return no outputs, for the passes that only sum a state."""
  return ()


def _pass_state(
  state: State | None,
  own: State,
  joined_B111: Array | None,
  S: int,
  *,
  reverse: bool,
) -> tuple[State | None, State]:
  """Pass a state through the S chunks of a span, by a prefix sum.

  Args:
    state: the state (B, H, ·, ·) that enters the span; None for zeros, before a
      single chunk.
    own: the states of the chunks alone, (S·B, H, ·, ·).
    joined_B111: of the chunks, as in `Masks`, (S·B, 1, 1, 1).
    S: chunks of the span.
    reverse: whether the state enters at the last chunk.

  Returns:
    (entering, state): the state that enters each chunk, in the shape of `own`,
    and that which leaves the span.
  """
  if S == 1:
    return state, _carry(state, own, joined_B111)
  own_SB, joined_SB = jax.tree.map(
    lambda x: x.reshape(S, -1, *x.shape[1:]), (own, joined_B111)
  )
  first, last = (-1, 0) if reverse else (0, -1)

  def at(tree, s):
    return jax.tree.map(lambda x: x[s], tree)

  leaving_first = _carry(state, at(own_SB, first), at(joined_SB, first))
  own_SB = jax.tree.map(lambda x, y: x.at[first].set(y), own_SB, leaving_first)

  def add(earlier, later):
    (state, joined), (own, joined_own) = earlier, later
    both = None if joined is None else joined & joined_own
    return _carry(state, own, joined_own), both

  leaving_SB, _ = jax.lax.associative_scan(
    add, (own_SB, joined_SB), reverse=reverse
  )

  def shift(x_B, x_SB):
    parts = [x_SB[1:], x_B[None]] if reverse else [x_B[None], x_SB[:-1]]
    return jnp.concatenate(parts).reshape(-1, *x_SB.shape[2:])

  entering = jax.tree.map(shift, state, leaving_SB)
  return entering, at(leaving_SB, last)


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


def _two_sums(q_BHCF, k_BHCF, v_BHCP, state, masks, call):
  """Compute each query's Σ sim v and Σ sim, as (num_BHCP, z_BHC)."""
  sim_BHCC = _visible(
    spec.similarity(_inner(q_BHCF, k_BHCF), call.coefficients), masks
  )
  z_BHC = sim_BHCC.sum(axis=-1)
  num_BHCP = numerics.weighted_sum(
    sim_BHCC.astype(v_BHCP.dtype), v_BHCP, _seen(masks, v_BHCP.shape[-2])
  )
  if state is None:
    return num_BHCP, z_BHC
  past_num, past_z = state_lib.query_state(
    q_BHCF, state, call.coefficients, call.products
  )
  if masks is not None:
    past_num = jnp.where(masks.first_B1C[..., None], past_num, 0)
    past_z = jnp.where(masks.first_B1C, past_z, 0)
  return num_BHCP + past_num, z_BHC + past_z


def _product_cotangent(
  q_BHCF, k_BHCF, v_BHCP, do_BHCP, r_BHC, dz_BHC, masks, call
):
  """Compute da_BHCC, the cotangent of q_t·k_s within the chunk."""
  # r multiplies the sum do·v. A rounded g = r·do would be off by more than what
  # is left of g·v + dz where the two nearly cancel.
  dsim_BHCC = r_BHC[..., None] * _inner(do_BHCP, v_BHCP) + dz_BHC[..., None]
  c1, c2 = call.coefficients.c1, call.coefficients.c2
  slope_BHCC = c1 + 2 * c2 * _inner(q_BHCF, k_BHCF)  # of sim, by q·k
  da_BHCC = dsim_BHCC * slope_BHCC
  return _visible(da_BHCC, masks).astype(q_BHCF.dtype)


def _query_cotangent(q_BHCF, g_BHCP, dz_BHC, state, masks, call):
  """Compute the cotangent of the queries that comes through the state."""

  def sums(q):
    return state_lib.query_state(q, state, call.coefficients, call.products)

  (dq_BHCF,) = jax.vjp(sums, q_BHCF)[1]((g_BHCP, dz_BHC))
  dq_BHCF = dq_BHCF.astype(dz_BHC.dtype)
  if masks is None:
    return dq_BHCF
  return jnp.where(masks.first_B1C[..., None], dq_BHCF, 0)


def _key_cotangents(k_BHCF, v_BHCP, dstate, masks, call):
  """Compute the cotangents of keys and values that come through the state."""

  def state_of(k, v):
    return state_lib.key_state(k, v, call.coefficients, products=call.products)

  grads = jax.vjp(state_of, k_BHCF, v_BHCP)[1](dstate)
  if masks is not None:
    grads = (jnp.where(masks.last_B1C[..., None], x, 0) for x in grads)
  return tuple(x.astype(dstate.kv_BHEP.dtype) for x in grads)


def _carry(old: State | None, new: State, joined_B111: Array | None) -> State:
  """Add the state that came in to the chunk's own, within one document."""
  if old is None:
    return new
  if joined_B111 is not None:
    old = jax.tree.map(lambda x: jnp.where(joined_B111, x, 0), old)
  return jax.tree.map(jnp.add, old, new)


def _sum_keys(k_BHCF, v_BHCP, masks, call):
  """Return the state of a chunk's tokens, those of its last document."""
  keep_B1C = None if masks is None else masks.last_B1C
  return state_lib.key_state(
    k_BHCF, v_BHCP, call.coefficients, keep_B1C, call.products
  )


def _sum_queries(q_BHCF, g_BHCP, dz_BHC, masks, call):
  """Return what a chunk adds to the cotangent of the state before it."""
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
    coefficients=call.coefficients,
    dtype=dz_BHC.dtype,
  )
  # A state that is the same on every device would get a cotangent that is
  # summed over devices. Here each device has its own.
  zero, _ = vary_alike(zero, g_BHCP)

  def sums(state):
    return state_lib.query_state(
      q_BHCF, state, call.coefficients, call.products
    )

  (new,) = jax.vjp(sums, zero)[1]((g_BHCP, dz_BHC))
  return new
