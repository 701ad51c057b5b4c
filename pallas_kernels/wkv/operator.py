"""WKV, the recurrence of RWKV-4 (arXiv 2305.13048), and its derivative.

Each channel on its own, with a decay w < 0 and a bonus u:

    A_{t+1} = e^w A_t + e^{k_t} v_t,   B_{t+1} = e^w B_t + e^{k_t}
    y_t = (A_t + e^{u + k_t} v_t) / (B_t + e^{u + k_t})

`WKVState` holds A and B over e^m, m the largest exponent so far. T tokens are N
chunks of C ≈ √T, so that 2C + N steps run one after the other instead of T:

1. each chunk's own sums, all chunks at once;
2. the sums before each chunk, chunk by chunk;
3. the outputs, all chunks at once.

The gradient has the same form from the right. With g_t = dy_t / (B_t + e^{u +
k_t}),

    λ_t = g_t + e^w λ_{t+1},   μ_t = g_t y_t + e^w μ_{t+1}
    dv_t = e^{k_t} λ_{t+1} + e^{u + k_t} g_t
    dk_t = e^{k_t} (v_t λ_{t+1} − μ_{t+1}) + e^{u + k_t} g_t (v_t − y_t)
    du = Σ e^{u + k_t} g_t (v_t − y_t),   dw = Σ g_t (A'_t − y_t B'_t)

where A' = ∂A/∂w. The backward keeps k and v in their own dtype, and the sums
before each chunk: 3/C of an array as large as k.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.export
import jax.numpy as jnp

from pallas_kernels.arguments import float_array, integer_array
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.documents import document_runs
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.plain_derivatives import OwnDerivative
from pallas_kernels.sharding import vary_alike
from pallas_kernels.wkv.state import (
  WKVState,
  add_token,
  empty_wkv_state,
  output,
)

_STATE = WKVState("BD", "BD", "BD")  # the axes of a state's arrays
_OPEN_CHUNK = 32  # tokens of a chunk where the length of a row is not known


@on_any_mesh("BTD", ("BTD", _STATE))
def wkv(
  k: Array,
  v: Array,
  w: Array,
  u: Array,
  *,
  initial_state: WKVState | None = None,
  segment_ids: Array | None = None,
) -> tuple[Array, WKVState]:
  """Compute each channel's mean of past values under exponential weights.

      y_t = (Σ_{i<t} e^{(t−1−i) w + k_i} v_i + e^{u + k_t} v_t)
            / (the same without v)

  Any finite k is safe: nothing overflows. About 3 √T steps run one after the
  other. It has reverse-mode derivatives only. Over a mesh, batch and channels
  may be split, by XLA; time may not.

  Args:
    k: (B, T, D), exponents of the tokens' weights, of any float dtype.
    v: (B, T, D), values, in k's dtype.
    w: (D,), decays, finite and < 0. Its dtype, float32 or float64, is that of
      all sums.
    u: (D,), bonuses of a token for its own output, in w's dtype.
    initial_state: (B, D) arrays in w's dtype: the state of the tokens before,
      of the first token's document. None: no tokens before.
    segment_ids: integers (B, T). A document is a run of one id and sees itself
      alone. None: a row is one document.

  Returns:
    (y, state): y (B, T, D) in v's dtype, and the state after the last token, of
    the last token's document.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  k = float_array("k", k, ("B", "T", "D"), nonempty=True)
  B, T, D = k.shape
  v = float_array("v", v, k.shape, like=("k", k))
  w, u = _parameters(w, u, D)
  if initial_state is None:
    initial_state = empty_wkv_state((B, D), w.dtype)
  initial_state = _state("initial_state", initial_state, (B, D), w)
  start_BT = jnp.zeros((B, T), bool)
  if segment_ids is not None:
    segment_ids = integer_array("segment_ids", segment_ids, (B, T))
    changes_BT = jnp.diff(document_runs(segment_ids), axis=1) > 0
    start_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)))
  arrays = vary_alike(k, v, w, u, initial_state, start_BT)
  return compile_once(_wkv, (), *arrays)


@on_any_mesh("BD", ("BD", _STATE))
def wkv_step(
  k: Array, v: Array, w: Array, u: Array, state: WKVState
) -> tuple[Array, WKVState]:
  """Compute `wkv` of one more token a row.

  Args:
    k: (B, D), in w's dtype.
    v: (B, D), in w's dtype.
    w: (D,), decays < 0, float32 or float64.
    u: (D,), bonuses, in w's dtype.
    state: (B, D) arrays in w's dtype, of the tokens before: from `wkv`, an
      earlier step or `empty_wkv_state`.

  Returns:
    (y, state): y (B, D), and the state after the token.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  k = float_array("k", k, ("B", "D"))
  w, u = _parameters(w, u, k.shape[1])
  k, v = (
    float_array(name, x, k.shape, like=("w", w))
    for name, x in (("k", k), ("v", v))
  )
  state = _state("state", state, k.shape, w)
  y, *_ = output(state, k, v, u[None])
  return y, add_token(state, w[None], k, v, jnp.ones_like(v))


def _parameters(w: Array, u: Array, D: int) -> tuple[Array, Array]:
  """Return w and u as arrays; raise ValueError if they do not fit."""
  w = float_array("w", w, (D,))
  if w.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"w has dtype {w.dtype}: expected float32 or float64")
  return w, float_array("u", u, (D,), like=("w", w))


def _state(
  name: str, state: WKVState, shape: tuple[int, ...], w: Array
) -> WKVState:
  """Return a state of arrays; raise ValueError if it does not fit."""
  if not isinstance(state, WKVState):
    raise ValueError(f"{name} is a {type(state).__name__}: expected a WKVState")
  return WKVState(
    *(
      float_array(f"{name}.{field}", x, shape, like=("w", w))
      for field, x in zip(WKVState._fields, state, strict=True)
    )
  )


class _Marks(NamedTuple):
  """The effect of a token or a chunk on the sums; (…, B, N, 1) or (…, B, 1)."""

  start: Array  # whether a document starts in it
  tokens: Array  # how many tokens it is: 0 for the padding of the last chunk


@OwnDerivative
def _wkv(k_BTD, v_BTD, w_D, u_D, state: WKVState, start_BT):
  return _forward(k_BTD, v_BTD, w_D, u_D, state, start_BT)[0]


def _forward(k_BTD, v_BTD, w_D, u_D, state, start_BT):
  T = k_BTD.shape[1]
  w_11D, u_11D = w_D[None, None], u_D[None, None]
  marks, chunk_marks = _marks(start_BT)
  k_CBND, v_CBND = _split(k_BTD), _split(v_BTD)

  def own(sums, inputs):
    k, v = (x.astype(w_D.dtype) for x in inputs[:2])
    mark = inputs[2]
    sums = _reset(sums, mark)
    after = add_token(sums, w_11D, k, v, jnp.ones_like(v))
    return _where(mark.tokens > 0, after, sums), None

  def outputs(sums, inputs):
    k, v = (x.astype(w_D.dtype) for x in inputs[:2])
    y, *_ = output(_reset(sums, inputs[2]), k, v, u_11D)
    return own(sums, inputs)[0], y.astype(v_BTD.dtype)

  inputs = (k_CBND, v_CBND, marks)
  none, _ = vary_alike(empty_wkv_state(k_CBND.shape[1:], w_D.dtype), inputs)
  local, _ = jax.lax.scan(own, none, inputs)
  after, before = _chain(state, local, chunk_marks, w_D)
  _, y_CBND = jax.lax.scan(outputs, before, inputs)
  kept = (k_BTD, v_BTD, w_D, u_D, state, start_BT, before, after.maximum)
  return (_join(y_CBND, T), after), kept


def _backward(kept, cotangents):
  k_BTD, v_BTD, w_D, u_D, state, start_BT, before, maximum_BD = kept
  dy_BTD, after = cotangents
  marks, chunk_marks = _marks(start_BT)
  k_CBND, v_CBND, dy_CBND = _split(k_BTD), _split(v_BTD), _split(dy_BTD)
  outputs, ends, dw_D, du_D = _from_the_left(
    w_D, u_D, before, (k_CBND, v_CBND, dy_CBND, marks)
  )
  # The last state's cotangents are λ and μ after the last token.
  end = WKVState(after.numerator, -after.denominator, -maximum_BD)
  first, later, inputs = _from_the_right(
    w_D, u_D, end, chunk_marks, (k_CBND, v_CBND, *outputs, marks)
  )
  # What later chunks add to the gradient of this chunk's decays.
  last, numerator_slope, denominator_slope = ends
  through = jnp.exp(last.maximum + later.maximum) * (
    later.numerator * numerator_slope - later.denominator * denominator_slope
  )
  scale_BD = jnp.exp(state.maximum + first.maximum)
  da_BD, db_BD = scale_BD * first.numerator, -scale_BD * first.denominator
  dm_BD = state.numerator * da_BD + state.denominator * db_BD
  dk_BTD, dv_BTD = (_join(x, k_BTD.shape[1]) for x in inputs)
  dw_D = dw_D + through.sum(axis=(0, 1))
  return dk_BTD, dv_BTD, dw_D, du_D, WKVState(da_BD, db_BD, dm_BD), None


_wkv.defvjp(_forward, compiled_backward(_backward))


def _from_the_left(w_D, u_D, before, inputs):
  """Walk each chunk from the left, for what the backward needs of the past.

  Slopes A' and B' count the decays in their own chunk alone, and so does dw.

  Args:
    w_D: decays.
    u_D: bonuses.
    before: the sums before each chunk.
    inputs: k, v, dy and marks of each token.

  Returns:
    (g, y, exponent of y's terms) of each token; each chunk's last sums with A'
    and B'; dw; du.
  """
  w_11D, u_11D = w_D[None, None], u_D[None, None]
  zero, _ = vary_alike(jnp.zeros_like(before.maximum), before)

  def body(carry, inputs):
    sums, *slopes, dw, du = carry
    k, v, dy = (x.astype(w_D.dtype) for x in inputs[:3])
    mark = inputs[3]
    # Empty sums take the factors `past` and `keep` of the slopes to 0.
    sums = _reset(sums, mark)
    y, p, past, own, total = output(sums, k, v, u_11D)
    g = dy / total
    dw = dw + g * past * (slopes[0] - y * slopes[1])
    du = du + g * own * (v - y)
    later = add_token(sums, w_11D, k, v, jnp.ones_like(v))
    keep = jnp.exp((sums.maximum - later.maximum) + w_11D)
    grown = [keep * (x + s) for x, s in zip(slopes, sums[:2], strict=True)]
    ends = _where(mark.tokens > 0, (later, *grown), (sums, *slopes))
    return (*ends, dw, du), (g, y, p)

  (*ends, dw, du), outputs = jax.lax.scan(
    body, (before, zero, zero, zero, zero), inputs
  )
  return outputs, ends, dw.sum(axis=(0, 1)), du.sum(axis=(0, 1))


def _from_the_right(w_D, u_D, end, chunk_marks, inputs):
  """Walk each chunk from the right.

  Args:
    w_D: decays.
    u_D: bonuses.
    end: (λ, μ) after the row, over an exponent −p.
    chunk_marks: marks of each chunk.
    inputs: k, v, g, y, exponent and marks of each token.

  Returns:
    (λ, μ) before the row and after each chunk, over exponents −p; (dk, dv).
  """
  w_11D, u_11D = w_D[None, None], u_D[None, None]
  k_CBND, v_CBND, g_CBND, *_ = inputs

  def own(sums, inputs):
    _, _, g, y, p, mark = inputs
    earlier = add_token(sums, w_11D, -p, g, g * y)
    return _reset(_where(mark.tokens > 0, earlier, sums), mark), None

  def gradients(sums, inputs):
    k, v, g, y, p = (x.astype(w_D.dtype) for x in inputs[:5])
    past, own_g = jnp.exp(k + sums.maximum), g * jnp.exp((k - p) + u_11D)
    dv = past * sums.numerator + own_g
    dk = past * (v * sums.numerator - sums.denominator) + own_g * (v - y)
    grads = dk.astype(k_CBND.dtype), dv.astype(v_CBND.dtype)
    return own(sums, inputs)[0], grads

  none, _ = vary_alike(empty_wkv_state(g_CBND.shape[1:], w_D.dtype), inputs)
  local, _ = jax.lax.scan(own, none, inputs, reverse=True)
  first, later = _chain(end, local, chunk_marks, w_D, reverse=True)
  _, grads = jax.lax.scan(gradients, later, inputs, reverse=True)
  return first, later, grads


def _chain(
  sums: WKVState,
  local: WKVState,
  marks: _Marks,
  w_D: Array,
  *,
  reverse: bool = False,
) -> tuple[WKVState, WKVState]:
  """Return the sums (B, D) after all chunks, and (B, N, D) before each.

  Args:
    sums: (B, D), before the first chunk.
    local: (B, N, D), each chunk's own sums.
    marks: (N, B, 1), of the chunks.
    w_D: decays.
    reverse: walk from the right, where "before" and "after" change places.
  """

  def body(sums, inputs):
    chunk, mark = inputs
    decay = mark.tokens.astype(w_D.dtype) * w_D[None]
    x, y, p = chunk
    after = add_token(sums, decay, p, x, y)
    return _where(mark.start, chunk, after), sums

  chunks = WKVState(*(jnp.moveaxis(x, 1, 0) for x in local))
  after, before = jax.lax.scan(body, sums, (chunks, marks), reverse=reverse)
  return after, WKVState(*(jnp.moveaxis(x, 0, 1) for x in before))


def _reset(sums: WKVState, mark: _Marks) -> WKVState:
  """Return empty sums where a document starts, else the sums."""
  none = empty_wkv_state(sums.maximum.shape, sums.maximum.dtype)
  return _where(mark.start, none, sums)


def _where(condition: Array, x: Any, y: Any) -> Any:
  pick = lambda x, y: jnp.where(condition, x, y)
  return jax.tree.map(pick, x, y)


def _marks(start_BT: Array) -> tuple[_Marks, _Marks]:
  """Return the marks of the tokens (C, B, N, 1) and of the chunks (N, B, 1)."""
  start_CBN1 = _split(start_BT[..., None])
  tokens_CBN1 = _split(jnp.ones((1, start_BT.shape[1], 1), jnp.int32))
  chunk = _Marks(
    jnp.moveaxis(start_CBN1.any(axis=0), 1, 0),
    jnp.moveaxis(tokens_CBN1.sum(axis=0), 1, 0),
  )
  return _Marks(start_CBN1, tokens_CBN1), chunk


def _split(x_BTD: Array) -> Array:
  """Return (C, B, N, D): chunks of C ≈ √T tokens, the last padded with 0."""
  B, T, D = x_BTD.shape
  # `jax.export` may leave the number of tokens open.
  is_open = jax.export.is_symbolic_dim(T)
  C = _OPEN_CHUNK if is_open else 2 ** round(math.log2(T) / 2)
  N = -(-T // C)
  x_BTD = jnp.pad(x_BTD, ((0, 0), (0, N * C - T), (0, 0)))
  return jnp.moveaxis(x_BTD.reshape(B, N, C, D), 2, 0)


def _join(x_CBND: Array, length: int) -> Array:
  """Return (B, T, D) without the padding: the inverse of `_split`."""
  x_BNCD = jnp.moveaxis(x_CBND, 0, 2)
  B, N, C, D = x_BNCD.shape
  return x_BNCD.reshape(B, N * C, D)[:, :length]
