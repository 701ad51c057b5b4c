"""The public functions: transformations of jax, memory, and small calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_cases import assert_close, make_inputs
import polynomial_oracle as po
import pytest

import pallas_kernels as pk

SHAPE = dict(B=2, T=70, H=2, F=4, P=3)  # two chunks


# Transformations of jax.


@functools.cache
def example():
  x = make_inputs(**SHAPE, boundaries="random")
  return x, po.oracle(x, po.REBASED)


def loss(q, k, v, ids, do):
  o = pk.polynomial_attention(q, k, v, segment_ids=ids)
  return jnp.vdot(o, do, precision="highest")


def gradients(loss):
  x, _ = example()
  return jax.grad(loss, argnums=(0, 1, 2))(*x[:4], x.do_BTHP)


def test_gradients_under_jit_and_checkpoint():
  _, want = example()
  remat = jax.jit(jax.checkpoint(loss))
  # 5e-5: differences, as in test_polynomial_values.py.
  assert_close(gradients(remat), (want.dq, want.dk, want.dv), 5e-5)


def test_vmap_equals_one_call_for_each():
  """Over q's last axis and v's first; k is not mapped."""
  x, _ = example()
  q = np.stack([x.q_BTHF, 2 * x.q_BTHF + 1], axis=-1)
  v = np.stack([x.v_BTHP, -x.v_BTHP[::-1]])
  mapped = jax.vmap(
    jax.value_and_grad(loss, argnums=(0, 1, 2)),
    in_axes=(-1, None, 0, None, None),
  )
  values, (dq, dk, dv) = jax.jit(mapped)(q, x.k_BTHF, v, x.ids_BT, x.do_BTHP)
  for i in range(2):
    each = x._replace(q_BTHF=q[..., i], v_BTHP=v[i])
    want = po.oracle(each, po.REBASED)
    np.testing.assert_allclose(values[i], np.vdot(want.o, x.do_BTHP), rtol=1e-4)
    assert_close((dq[i], dk[i], dv[i]), (want.dq, want.dk, want.dv), 5e-5)


def test_scan_over_layers_equals_a_loop():
  """Three layers in a scan give the loss and the gradients of three calls."""
  x, _ = example()
  scales_L = jnp.array([0.5, 1.0, 2.0])

  def layer(v, scale):
    o = pk.polynomial_attention(x.q_BTHF * scale, x.k_BTHF, v)
    return v + o, None

  def scanned(v, scales_L):
    return jnp.sum(jax.lax.scan(layer, v, scales_L)[0] ** 2)

  def unrolled(v, scales_L):
    for scale in scales_L:
      v, _ = layer(v, scale)
    return jnp.sum(v**2)

  both = [
    jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x.v_BTHP, scales_L)
    for f in (scanned, unrolled)
  ]
  assert_close(*both)


# Memory.


def compiled_temp_bytes(T: int, F: int, P: int) -> int:
  """Return the bytes of XLA's temporaries in forward and backward, one head."""
  shapes = [jax.ShapeDtypeStruct((1, T, 1, n), jnp.float32) for n in (F, F, P)]

  def both(q, k, v, do):
    o, vjp = jax.vjp(pk.polynomial_attention, q, k, v)
    return o, vjp(do)

  compiled = jax.jit(both).lower(*shapes, shapes[2]).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_time():
  """Twice the tokens take at most 2.2 times the memory.

  2.2 leaves room for the rounding of buffers. No state is kept for each chunk:
  a chunk of 64 tokens adds about its q, k, v, do, r, dz and gradients, which is
  a third of a state at these sizes.
  """
  F, P = 32, 64
  temps = [compiled_temp_bytes(T, F, P) for T in (1024, 2048, 4096)]
  assert temps[1] <= 2.2 * temps[0] and temps[2] <= 2.2 * temps[1], temps
  state = 4 * F * (F // 2 + 1) * P
  chunk = (temps[2] - temps[1]) / (2048 / 64)
  assert chunk < 0.7 * state, (chunk, state)


def test_forward_keeps_only_the_inputs_for_the_backward():
  q, k, v = (
    jax.ShapeDtypeStruct((1, 640, 2, n), jnp.float32) for n in (8, 8, 4)
  )
  pull = jax.eval_shape(
    lambda *x: jax.vjp(pk.polynomial_attention, *x)[1], q, k, v
  )
  kept = sum(x.size for x in jax.tree.leaves(pull))
  assert kept == q.size + k.size + v.size


# Small calls.


@pytest.mark.parametrize("boundaries", ["none", "random"])
def test_chosen_positions_equal_rows_of_the_whole(boundaries):
  x = make_inputs(**SHAPE, coefficients=po.BASED, boundaries=boundaries)
  want_BTHP = po.oracle(x, po.BASED).o
  positions_BM = jnp.array([[69, 0, 33, 33], [1, 68, 2, 40]])
  rows = np.asarray(positions_BM)[:, :, None, None]
  o_BMHP = jax.jit(
    functools.partial(pk.polynomial_attention_at, coefficients=pk.BASED)
  )(
    np.take_along_axis(x.q_BTHF, rows, axis=1),
    x.k_BTHF,
    x.v_BTHP,
    positions_BM,
    segment_ids=x.ids_BT,
  )
  assert_close(o_BMHP, np.take_along_axis(want_BTHP, rows, axis=1))


def test_positions_outside_the_row_have_nan():
  x = make_inputs(**SHAPE)
  positions_BM = jnp.array([[-1, 0, 69, 70], [-70, 3, 2**30, -(2**31)]])
  o_BMHP = pk.polynomial_attention_at(
    x.q_BTHF[:, :4], x.k_BTHF, x.v_BTHP, positions_BM
  )
  inside_BM = (positions_BM >= 0) & (positions_BM < 70)
  assert (jnp.isnan(o_BMHP).all(axis=(2, 3)) == ~inside_BM).all()
  assert (jnp.isfinite(o_BMHP).all(axis=(2, 3)) == inside_BM).all()


@pytest.mark.parametrize("name", ["REBASED", "BASED"])
def test_weights_give_the_output(name):
  x = make_inputs(**SHAPE)
  A_BHTT = pk.polynomial_attention_weights(
    x.q_BTHF, x.k_BTHF, coefficients=getattr(pk, name)
  )
  A_BHTT = np.asarray(A_BHTT, np.float64)
  assert (np.triu(A_BHTT, 1) == 0).all()
  assert (A_BHTT >= 0).all()  # (1 + s)²/2 + ½ is not negative either
  # 1e-6: the rounding of 70 float32 terms. Only eps makes a sum less than 1.
  sums_BHT = A_BHTT.sum(-1)
  assert (sums_BHT <= 1 + 1e-6).all() and np.median(sums_BHT) > 1 - 1e-4
  o_BTHP = np.einsum("bhts,bshp->bthp", A_BHTT, x.v_BTHP)
  assert_close(o_BTHP, po.oracle(x, getattr(po, name)).o)


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_first_token_gives_its_value_however_small_its_similarity(eps):
  """It is o = sim v / (sim + eps): there is no other term to round against."""
  q_BHF, k_BHF = (
    jax.random.normal(jax.random.key(i), (1, 8192, 16)) for i in (0, 1)
  )
  v_BHP = jnp.ones((1, 8192, 1))
  state = pk.zero_state(1, 8192, 16, 1)
  o_BHP, _ = pk.polynomial_attention_step(state, q_BHF, k_BHF, v_BHP, eps=eps)
  sim_BH = (np.einsum("bhf,bhf->bh", q_BHF, k_BHF, dtype=np.float64) / 4) ** 2
  expected = sim_BH / (sim_BH + eps)
  # q·k is a float32 sum, with an error of 1e-6 |q| |k|, which counts beside
  # eps.
  near = np.abs(sim_BH) > 1e-8
  assert near.mean() > 0.99
  np.testing.assert_allclose(o_BHP[..., 0][near], expected[near], atol=0.05)
  whole = pk.polynomial_attention(
    q_BHF[:, None], k_BHF[:, None], v_BHP[:, None], eps=eps
  )
  np.testing.assert_allclose(o_BHP, whole[:, 0], atol=1e-3)
