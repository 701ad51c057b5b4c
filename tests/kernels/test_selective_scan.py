"""Mamba's scan against a float64 recurrence: values, gradients, documents."""

import functools

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import selective_scan
from pallas_kernels.selective_scan.xla import CHUNK, LONGEST

B, I, N = 2, 3, 4


def scan(x, delta, A, B_, C, h, **options):
  return selective_scan(x, delta, A, B_, C, initial_state=h, **options)


def arguments(length: int, low: float = 1e-3, high: float = 1.0) -> tuple:
  """(x, Δ, A, B, C, h) of a scan; Δ log-uniform in [low, high]."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: np.float32(rng.normal(size=shape))
  delta = rng.uniform(np.log(low), np.log(high), (B, length, I))
  return (
    normal(B, length, I),
    np.float32(np.exp(delta)),
    -np.tile(np.arange(1, N + 1, dtype=np.float32), (I, 1)),
    normal(B, length, N),
    normal(B, length, N),
    normal(B, I, N),
  )


def by_hand(x, delta, A, B_, C, h, ids=None):
  """Compute (y, h) in float64, token by token."""
  ys = np.zeros(x.shape)
  x, delta, A, B_, C, h = (np.float64(a) for a in (x, delta, A, B_, C, h))
  last = np.zeros(h.shape)
  for row in range(len(x)):
    h_IN = h[row]
    for t in range(x.shape[1]):
      if ids is not None and t > 0 and ids[row, t] != ids[row, t - 1]:
        h_IN = np.zeros_like(h_IN)
      u_I, delta_I, B_N, C_N = x[row, t], delta[row, t], B_[row, t], C[row, t]
      decay_IN = np.exp(delta_I[:, None] * A)
      h_IN = decay_IN * h_IN + (delta_I * u_I)[:, None] * B_N[None]
      ys[row, t] = h_IN @ C_N
    last[row] = h_IN
  return ys, last


def error(found, wanted) -> float:
  """Relative to the norm."""
  found, wanted = np.float64(found), np.float64(wanted)
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


# Tiny steps remember all 2,048 tokens, large ones none: exp(−160) is 0 in
# float32, and a state that is a product of such factors loses no more than it.
@pytest.mark.parametrize(
  ("low", "high"), [(1e-6, 1e-5), (1e-3, 0.1), (5, 40), (1e-6, 40)]
)
def test_the_scan_equals_a_float64_recurrence(low, high) -> None:
  args = arguments(2048, low, high)
  found_y, found_h = jax.jit(scan)(*args)
  wanted_y, wanted_h = by_hand(*args)
  # exp(ΔA) near 1 is rounded by 6e-8; 2,048 factors' roundings add up to 3e-6
  # at random, and to 1.2e-4 if all had one sign (measured: 2e-6).
  assert error(found_y, wanted_y) <= 1e-5
  assert error(found_h, wanted_h) <= 1e-5


@pytest.mark.parametrize("low, high", [(1e-6, 1e-5), (1e-3, 1), (5, 40)])
def test_gradients_equal_a_float64_recurrence(low, high) -> None:
  args = arguments(300, low, high)
  rng = np.random.default_rng(1)
  w_y, w_h = rng.normal(size=(B, 300, I)), rng.normal(size=(B, I, N))

  def loss(run, *args):
    y, h = run(*args)
    weigh = lambda w, y: (jnp.asarray(w, y.dtype) * y).sum()
    return weigh(w_y, y) + weigh(w_h, h)

  def plain(x, delta, A, B_, C, h):
    def body(h, token):
      x, delta, B_, C = token
      drive = (delta * x)[..., None] * B_[:, None]
      h = jnp.exp(delta[..., None] * A[None]) * h + drive
      return h, (h * C[:, None]).sum(axis=-1)

    first = lambda x: jnp.moveaxis(x, 1, 0)
    h, y = jax.lax.scan(body, h, tuple(map(first, (x, delta, B_, C))))
    return first(y), h

  every = tuple(range(6))
  grad = lambda run: jax.jit(
    jax.grad(functools.partial(loss, run), argnums=every)
  )
  found = grad(scan)(*args)
  with jax.enable_x64(True):
    wanted = grad(plain)(*(jnp.asarray(a, jnp.float64) for a in args))
  for x, y in zip(found, wanted, strict=True):
    # As above, over 300 tokens, and sums of as many terms for A.
    assert error(x, y) <= 5e-6  # measured: 3e-7


@pytest.mark.parametrize(
  ("length", "chunk"), [(12, 5), (7, 7), (65, 8), (3, 1)]
)
def test_documents_and_chunks(length, chunk) -> None:
  """Documents that start before, at and after a chunk's first token.

  NaN in one document does not reach another.
  """
  args = arguments(length)
  rng = np.random.default_rng(2)
  ids = np.cumsum(rng.random((B, length)) < 0.3, axis=1)
  run = jax.jit(functools.partial(scan, chunk=chunk))
  found_y, found_h = run(*args, segment_ids=ids)
  wanted_y, wanted_h = by_hand(*args, ids=ids)
  # Roundings of 6e-8 through sums of a few terms of size 1.
  np.testing.assert_allclose(found_y, wanted_y, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(found_h, wanted_h, rtol=2e-5, atol=2e-6)

  def loss(per_token, A, h, own):
    x, delta, B_, C = per_token
    y, _ = scan(x, delta, A, B_, C, h, segment_ids=ids, chunk=chunk)
    return jnp.where(own[..., None], y, 0).sum(), y

  gradient = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
  x, delta, A, B_, C, h = args
  for row in range(B):
    for document in np.unique(ids[row]):
      own = np.zeros((B, length), bool)
      own[row] = ids[row] == document
      spoil = lambda a, own=own: np.where(own[..., None], a, np.nan)
      tokens = x, delta, B_, C
      (before, dh), y = gradient(tokens, A, h, own)
      (after, spoilt_dh), spoilt_y = gradient(
        tuple(map(spoil, tokens)), A, h, own
      )
      np.testing.assert_array_equal(spoilt_y[own], y[own])
      for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a[own], b[own])
      first = document == ids[row, 0]
      assert (dh[row] != 0).any() == first
      if first:
        np.testing.assert_array_equal(spoilt_dh[row], dh[row])


def test_a_chunk_changes_nothing_but_roundings() -> None:
  args = arguments(200)
  whole, _ = jax.jit(functools.partial(scan, chunk=200))(*args)
  parts, _ = jax.jit(functools.partial(scan, chunk=CHUNK))(*args)
  # Other orders of the same float32 sums.
  np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)
  assert CHUNK < 200


@pytest.mark.parametrize("rows,expected", [(1, 256), (8, 128), (64, 32)])
def test_few_rows_have_longer_chunks(rows: int, expected: int) -> None:
  T, width, N = 4 * LONGEST, 2, 3
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
  args = (
    *[shape(rows, T, width)] * 2,
    shape(width, N),
    *[shape(rows, T, N)] * 2,
    shape(rows, width, N),
  )
  # Differentiated, because the derivative is our own and hides the scan.
  traced = jax.make_jaxpr(lambda *args: jax.vjp(scan, *args)[0])(*args)
  lengths = [x.params["length"] for x in _scans(traced.jaxpr)]
  assert lengths == [T // expected]


def _scans(jaxpr) -> list:
  """Return the scans of a jaxpr and of the programs that it calls."""
  found = [x for x in jaxpr.eqns if x.primitive.name == "scan"]
  called = [x.params.get("jaxpr") for x in jaxpr.eqns if x not in found]
  for inner in called:
    if inner is not None:
      found += _scans(getattr(inner, "jaxpr", inner))
  return found


def test_an_exported_scan_takes_any_number_of_rows() -> None:
  args = arguments(40)
  (rows,) = jax.export.symbolic_shape("rows")
  shapes = [
    jax.ShapeDtypeStruct((rows, *x.shape[1:]) if x.ndim > 2 else x.shape, "f4")
    for x in args
  ]
  exported = jax.export.export(jax.jit(scan))(*shapes)
  for x, y in zip(exported.call(*args), jax.jit(scan)(*args), strict=True):
    # Chunks of another length: other orders of the same float32 sums.
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 3e-2), ("float64", 1e-13)]
)
def test_dtypes_and_lengths(length, dtype, limit) -> None:
  """In bfloat16 every state is rounded, 2⁻⁹ a token; float64 is exact."""
  with jax.enable_x64(True):
    args = [np.asarray(x, jnp.dtype(dtype)) for x in arguments(length)]
    y, h = jax.jit(scan)(*args)
  assert y.dtype == h.dtype == dtype
  wanted_y, wanted_h = by_hand(*args)
  assert error(y, wanted_y) <= limit
  assert error(h, wanted_h) <= limit


def test_a_row_starts_from_zeros_by_default() -> None:
  args = arguments(7)
  zero = np.zeros_like(args[-1])
  found = selective_scan(*args[:-1])
  for x, y in zip(found, scan(*args[:-1], zero), strict=True):
    np.testing.assert_array_equal(x, y)


def test_rows_and_channels_over_a_mesh() -> None:
  mesh = jax.make_mesh((2, 3), ("data", "tensor"), (AxisType.Auto,) * 2)
  args = arguments(50)
  ids = np.cumsum(np.random.default_rng(2).random((B, 50)) < 0.2, axis=1)

  def loss(*args):
    y, h = scan(*args, segment_ids=ids)
    return jnp.square(y).sum() + jnp.square(h).sum()

  run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6))))
  wanted = run(*args)
  with jax.set_mesh(mesh):
    channels, states = jax.P("data", None, "tensor"), jax.P("data")
    places = channels, channels, jax.P("tensor"), states, states
    places = *places, jax.P("data", "tensor")
    found = run(*[jax.device_put(*x) for x in zip(args, places, strict=True)])
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
