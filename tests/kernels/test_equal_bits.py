"""Test which other calls give a row bit-identically on a CPU, as docs say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

B, T, H, F, P = 3, 128, 2, 4, 3
HALF = 64  # a chunk of the XLA form

# Roundings of float32 are 6e-8, and sums of 128 tokens round a few times.
_ROUNDING = 1e-5


def _with_gradients(call, q, k, v):
  """Return o, dq, dk and dv, with the same cotangent for all rows."""
  o, pull = jax.vjp(call, q, k, v)
  do_T = jnp.cos(jnp.arange(q.shape[1], dtype=jnp.float32)).astype(o.dtype)
  return o, *pull(jnp.broadcast_to(do_T[None, :, None, None], o.shape))


@functools.partial(jax.jit, static_argnames="documents")
def _whole(q, k, v, documents: bool = False):
  ids = jnp.arange(q.shape[1], dtype=jnp.int32)[None] // HALF
  ids = jnp.broadcast_to(ids, q.shape[:2]) if documents else None
  call = lambda *x: pk.polynomial_attention(*x, segment_ids=ids)
  return _with_gradients(call, q, k, v)


@functools.partial(jax.jit, static_argnames="cut")
def _cut(q, k, v, cut: int):
  def call(*x):
    left, right = ([a[:, s] for a in x] for s in (slice(cut), slice(cut, None)))
    o1, state = pk.polynomial_attention(*left, return_state=True)
    o2 = pk.polynomial_attention(*right, initial_state=state)
    return jnp.concatenate([o1, o2], axis=1)

  return _with_gradients(call, q, k, v)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def arrays(request) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  make = lambda n: jnp.asarray(rng.normal(size=(B, T, H, n)), request.param)
  return [make(n) for n in (F, F, P)]


def _assert_same(found, wanted) -> None:
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_row_does_not_depend_on_its_place_or_on_other_rows(arrays) -> None:
  whole = _whole(*arrays)
  places = jnp.array([2, 0, 1])
  _assert_same(_whole(*(x[places] for x in arrays)), [x[places] for x in whole])
  others = [x.at[1:].multiply(3) for x in arrays]
  _assert_same([x[0] for x in _whole(*others)], [x[0] for x in whole])


def test_a_cut_between_chunks_changes_no_bit(arrays) -> None:
  _assert_same(_cut(*arrays, HALF), _whole(*arrays))


def test_what_is_not_promised_differs_by_rounding(arrays) -> None:
  limit = _ROUNDING if arrays[0].dtype == jnp.float32 else 2.0**-7
  near = functools.partial(np.testing.assert_allclose, rtol=0)
  whole = [np.float32(x) for x in _whole(*arrays)]
  packed = _whole(*arrays, documents=True)
  for found, wanted in (
    (_cut(*arrays, 50), whole),
    (_whole(*(x[:1] for x in arrays)), [x[:1] for x in whole]),
    (_whole(*(x[:, :HALF] for x in arrays)), [x[:, :HALF] for x in packed]),
  ):
    for a, b in zip(found, wanted, strict=True):
      b = np.float32(b)
      near(np.float32(a), b, atol=limit * np.abs(b).max())
