"""WKV, the recurrence of RWKV-4 (arXiv 2305.13048), and its gradient.

Each channel on its own, with a decay w < 0 and a bonus u:

    A_{t+1} = e^w A_t + e^{k_t} v_t,   B_{t+1} = e^w B_t + e^{k_t}
    y_t = (A_t + e^{u + k_t} v_t) / (B_t + e^{u + k_t})

`Sums` holds A and B over e^m, m the largest exponent so far. T tokens are N
chunks of C ≈ √T, so that 2C + N steps run one after the other instead of T:
each chunk's own sums, all chunks at once; the sums before each chunk, chunk by
chunk; the outputs, all chunks at once. The gradient has the same form from the
right: with g_t = dy_t / (B_t + e^{u + k_t}),

    λ_t = g_t + e^w λ_{t+1},   μ_t = g_t y_t + e^w μ_{t+1}
    dv_t = e^{k_t} λ_{t+1} + e^{u + k_t} g_t
    dk_t = e^{k_t} (v_t λ_{t+1} − μ_{t+1}) + e^{u + k_t} g_t (v_t − y_t)
    du = Σ e^{u + k_t} g_t (v_t − y_t),   dw = Σ g_t (A'_t − y_t B'_t)

where A' = ∂A/∂w. Held for it are k and v as they came, and the sums before each
chunk: 3/C of an array as large as k. Reverse mode alone.
"""

import math
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.sharding import vary_alike

# The exponent of no token. Finite: −∞ − −∞ is NaN.
EMPTY = -1e38


class Sums(NamedTuple):
  """Two sums of terms x e^p, each over e^maximum; arrays of one shape.

  It stands for numerator·e^maximum and denominator·e^maximum. Gradients are
  those of a function of these two products, as every later output is.
  """

  numerator: Array
  denominator: Array
  maximum: Array


class _Marks(NamedTuple):
  """What a token, or a chunk, does to the sums; (…, B, N, 1) or (…, B, 1)."""

  start: Array  # a document starts in it
  tokens: Array  # how many it is: 0 for the padding of the last chunk


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> Sums:
  """The sums before the first token."""
  zero = jnp.zeros(shape, dtype)
  return Sums(zero, zero, jnp.full(shape, EMPTY, dtype))


def step(
  k: Array, v: Array, w: Array, u: Array, sums: Sums
) -> tuple[Array, Sums]:
  """y of one token, and the sums after it; arrays of one shape or size 1."""
  y, *_ = _output(sums, k, v, u)
  return y, _add(sums, w, k, v, jnp.ones_like(v))


def wkv(
  k_BTD: Array,
  v_BTD: Array,
  w_D: Array,
  u_D: Array,
  sums: Sums,
  start_BT: Array,
) -> tuple[Array, Sums]:
  """y_BTD in v's dtype, and the sums after the row.

  Args:
    k_BTD: exponents of the tokens' weights.
    v_BTD: values, of k's dtype.
    w_D: decays, finite and < 0, in the dtype of the sums.
    u_D: bonuses, in the dtype of the sums.
    sums: (B, D) of the first token's document.
    start_BT: True where another document starts than the token's before.
  """
  return _wkv(*vary_alike(k_BTD, v_BTD, w_D, u_D, sums, start_BT))


@jax.custom_vjp
def _wkv(k_BTD, v_BTD, w_D, u_D, sums: Sums, start_BT):
  return _forward(k_BTD, v_BTD, w_D, u_D, sums, start_BT)[0]


def _forward(k_BTD, v_BTD, w_D, u_D, sums, start_BT):
  T = k_BTD.shape[1]
  w_11D, u_11D = w_D[None, None], u_D[None, None]
  marks, chunk_marks = _marks(start_BT)
  k_CBND, v_CBND = _split(k_BTD), _split(v_BTD)

  def own(sums, inputs):
    k, v = (x.astype(w_D.dtype) for x in inputs[:2])
    mark = inputs[2]
    sums = _reset(sums, mark)
    after = _add(sums, w_11D, k, v, jnp.ones_like(v))
    return _where(mark.tokens > 0, after, sums), None

  def output(sums, inputs):
    k, v = (x.astype(w_D.dtype) for x in inputs[:2])
    y, *_ = _output(_reset(sums, inputs[2]), k, v, u_11D)
    return own(sums, inputs)[0], y.astype(v_BTD.dtype)

  inputs = (k_CBND, v_CBND, marks)
  none, _ = vary_alike(empty(k_CBND.shape[1:], w_D.dtype), inputs)
  local, _ = jax.lax.scan(own, none, inputs)
  after, before = _chain(sums, local, chunk_marks, w_D)
  _, y_CBND = jax.lax.scan(output, before, inputs)
  held = (k_BTD, v_BTD, w_D, u_D, sums, start_BT, before, after.maximum)
  return (_join(y_CBND, T), after), held


def _backward(held, cotangents):
  k_BTD, v_BTD, w_D, u_D, sums, start_BT, before, maximum_BD = held
  dy_BTD, after = cotangents
  marks, chunk_marks = _marks(start_BT)
  k_CBND, v_CBND, dy_CBND = _split(k_BTD), _split(v_BTD), _split(dy_BTD)
  outputs, ends, dw_D, du_D = _from_the_left(
    w_D, u_D, before, (k_CBND, v_CBND, dy_CBND, marks)
  )
  # The state's cotangents: λ and μ behind the last token.
  end = Sums(after.numerator, -after.denominator, -maximum_BD)
  first, behind, inputs = _from_the_right(
    w_D, u_D, end, chunk_marks, (k_CBND, v_CBND, *outputs, marks)
  )
  # What the chunks behind have of the decays in this one.
  last, numerator_slope, denominator_slope = ends
  through = jnp.exp(last.maximum + behind.maximum) * (
    behind.numerator * numerator_slope - behind.denominator * denominator_slope
  )
  scale_BD = jnp.exp(sums.maximum + first.maximum)
  da_BD, db_BD = scale_BD * first.numerator, -scale_BD * first.denominator
  dm_BD = sums.numerator * da_BD + sums.denominator * db_BD
  dk_BTD, dv_BTD = (_join(x, k_BTD.shape[1]) for x in inputs)
  dw_D = dw_D + through.sum(axis=(0, 1))
  return dk_BTD, dv_BTD, dw_D, du_D, Sums(da_BD, db_BD, dm_BD), None


def _from_the_left(w_D, u_D, before, inputs):
  """g, y and its exponent; the chunks' last sums and slopes A', B'; dw, du.

  Slopes count the decays in their own chunk alone, and so does dw.
  """
  w_11D, u_11D = w_D[None, None], u_D[None, None]
  zero, _ = vary_alike(jnp.zeros_like(before.maximum), before)

  def body(carry, inputs):
    sums, *slopes, dw, du = carry
    k, v, dy = (x.astype(w_D.dtype) for x in inputs[:3])
    mark = inputs[3]
    sums = _reset(sums, mark)
    slopes = [jnp.where(mark.start, 0, x) for x in slopes]
    y, p, past, own, total = _output(sums, k, v, u_11D)
    g = dy / total
    dw = dw + g * past * (slopes[0] - y * slopes[1])
    du = du + g * own * (v - y)
    later = _add(sums, w_11D, k, v, jnp.ones_like(v))
    keep = jnp.exp((sums.maximum - later.maximum) + w_11D)
    grown = [keep * (x + s) for x, s in zip(slopes, sums[:2], strict=True)]
    ends = _where(mark.tokens > 0, (later, *grown), (sums, *slopes))
    return (*ends, dw, du), (g, y, p)

  (*ends, dw, du), outputs = jax.lax.scan(
    body, (before, zero, zero, zero, zero), inputs
  )
  return outputs, ends, dw.sum(axis=(0, 1)), du.sum(axis=(0, 1))


def _from_the_right(w_D, u_D, end, chunk_marks, inputs):
  """(λ, μ) before the row and behind each chunk, over exponents −p; dk, dv."""
  w_11D, u_11D = w_D[None, None], u_D[None, None]
  k_CBND, v_CBND, g_CBND, *_ = inputs

  def own(sums, inputs):
    _, _, g, y, p, mark = inputs
    earlier = _add(sums, w_11D, -p, g, g * y)
    return _reset(_where(mark.tokens > 0, earlier, sums), mark), None

  def output(sums, inputs):
    k, v, g, y, p = (x.astype(w_D.dtype) for x in inputs[:5])
    past, own_g = jnp.exp(k + sums.maximum), g * jnp.exp((k - p) + u_11D)
    dv = past * sums.numerator + own_g
    dk = past * (v * sums.numerator - sums.denominator) + own_g * (v - y)
    grads = dk.astype(k_CBND.dtype), dv.astype(v_CBND.dtype)
    return own(sums, inputs)[0], grads

  none, _ = vary_alike(empty(g_CBND.shape[1:], w_D.dtype), inputs)
  local, _ = jax.lax.scan(own, none, inputs, reverse=True)
  first, behind = _chain(end, local, chunk_marks, w_D, reverse=True)
  _, grads = jax.lax.scan(output, behind, inputs, reverse=True)
  return first, behind, grads


_wkv.defvjp(_forward, _backward)


def _add(sums: Sums, w: Array, p: Array, x: Array, y: Array) -> Sums:
  """The sums, decayed by e^w, and the terms x e^p and y e^p.

  What the new maximum is rounded by stands in the two factors again, so that
  such errors do not add up over the tokens.
  """
  maximum = jnp.maximum(sums.maximum + w, p)
  keep = jnp.exp((sums.maximum - maximum) + w)
  new = jnp.exp(p - maximum)
  return Sums(
    keep * sums.numerator + new * x, keep * sums.denominator + new * y, maximum
  )


def _output(sums: Sums, k: Array, v: Array, u: Array) -> tuple[Array, ...]:
  """y, its exponent p, the factors of past and own token, the denominator."""
  p = jnp.maximum(sums.maximum, k + u)
  past, own = jnp.exp(sums.maximum - p), jnp.exp((k - p) + u)
  total = past * sums.denominator + own
  return (past * sums.numerator + own * v) / total, p, past, own, total


def _chain(
  sums: Sums,
  local: Sums,
  marks: _Marks,
  w_D: Array,
  *,
  reverse: bool = False,
) -> tuple[Sums, Sums]:
  """The sums (B, D) after all chunks, and those (B, N, D) before each."""

  def body(sums, inputs):
    chunk, mark = inputs
    decay = mark.tokens.astype(w_D.dtype) * w_D[None]
    x, y, p = chunk
    after = _add(sums, decay, p, x, y)
    return _where(mark.start, chunk, after), sums

  chunks = Sums(*(jnp.moveaxis(x, 1, 0) for x in local))
  after, before = jax.lax.scan(body, sums, (chunks, marks), reverse=reverse)
  return after, Sums(*(jnp.moveaxis(x, 0, 1) for x in before))


def _reset(sums: Sums, mark: _Marks) -> Sums:
  return _where(mark.start, empty(sums.maximum.shape, sums.maximum.dtype), sums)


def _where(condition: Array, x, y):
  pick = lambda x, y: jnp.where(condition, x, y)
  return jax.tree.map(pick, x, y)


def _marks(start_BT: Array) -> tuple[_Marks, _Marks]:
  """Of the tokens, (C, B, N, 1), and of the chunks, (N, B, 1)."""
  start_CBN1 = _split(start_BT[..., None])
  tokens_CBN1 = _split(jnp.ones((1, start_BT.shape[1], 1), jnp.int32))
  chunk = _Marks(
    jnp.moveaxis(start_CBN1.any(axis=0), 1, 0),
    jnp.moveaxis(tokens_CBN1.sum(axis=0), 1, 0),
  )
  return _Marks(start_CBN1, tokens_CBN1), chunk


def _split(x_BTD: Array) -> Array:
  """x_CBND: chunks of C ≈ √T tokens, the last one padded with zeros."""
  B, T, D = x_BTD.shape
  C = 2 ** round(math.log2(T) / 2)
  x_BTD = jnp.pad(x_BTD, ((0, 0), (0, -T % C), (0, 0)))
  return jnp.moveaxis(x_BTD.reshape(B, -1, C, D), 2, 0)


def _join(x_CBND: Array, length: int) -> Array:
  x_BNCD = jnp.moveaxis(x_CBND, 0, 2)
  B, N, C, D = x_BNCD.shape
  return x_BNCD.reshape(B, N * C, D)[:, :length]
