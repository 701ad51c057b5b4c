"""A past of few tokens, whose scores may all be near 0.

Σ sim v and Σ sim then are both small, and o is right only if they round alike:
o is a mean of values, and no larger than they are.
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
  make = lambda width: rng.normal(size=(B, T, 1, width)).astype(dtype)
  return [make(F), make(F), make(P)]


def worst(a: jax.Array, b: jax.Array) -> float:
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
def piece_and_step(past, last):
  _, state = pk.polynomial_attention(*past, return_state=True)
  piece = pk.polynomial_attention(*last, initial_state=state)
  step, _ = pk.polynomial_attention_step(state, *(x[:, 0] for x in last))
  return piece, step


# bfloat16 rounds o to 2⁻⁹ of a value of at most 4, twice. float32 states know
# (q·k)² to 1e-7 of |q|²|k|², which one in a thousand rows has in its quotient.
@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 0.05), ("float32", 0.05)]
)
@pytest.mark.parametrize("start", [60, 62, 63])
def test_a_document_that_starts_before_a_chunk_border(start, dtype, limit):
  ids_BT = np.tile(np.int32(np.arange(128) >= start), (B, 1))
  call = lambda name: whole_row(*arrays(128, dtype), ids_BT, name)
  assert worst(call("xla"), call("reference")) <= limit


@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 0.05), ("float32", 0.05)]
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_one_more_token(n, dtype, limit):
  q_BTHF, k_BTHF, v_BTHP = arrays(n + 1, dtype)
  past = [x[:, :n] for x in (q_BTHF, k_BTHF, v_BTHP)]
  last = [x[:, n:] for x in (q_BTHF, k_BTHF, v_BTHP)]
  whole = np.asarray(whole_row(q_BTHF, k_BTHF, v_BTHP, None, None))[:, n:]
  piece, step = jax.device_get(piece_and_step(past, last))
  assert worst(piece, whole) <= limit
  assert worst(step[:, None], whole) <= limit


def test_positions_outside_the_row_have_nan():
  q_BTHF, k_BTHF, v_BTHP = (x[:2] for x in arrays(6, "float32"))
  positions_BM = jnp.asarray([[0, -1, 5], [6, 2, 7]])
  o_BMHP = pk.polynomial_attention_at(
    q_BTHF[:, :3], k_BTHF, v_BTHP, positions_BM
  )
  lost_BM = np.isnan(o_BMHP).all(axis=(2, 3))
  np.testing.assert_array_equal(lost_BM, [[0, 1, 0], [1, 0, 1]])
  assert np.isnan(o_BMHP).sum() == 3 * P
