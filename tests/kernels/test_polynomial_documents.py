"""Sequences cut at any point, token by token, and documents kept apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from polynomial_cases import make_inputs, value_and_gradients
import polynomial_oracle as po
import pytest

import pallas_kernels as pk

NUMBERS = {pk.REBASED: po.REBASED, pk.BASED: po.BASED}


def attention(coefficients, implementation="xla"):
  def f(q, k, v, ids, state):
    return pk.polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      segment_ids=ids,
      initial_state=None if state is None else pk.State(*state),
      return_state=True,
      implementation=implementation,
    )

  return f


def close(a, b, tolerance=1e-5):
  """‖a − b‖ ≤ tolerance ‖b‖, leaf by leaf: sums in float32 of another order."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert x.shape == y.shape
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@functools.partial(jax.jit, static_argnums=(1, 2))
def in_two(x, cut, coefficients):
  """The Answer of a call over [0, cut) and one that goes on from its state."""

  def f(q, k, v, ids, state):
    part = attention(coefficients)
    left, right = slice(None, cut), slice(cut, None)
    cuts = [(q[:, s], k[:, s], v[:, s]) for s in (left, right)]
    if ids is None:
      o1, state = part(*cuts[0], None, state)
      o2, state = part(*cuts[1], None, state)
      return jnp.concatenate([o1, o2], axis=1), state
    o1, state = part(*cuts[0], ids[:, left], state)
    # A state belongs to token 0's document: zeros where that one starts there.
    goes_on_B = ids[:, cut] == ids[:, cut - 1]
    state = jax.tree.map(
      lambda s: jnp.where(goes_on_B[:, None, None, None], s, 0), state
    )
    o2, state = part(*cuts[1], ids[:, right], state)
    return jnp.concatenate([o1, o2], axis=1), state

  return value_and_gradients(f, x)


@pytest.mark.parametrize(
  ("cut", "T", "coefficients", "borders"),
  [
    (1, 40, pk.BASED, "none"),
    (70, 140, pk.BASED, "random"),
    (64, 129, pk.REBASED, "own"),
  ],
)
def test_two_parts_equal_the_whole(cut, T, coefficients, borders):
  """Values, and gradients through the state that joins the parts."""
  x = make_inputs(
    2,
    T,
    1,
    4,
    3,
    coefficients=NUMBERS[coefficients],
    state=True,
    borders=borders,
    final=True,
  )
  got, want = in_two(x, cut, coefficients), po.oracle(x, NUMBERS[coefficients])
  # 5e-5 for gradients: differences, as in test_polynomial_values.py.
  close((got.o, got.after, got.dv), (want.o, want.after, want.dv))
  for name in ("dq", "dk"):
    error = np.linalg.norm(getattr(got, name) - getattr(want, name))
    assert error <= 5e-5 * want.raw[name]
  close(got.dstate, want.dstate, 5e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("coefficients", [pk.REBASED, pk.BASED])
def test_steps_after_a_prefill_equal_the_whole(coefficients, dtype):
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
  close((o, state), (want.o, want.after), 1e-5 if dtype == "float32" else 1e-2)


# Documents. One row, of documents between these borders: T=48 is one chunk,
# T=150 three of 50.

BORDERS = {48: (0, 11, 30, 48), 150: (0, 20, 50, 77, 100, 138, 150)}
SPOILS = ("other", "inf", "nan")
AT = 4  # the document's token that is spoilt


@functools.partial(jax.jit, static_argnums=(1, 2))
def packed(x, coefficients, implementation):
  return value_and_gradients(attention(coefficients, implementation), x)


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
  ids_T = np.searchsorted(BORDERS[T][1:], np.arange(T), side="right") % 2
  return x._replace(ids_BT=ids_T[None].astype(np.int32))


def spoil(x, field: str, token: int, how: str):
  """One entry of head 0, or with "other" the whole token."""
  y = getattr(x, field).copy()
  if how == "other":
    y[:, token] = -3 * y[:, token] + 1
  else:
    y[0, token, 0, 1] = {"inf": np.inf, "nan": np.nan}[how]
  return x._replace(**{field: y})


def same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  assert a.tobytes() == b.tobytes()


def check_others_same(got, clean, rows, names):
  """Every document but the one of these rows; `rows` is a slice of time."""
  for name in names:
    a, b = np.asarray(getattr(got, name)), np.asarray(getattr(clean, name))
    for others in (slice(None, rows.start), slice(rows.stop, None)):
      same_bits(a[:, others], b[:, others])


def not_finite(x_BTHX, rows) -> bool:
  """Whether each of these rows of head 0 has an Inf or NaN."""
  x = np.asarray(x_BTHX, np.float32)[0, rows, 0]
  return bool((~np.isfinite(x)).any(axis=-1).all())


def check_spoilt(got, field: str, rows: slice, token: int):
  """What depends on the spoilt entry is not finite: nothing is zeroed."""
  later, earlier = slice(token, rows.stop), slice(rows.start, token + 1)
  only = slice(token, token + 1)
  depends = {
    "q_BTHF": [("o", only), ("dq", only), ("dk", earlier), ("dv", earlier)],
    "k_BTHF": [("o", later), ("dq", later), ("dk", only)],
    "v_BTHP": [("o", later), ("dq", later), ("dk", earlier)],
    "do_BTHP": [("dq", only), ("dk", earlier), ("dv", earlier)],
  }[field]
  for name, where in depends:
    assert not_finite(getattr(got, name), where), (name, where)


@pytest.mark.parametrize(
  ("T", "coefficients", "dtype"),
  [
    (48, pk.BASED, "float32"),
    (150, pk.REBASED, "float32"),
    (150, pk.BASED, "bfloat16"),
  ],
)
def test_documents_are_isolated(T, coefficients, dtype):
  """Every document spoilt in turn; the others' bits do not change."""
  x = packed_inputs(T, coefficients, dtype)
  clean = packed(x, coefficients, "xla")
  assert np.isfinite(np.asarray(clean.dk, np.float32)).all()
  edges = BORDERS[T]
  for start, stop in zip(edges, edges[1:], strict=False):
    rows, token = slice(start, stop), start + AT
    for field in ("q_BTHF", "k_BTHF", "v_BTHP", "do_BTHP"):
      for how in SPOILS:
        got = packed(spoil(x, field, token, how), coefficients, "xla")
        check_others_same(got, clean, rows, ("o", "dq", "dk", "dv"))
        if stop != T:  # the final state is the last document's
          jax.tree.map(same_bits, got.after, clean.after)
        if start != 0:  # the initial state is the first one's
          jax.tree.map(same_bits, got.dstate, clean.dstate)
        if how != "other":
          check_spoilt(got, field, rows, token)


@pytest.mark.parametrize("T", [48, 150])
def test_documents_are_isolated_from_the_states(T):
  """A spoilt initial state, or cotangent of the final one."""
  x = packed_inputs(T, pk.REBASED)
  clean = packed(x, pk.REBASED, "xla")
  names, edges = ("o", "dq", "dk", "dv"), BORDERS[T]
  # Not Inf in kk alone: no token leaves it, and a sum over it is a true 0.
  for i, how in ((0, np.inf), (0, np.nan), (1, np.nan)):
    state = [y.copy() for y in x.state]
    state[i][0, 0, 0] = how
    got = packed(x._replace(state=tuple(state)), pk.REBASED, "xla")
    rows = slice(0, edges[1])
    check_others_same(got, clean, rows, names)
    jax.tree.map(same_bits, got.after, clean.after)
    assert not_finite(got.o, rows) and not_finite(got.dq, rows)
    dafter = [y.copy() for y in x.dafter]
    dafter[i][0, 0, 0] = how
    got = packed(x._replace(dafter=tuple(dafter)), pk.REBASED, "xla")
    rows = slice(edges[-2], T)
    check_others_same(got, clean, rows, names)
    jax.tree.map(same_bits, got.dstate, clean.dstate)
    assert not_finite(got.dk, rows)


def test_documents_are_isolated_in_the_reference():
  """Its outputs; its gradient is jax's own, which an Inf may leave."""
  T = 48
  x = packed_inputs(T, pk.BASED)
  f = jax.jit(attention(pk.BASED, "reference"))
  clean, _ = f(*x[:5])
  edges = BORDERS[T]
  for start, stop in zip(edges, edges[1:], strict=False):
    for field in ("q_BTHF", "k_BTHF", "v_BTHP"):
      for how in SPOILS:
        o, _ = f(*spoil(x, field, start + AT, how)[:5])
        same_bits(o[:, :start], clean[:, :start])
        same_bits(o[:, stop:], clean[:, stop:])
        if how != "other":
          last = start + AT + 1 if field == "q_BTHF" else stop
          assert not_finite(o, slice(start + AT, last))


def test_an_id_that_comes_back_is_a_new_document():
  ids_BT = jnp.array([[3, 3, 5, 3, 3, 5], [1, 1, 1, 1, 1, 1]])
  want = [[0, 0, 1, 2, 2, 3], [0] * 6]
  np.testing.assert_array_equal(pk.document_runs(ids_BT), want)
