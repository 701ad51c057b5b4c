"""The recurrent state of WKV: two sums over a common exponential.

The sums of e^{k_t} v_t and e^{k_t} overflow float32 for keys above 88. A state
therefore holds them over e^m, m the largest exponent so far.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

# The exponent of no token. It is finite, because −∞ − −∞ is NaN.
EMPTY = -1e38


class WKVState(NamedTuple):
  """Two sums of terms x e^p, each over e^maximum; arrays of one shape.

  They stand for numerator · e^maximum and denominator · e^maximum. Gradients
  are those of a function of these two products, as every later output is.
  """

  #: Σ e^{…} v over e^maximum.
  numerator: Array
  #: Σ e^{…} over e^maximum.
  denominator: Array
  #: The largest exponent so far.
  maximum: Array


def empty_wkv_state(
  shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> WKVState:
  """Return the state before a document's first token.

  Args:
    shape: the shape of each array, (B, D) for `wkv` and `wkv_step`.
    dtype: the dtype of the sums.
  """
  # Two arrays: one that is used twice could not be donated.
  numerator, denominator = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
  return WKVState(numerator, denominator, jnp.full(shape, EMPTY, dtype))


def add_token(
  state: WKVState, w: Array, p: Array, x: Array, y: Array
) -> WKVState:
  """Return the state decayed by e^w, plus the terms x e^p and y e^p.

  The two factors are computed from the maximum after it was rounded. They undo
  its rounding, so that such errors do not add up over the tokens.
  """
  maximum = jnp.maximum(state.maximum + w, p)
  keep = jnp.exp((state.maximum - maximum) + w)
  new = jnp.exp(p - maximum)
  return WKVState(
    keep * state.numerator + new * x,
    keep * state.denominator + new * y,
    maximum,
  )


class Output(NamedTuple):
  """A token's output y = (past · numerator + own · v) / total."""

  y: Array
  exponent: Array  # p, over whose e^p the three below stand
  past: Array  # factor of the state's sums
  own: Array  # factor of the token itself, e^{u + k}
  total: Array  # the denominator


def output(state: WKVState, k: Array, v: Array, u: Array) -> Output:
  """Return a token's output from the state before it."""
  p = jnp.maximum(state.maximum, k + u)
  past, own = jnp.exp(state.maximum - p), jnp.exp((k - p) + u)
  total = past * state.denominator + own
  y = (past * state.numerator + own * v) / total
  return Output(y, p, past, own, total)


def state_gradient(state: WKVState, cotangents: WKVState) -> WKVState:
  """Return the gradient of a state's three arrays.

  Args:
    state: the state before a row.
    cotangents: λ and μ before the row, over a common exponential.
  """
  scale = jnp.exp(state.maximum + cotangents.maximum)
  numerator = scale * cotangents.numerator
  denominator = -scale * cotangents.denominator
  maximum = state.numerator * numerator + state.denominator * denominator
  return WKVState(numerator, denominator, maximum)
