"""Tokens with a past of few tokens, whose similarities may all be near 0.

Σ sim v and Σ sim are both small then. o is a mean of values, and no larger than
they are, only if the two sums round alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

B, F, P = 500, 16, 4


def arrays(T: int, dtype) -> list[np.ndarray]:
  rng = np.random.default_rng(T)
  return [
    rng.normal(size=(B, T, 1, width)).astype(dtype) for width in (F, F, P)
  ]


def largest_difference(a: jax.Array, b: jax.Array) -> float:
  a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
  return float(np.abs(a - b).max())


@functools.partial(jax.jit, static_argnums=4)
def whole_row(q_BTHF, k_BTHF, v_BTHP, ids_BT, implementation):
  return pk.polynomial_attention(
    q_BTHF,
    k_BTHF,
    v_BTHP,
    segment_ids=ids_BT,
    implementation=implementation,
  )


@jax.jit
def continue_both_ways(past, last):
  """Continue a past by a second call, and by a step."""
  _, state = pk.polynomial_attention(*past, return_state=True)
  piece = pk.polynomial_attention(*last, initial_state=state)
  step, _ = pk.polynomial_attention_step(state, *(x[:, 0] for x in last))
  return piece, step


# bfloat16 rounds o, at most 4, to 2⁻⁹ of its size, twice. float32 states hold
# (q·k)² with an error of 1e-7 |q|²|k|², which shows in one row of a thousand.
@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 0.05), ("float32", 0.05)]
)
@pytest.mark.parametrize("start", [60, 62, 63])
def test_document_that_starts_just_before_a_chunk_ends(start, dtype, limit):
  ids_BT = np.tile(np.int32(np.arange(128) >= start), (B, 1))
  outputs = [
    whole_row(*arrays(128, dtype), ids_BT, name)
    for name in ("xla", "reference")
  ]
  assert largest_difference(*outputs) <= limit


@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 0.05), ("float32", 0.05)]
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_one_token_after_a_short_past(n, dtype, limit):
  q_BTHF, k_BTHF, v_BTHP = arrays(n + 1, dtype)
  past = [x[:, :n] for x in (q_BTHF, k_BTHF, v_BTHP)]
  last = [x[:, n:] for x in (q_BTHF, k_BTHF, v_BTHP)]
  whole = np.asarray(whole_row(q_BTHF, k_BTHF, v_BTHP, None, None))[:, n:]
  piece, step = jax.device_get(continue_both_ways(past, last))
  assert largest_difference(piece, whole) <= limit
  assert largest_difference(step[:, None], whole) <= limit


def test_positions_outside_the_row_give_nan():
  q_BTHF, k_BTHF, v_BTHP = (x[:2] for x in arrays(6, "float32"))
  positions_BM = jnp.asarray([[0, -1, 5], [6, 2, 7]])
  o_BMHP = pk.polynomial_attention_at(
    q_BTHF[:, :3], k_BTHF, v_BTHP, positions_BM
  )
  nan_BM = np.isnan(o_BMHP).all(axis=(2, 3))
  np.testing.assert_array_equal(nan_BM, [[0, 1, 0], [1, 0, 1]])
  assert np.isnan(o_BMHP).sum() == 3 * P
