"""Rows cut in two, rows taken token by token, and rows of several documents."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_cases import (
  assert_close,
  attention,
  make_inputs,
  value_and_gradients,
)
from polynomial_documents import (
  assert_bit_identical,
  assert_others_identical,
  assert_spoilt,
  not_finite,
  spoil,
)
import polynomial_oracle as po
import pytest

import pallas_kernels as pk

NUMBERS = {pk.REBASED: po.REBASED, pk.BASED: po.BASED}


@functools.partial(jax.jit, static_argnums=(1, 2))
def answer_in_two_calls(x, cut, coefficients):
  """Call [0, cut), then [cut, T) from the state that the first call returns."""

  def both(q, k, v, ids, state):
    call = attention(coefficients)
    left, right = slice(None, cut), slice(cut, None)
    cuts = [(q[:, s], k[:, s], v[:, s]) for s in (left, right)]
    if ids is None:
      o1, state = call(*cuts[0], None, state)
      o2, state = call(*cuts[1], None, state)
      return jnp.concatenate([o1, o2], axis=1), state
    o1, state = call(*cuts[0], ids[:, left], state)
    # The state belongs to token 0's document: zeros where a document starts.
    joined_B = ids[:, cut] == ids[:, cut - 1]
    state = jax.tree.map(
      lambda s: jnp.where(joined_B[:, None, None, None], s, 0), state
    )
    o2, state = call(*cuts[1], ids[:, right], state)
    return jnp.concatenate([o1, o2], axis=1), state

  return value_and_gradients(both, x)


@pytest.mark.parametrize(
  ("cut", "T", "coefficients", "boundaries"),
  [
    (1, 40, pk.BASED, "none"),
    (70, 140, pk.BASED, "random"),
    (64, 129, pk.REBASED, "own"),
  ],
)
def test_two_calls_equal_one(cut, T, coefficients, boundaries):
  """Values, and gradients through the state between the calls."""
  x = make_inputs(
    2,
    T,
    1,
    4,
    3,
    coefficients=NUMBERS[coefficients],
    state=True,
    boundaries=boundaries,
    final=True,
  )
  got = answer_in_two_calls(x, cut, coefficients)
  want = po.oracle(x, NUMBERS[coefficients])
  # 5e-5 for gradients: differences, as in test_polynomial_values.py.
  assert_close((got.o, got.after, got.dv), (want.o, want.after, want.dv))
  for name in ("dq", "dk"):
    error = np.linalg.norm(getattr(got, name) - getattr(want, name))
    assert error <= 5e-5 * want.raw[name]
  assert_close(got.dstate, want.dstate, 5e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("coefficients", [pk.REBASED, pk.BASED])
def test_steps_after_a_prefill_equal_one_call(coefficients, dtype):
  x = make_inputs(
    2, 21, 2, 5, 3, coefficients=NUMBERS[coefficients], dtype=dtype
  )
  q, k, v = x[:3]
  o1, state = attention(coefficients)(q[:, :8], k[:, :8], v[:, :8], None, None)

  def step(state, token):
    o, state = pk.polynomial_attention_step(
      state, *token, coefficients=coefficients
    )
    return state, o

  rest = tuple(jnp.moveaxis(y[:, 8:], 1, 0) for y in (q, k, v))
  state, o2 = jax.lax.scan(step, state, rest)
  o = np.concatenate([o1, np.moveaxis(np.asarray(o2), 0, 1)], axis=1)
  assert o.dtype == q.dtype
  want = po.oracle(x, NUMBERS[coefficients])
  # bfloat16: the prefill rounds at 2⁻⁸, as in test_polynomial_values.py.
  assert_close(
    (o, state), (want.o, want.after), 1e-5 if dtype == "float32" else 1e-2
  )


# Packed rows: for each T, the boundaries of the documents. T=48 is one chunk,
# and T=150 is three of 50.

BOUNDARIES = {48: (0, 11, 30, 48), 150: (0, 20, 50, 77, 100, 138, 150)}
SPOILS = ("other", "inf", "nan")
AT = 4  # which token of a document is spoilt


@functools.partial(jax.jit, static_argnums=(1, 2))
def packed(x, coefficients, implementation):
  call = attention(coefficients, implementation=implementation)
  return value_and_gradients(call, x)


def packed_inputs(T, coefficients, dtype="float32"):
  x = make_inputs(
    1,
    T,
    2,
    4,
    3,
    coefficients=NUMBERS[coefficients],
    state=True,
    final=True,
    dtype=dtype,
  )
  ids_T = np.searchsorted(BOUNDARIES[T][1:], np.arange(T), side="right") % 2
  return x._replace(ids_BT=ids_T[None].astype(np.int32))


@pytest.mark.quick
@pytest.mark.parametrize(
  ("T", "coefficients", "dtype"),
  [
    (48, pk.BASED, "float32"),
    (150, pk.REBASED, "float32"),
    (150, pk.BASED, "bfloat16"),
  ],
)
def test_documents_are_isolated(T, coefficients, dtype):
  """Each document is spoilt in turn; the others stay bit-identical."""
  x = packed_inputs(T, coefficients, dtype)
  clean = packed(x, coefficients, "xla")
  assert np.isfinite(np.asarray(clean.dk, np.float32)).all()
  boundaries = BOUNDARIES[T]
  for start, stop in itertools.pairwise(boundaries):
    document, token = slice(start, stop), start + AT
    for field in ("q_BTHF", "k_BTHF", "v_BTHP", "do_BTHP"):
      for how in SPOILS:
        got = packed(spoil(x, field, token, how), coefficients, "xla")
        assert_others_identical(got, clean, document, ("o", "dq", "dk", "dv"))
        if stop != T:  # the final state is the last document's
          assert_bit_identical(got.after, clean.after)
        if start != 0:  # the initial state is the first one's
          assert_bit_identical(got.dstate, clean.dstate)
        if how != "other":
          assert_spoilt(got, field, document, token)


@pytest.mark.parametrize("T", [48, 150])
def test_documents_are_isolated_from_the_states(T):
  """The initial state is spoilt, or the cotangent of the final state."""
  x = packed_inputs(T, pk.REBASED)
  clean = packed(x, pk.REBASED, "xla")
  names, boundaries = ("o", "dq", "dk", "dv"), BOUNDARIES[T]
  # Not Inf in kk alone: its quotients are then a true 0, which is finite.
  for i, how in ((0, np.inf), (0, np.nan), (1, np.nan)):
    state = [y.copy() for y in x.state]
    state[i][0, 0, 0] = how
    got = packed(x._replace(state=tuple(state)), pk.REBASED, "xla")
    document = slice(0, boundaries[1])
    assert_others_identical(got, clean, document, names)
    assert_bit_identical(got.after, clean.after)
    assert not_finite(got.o, document) and not_finite(got.dq, document)
    dafter = [y.copy() for y in x.dafter]
    dafter[i][0, 0, 0] = how
    got = packed(x._replace(dafter=tuple(dafter)), pk.REBASED, "xla")
    document = slice(boundaries[-2], T)
    assert_others_identical(got, clean, document, names)
    assert_bit_identical(got.dstate, clean.dstate)
    assert not_finite(got.dk, document)


def test_documents_are_isolated_in_the_reference():
  """Outputs only: an Inf may spread in gradients, which are jax's own."""
  T = 48
  x = packed_inputs(T, pk.BASED)
  f = jax.jit(attention(pk.BASED, implementation="reference"))
  clean, _ = f(*x[:5])
  boundaries = BOUNDARIES[T]
  for start, stop in itertools.pairwise(boundaries):
    for field in ("q_BTHF", "k_BTHF", "v_BTHP"):
      for how in SPOILS:
        o, _ = f(*spoil(x, field, start + AT, how)[:5])
        assert_bit_identical(o[:, :start], clean[:, :start])
        assert_bit_identical(o[:, stop:], clean[:, stop:])
        if how != "other":
          last = start + AT + 1 if field == "q_BTHF" else stop
          assert not_finite(o, slice(start + AT, last))


def test_id_that_comes_back_starts_a_new_document():
  ids_BT = jnp.array([[3, 3, 5, 3, 3, 5], [1, 1, 1, 1, 1, 1]])
  want = [[0, 0, 1, 2, 2, 3], [0] * 6]
  np.testing.assert_array_equal(pk.document_runs(ids_BT), want)
