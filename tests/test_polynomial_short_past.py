"""A past of few tokens, whose scores may all be near 0.

Σ sim v and Σ sim then are both small, and o is right only if they round alike:
o is a mean of values, and no larger than they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

B, F, P = 500, 16, 4


def arrays(T: int, dtype) -> list[jax.Array]:
  rng = np.random.default_rng(T)
  make = lambda width: jnp.asarray(rng.normal(size=(B, T, 1, width)), dtype)
  return [make(F), make(F), make(P)]


def worst(a: jax.Array, b: jax.Array) -> float:
  return float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())


# bfloat16 rounds o to 2⁻⁹ of a value of at most 4, twice. float32 states know
# (q·k)² to 1e-7 of |q|²|k|², which one in a thousand rows has in its quotient.
@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 0.05), ("float32", 0.05)]
)
@pytest.mark.parametrize("start", [60, 62, 63])
def test_a_document_that_starts_before_a_chunk_border(start, dtype, limit):
  q_BTHF, k_BTHF, v_BTHP = arrays(128, dtype)
  ids_BT = jnp.broadcast_to((jnp.arange(128) >= start).astype(int), (B, 128))
  call = lambda name: pk.polynomial_attention(
    q_BTHF, k_BTHF, v_BTHP, segment_ids=ids_BT, implementation=name
  )
  assert worst(call("xla"), call("reference")) <= limit


@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 0.05), ("float32", 0.05)]
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_one_more_token(n, dtype, limit):
  q_BTHF, k_BTHF, v_BTHP = arrays(n + 1, dtype)
  past = [x[:, :n] for x in (q_BTHF, k_BTHF, v_BTHP)]
  last = [x[:, n:] for x in (q_BTHF, k_BTHF, v_BTHP)]
  whole = pk.polynomial_attention(q_BTHF, k_BTHF, v_BTHP)[:, n:]
  _, state = pk.polynomial_attention(*past, return_state=True)
  piece = pk.polynomial_attention(*last, initial_state=state)
  step, _ = pk.polynomial_attention_step(state, *(x[:, 0] for x in last))
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
