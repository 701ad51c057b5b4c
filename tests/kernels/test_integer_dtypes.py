"""Integer arguments of every dtype give what int32 gives.

Sizes lie outside the range of the narrow dtypes: T and V above 255.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import pallas_kernels as pk

DTYPES = ("int8", "uint8", "uint16", "uint32", "int64")
T, V = 300, 400


def draw(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def attention_at(positions, segment_ids):
  q, k, v = draw(1, 3, 1, 2), draw(1, T, 1, 2), draw(1, T, 1, 3)
  return pk.polynomial_attention_at(
    q, k, v, positions[:, :3], segment_ids=segment_ids
  )


def attention(positions, segment_ids):
  del positions
  x = draw(1, T, 1, 2)
  return pk.polynomial_attention(x, x, x, segment_ids=segment_ids)


def losses(parts, targets, segment_ids):
  del segment_ids
  x, embedding = draw(1, 6, 2), draw(V, 2)

  def loss(x, embedding):
    return pk.cross_entropy(x, embedding, targets, parts=parts)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, embedding)


def scans(positions, segment_ids):
  del positions
  x, A, B = draw(1, T, 2), -(draw(2, 3) ** 2), draw(1, T, 3)
  scanned = pk.selective_scan(x, x**2, A, B, B, segment_ids=segment_ids)
  return scanned, pk.wkv(x, x, A[:, 0], A[:, 1], segment_ids=segment_ids)


def convolutions(positions, segment_ids):
  del positions
  x, taps = draw(1, T, 2), draw(3, 2)
  return pk.causal_conv(x, taps, taps[0], segment_ids=segment_ids)


def documents(positions, segment_ids):
  del positions
  return pk.document_runs(segment_ids), pk.document_starts(segment_ids)


@pytest.mark.parametrize(
  "call",
  [
    attention_at,
    attention,
    functools.partial(losses, 1),
    functools.partial(losses, 2),
    scans,
    convolutions,
    documents,
  ],
  ids=["at", "attention", "loss", "parts", "scans", "convolution", "documents"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_gives_what_int32_gives(call, dtype):
  with jax.enable_x64(True):
    positions = np.array([[0, 100, 3, 127, 7, 99]], np.dtype(dtype))
    ids = (np.arange(T)[None] // 7 % 5).astype(dtype)
    call = jax.jit(call)
    found, wanted = (
      call(*(jnp.asarray(x, t) for x in (positions, ids)))
      for t in (dtype, "int32")
    )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
    assert not np.isnan(a).any()


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int64"])
def test_a_mesh_over_time_takes_every_dtype(dtype):
  mesh = jax.make_mesh((2,), ("t",), (jax.sharding.AxisType.Auto,))
  call = functools.partial(pk.polynomial_attention, axes=pk.ShardAxes(time="t"))
  with jax.enable_x64(True), jax.set_mesh(mesh):
    ids = jax.ShapeDtypeStruct((1, 4), dtype)
    x = jax.ShapeDtypeStruct((1, 4, 1, 2), "float32")
    o = jax.eval_shape(lambda ids, x: call(x, x, x, segment_ids=ids), ids, x)
  assert o == x


def test_ids_that_differ_in_their_high_bits_are_other_documents():
  with jax.enable_x64(True):
    ids = jnp.array([[1, 1, 1 + 2**32, 1, 2**63 - 1]], jnp.int64)
    runs = pk.document_runs(ids)
  np.testing.assert_array_equal(runs, [[0, 0, 1, 2, 3]])


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_numpy_integers_that_jax_would_cut_are_named(dtype):
  """Without 64 bits jax makes 2³² + 1 to 1, another document to the same."""
  ids = np.array([[1, 1, 1, 2**32 + 1]], dtype)
  x = draw(1, 4, 1, 2)
  calls = {
    "segment_ids_BT": lambda: pk.document_runs(ids),
    "segment_ids": lambda: pk.polynomial_attention(x, x, x, segment_ids=ids),
    "positions": lambda: pk.polynomial_attention_at(x, x, x, ids),
    "targets": lambda: pk.cross_entropy(x[:, :, 0], draw(V, 2), ids),
  }
  explicit = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
  for mesh in (contextlib.nullcontext(), jax.set_mesh(explicit)):
    with mesh:
      for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name} holds 4294967297: exp"):
          call()
  runs = pk.document_runs(ids % 2**32)
  np.testing.assert_array_equal(runs, [[0, 0, 0, 0]])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
  "dtype, target",
  [("int8", -1), ("int32", -100), ("int32", V), ("uint32", 2**32 - 1)],
)
def test_a_target_outside_the_vocabulary_has_no_finite_loss(
  dtype, target, parts
):
  """Unless its weight is 0, which leaves it out of the loss and gradients."""
  x, embedding = draw(1, 2, 3), draw(V, 3)
  targets = jnp.array([[5, target]], dtype)

  @jax.jit
  def loss(x, targets, weights):
    loss, tokens = pk.cross_entropy(x, embedding, targets, weights, parts=parts)
    return loss, tokens.nll_BM

  found = jax.value_and_grad(loss, has_aux=True)
  (total, nll_BM), _ = found(x, targets, jnp.ones((1, 2)))
  assert np.isnan(total) and np.isnan(nll_BM).tolist() == [[False, True]]
  left_out = jnp.array([[1.0, 0.0]])
  (total, nll_BM), dx = found(x, targets, left_out)
  (wanted, _), wanted_dx = found(x, jnp.array([[5, 0]]), left_out)
  assert total == wanted == nll_BM[0, 0]
  np.testing.assert_array_equal(dx, wanted_dx)
  assert (dx[0, 1] == 0).all()


@pytest.mark.parametrize("T", [0, 1])
def test_documents_of_short_rows(T):
  ids = jnp.full((2, T), 3, jnp.uint8)
  for found in (pk.document_runs(ids), pk.document_starts(ids)):
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.zeros((2, T)))
