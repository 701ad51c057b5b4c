"""RWKV-4's recurrence in XLA, in chunks, and its derivative.

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

from pallas_kernels.compile_once import compiled_backward
from pallas_kernels.plain_derivatives import OwnDerivative
from pallas_kernels.sharding import vary_alike
from pallas_kernels.wkv.state import (
  WKVState,
  add_token,
  empty_wkv_state,
  output,
  state_gradient,
)

_OPEN_CHUNK = 32  # tokens of a chunk where the length of a row is not known


class _Marks(NamedTuple):
  """The effect of a token or a chunk on the sums; (…, B, N, 1) or (…, B, 1)."""

  start: Array  # whether a document starts in it
  tokens: Array  # how many tokens it is: 0 for the padding of the last chunk


@OwnDerivative
def wkv(
  k_BTD: Array,
  v_BTD: Array,
  w_D: Array,
  u_D: Array,
  state: WKVState,
  start_BT: Array,
) -> tuple[Array, WKVState]:
  """Return y and the sums after the row.

  Args:
    k_BTD: exponents of the tokens' weights.
    v_BTD: values.
    w_D: decays.
    u_D: bonuses.
    state: the sums before the row.
    start_BT: whether each token starts a document.
  """
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
  dk_BTD, dv_BTD = (_join(x, k_BTD.shape[1]) for x in inputs)
  dw_D = dw_D + through.sum(axis=(0, 1))
  return dk_BTD, dv_BTD, dw_D, du_D, state_gradient(state, first), None


wkv.defvjp(_forward, compiled_backward(_backward))


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
