"""What is true of Mamba alone: its scan, its sizes, its start, its memory."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import mamba_equations
import mixer_equations
import numpy as np
import pytest

from pallas_kernels.selective_scan.xla import CHUNK, LONGEST, selective_scan
from rebased_jax import MambaConfig, parameter_count
from rebased_jax.mixers import base

B, I, N = 2, 3, 4


def make(width: int = 64, layers: int = 2, **fields):
  site = base.Site(width, layers=layers)
  return MambaConfig(**fields).make(site, rngs=nnx.Rngs(0))


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
  """(y, h) in float64, token by token."""
  ys = np.zeros(x.shape)
  x, delta, A, B_, C, h = (np.float64(a) for a in (x, delta, A, B_, C, h))
  last = np.zeros(h.shape)
  for row in range(len(x)):
    h_IN = h[row]
    for t in range(x.shape[1]):
      if ids is not None and t > 0 and ids[row, t] != ids[row, t - 1]:
        h_IN = np.zeros_like(h_IN)
      token = x[row, t], delta[row, t], A, B_[row, t], C[row, t]
      h_IN, ys[row, t] = mamba_equations.scan_token(*token, h_IN)
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
  found_y, found_h = jax.jit(selective_scan)(*args)
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

  def loss(scan, *args):
    y, h = scan(*args)
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
  grad = lambda scan: jax.jit(
    jax.grad(functools.partial(loss, scan), argnums=every)
  )
  found = grad(selective_scan)(*args)
  with jax.enable_x64(True):
    wanted = grad(plain)(*(jnp.asarray(a, jnp.float64) for a in args))
  for x, y in zip(found, wanted, strict=True):
    # As above, over 300 tokens, and sums of as many terms for A.
    assert error(x, y) <= 5e-6  # measured: 3e-7


@pytest.mark.parametrize(
  ("length", "chunk"), [(12, 5), (7, 7), (65, 8), (3, 1)]
)
def test_documents_and_chunks(length, chunk) -> None:
  """Borders at, before and behind a chunk's first token; NaN in the others."""
  args = arguments(length)
  rng = np.random.default_rng(2)
  ids = np.cumsum(rng.random((B, length)) < 0.3, axis=1)
  scan = jax.jit(functools.partial(selective_scan, chunk=chunk))
  found_y, found_h = scan(*args, segment_ids=ids)
  wanted_y, wanted_h = by_hand(*args, ids=ids)
  # Roundings of 6e-8 through sums of a few terms of size 1.
  np.testing.assert_allclose(found_y, wanted_y, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(found_h, wanted_h, rtol=2e-5, atol=2e-6)

  def loss(per_token, A, h, own):
    x, delta, B_, C = per_token
    y, _ = selective_scan(x, delta, A, B_, C, h, segment_ids=ids, chunk=chunk)
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
  whole, _ = jax.jit(functools.partial(selective_scan, chunk=200))(*args)
  parts, _ = jax.jit(functools.partial(selective_scan, chunk=CHUNK))(*args)
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
  traced = jax.make_jaxpr(selective_scan)(*args)
  scans = [x for x in traced.eqns if x.primitive.name == "scan"]
  assert [x.params["length"] for x in scans] == [T // expected]


@pytest.mark.parametrize("width", [8, 40, 64, 128])
def test_the_parameter_count(width) -> None:
  rank = -(-width // 16)
  wanted = (
    4 * width**2  # into channels and gate
    + 10 * width  # four taps and a bias
    + 2 * width * (rank + 32)
    + rank * 2 * width
    + 2 * width
    + 32 * width  # A_log
    + 2 * width  # D
    + 2 * width**2
  )
  assert parameter_count(nnx.eval_shape(lambda: make(width))) == wanted


@pytest.mark.parametrize("initialization", ["published", "intended"])
def test_the_start(initialization) -> None:
  width = 256
  params = mixer_equations.parameters(
    make(width, initialization=initialization, layers=8)
  )
  deviation = lambda name: params[f"{name}/kernel"].std()
  # The fewest draws, 512 · 256: a deviation within 1 % but for 1 in 10⁵.
  for name in ("in_proj", "gate_proj", "x_proj"):
    assert deviation(name) == pytest.approx(0.02, rel=0.02)
  assert deviation("out_proj") == pytest.approx(0.02 / 4, rel=0.02)
  # K = 4: uniform within ±½.
  for name in ("conv/kernel", "conv/bias"):
    assert 0.48 < np.abs(params[name]).max() <= 0.5
  np.testing.assert_allclose(
    np.exp(params["A_log"]), np.tile(np.arange(1.0, 17), (512, 1)), rtol=1e-6
  )
  assert (params["D"] == 1).all()
  delta = np.log1p(np.exp(params["dt_proj/bias"]))
  weights = np.abs(params["dt_proj/kernel"])
  if initialization == "published":
    assert (params["dt_proj/bias"] == 0).all()
    assert deviation("dt_proj") == pytest.approx(0.02, rel=0.04)
    return
  assert 0.24 < weights.max() <= 0.25  # R = 16
  assert delta.min() > 1e-3 * 0.999 and delta.max() < 0.1 * 1.001
  # log-uniform: 512 draws' mean has a deviation of 1.33 / √512 = 0.06.
  assert np.log(delta).mean() == pytest.approx(np.log(1e-2), abs=0.24)


def test_a_training_step_never_holds_all_states() -> None:
  """Temporary memory grows with T far slower than (B, T, I, N) float32."""
  width, state, lengths = 64, 128, (512, 2048)
  graph, params = nnx.split(nnx.eval_shape(lambda: make(width, state=state)))

  def temporary(length: int) -> int:
    x_BTD = jax.ShapeDtypeStruct((B, length, width), jnp.float32)
    loss = lambda params, x: jnp.square(nnx.merge(graph, params)(x)).sum()
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory = step.lower(params, x_BTD).compile().memory_analysis()
    return memory.temp_size_in_bytes

  growth = temporary(lengths[1]) - temporary(lengths[0])
  all_states = B * (lengths[1] - lengths[0]) * 2 * width * state * 4
  # What must grow is some (B, T, I) and (B, T, N) arrays, and one state a
  # chunk (measured: 0.18); a single array of all states would be 1.
  assert 0 < growth < 0.25 * all_states


@pytest.mark.parametrize(
  ("field", "value"),
  [("state", 0), ("taps", 0), ("expand", 1.5), ("initialization", "fixed")],
)
def test_a_wrong_field_is_named(field, value) -> None:
  with pytest.raises(ValueError, match=rf"MambaConfig\.{field}="):
    MambaConfig(**{field: value})
