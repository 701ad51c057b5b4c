"""WKV against its equations in float64: values, gradients and hard cases."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import WKVState, empty_wkv_state, wkv, wkv_step

B, D = 2, 6
NAMES = ("k", "v", "decay", "first", "numerator", "denominator")


def inputs(T: int, k_scale: float = 1.0):
  """k, v, decay, first, a state's numerator and denominator; three weights."""
  rng = np.random.default_rng(T)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  k_BTD, v_BTD, dy_BTD = normal(3, B, T, D)
  decay_D = np.linspace(-9, 3, D, dtype=np.float32)
  first_D = normal(D)
  a_BD, b_BD = normal(2, B, D)
  sums = a_BD, np.abs(b_BD) + np.float32(0.5)
  weights = dy_BTD, *normal(2, B, D)
  k_BTD = np.float32(k_scale) * k_BTD
  return (k_BTD, v_BTD, decay_D, first_D, *sums), weights


def answer(args, weights, start_BT=None):
  """y, the true sums after it, and the gradients of a weighted sum.

  One weight, not three: y alone, where the sums are beyond float32.
  """
  return _with_gradients(_chunks, args, weights, start_BT)


def oracle(args, weights, start_BT=None):
  """The same token by token in float64, as the equations stand."""
  with jax.enable_x64(True):
    wide = lambda xs: [np.asarray(x, np.float64) for x in xs]
    return _with_gradients(_tokens, wide(args), wide(weights), start_BT)


def _chunks(start_BT, k, v, decay, first, a, b):
  state = WKVState(a, b, jnp.zeros_like(a))
  y, sums = wkv(
    k,
    v,
    -jnp.exp(decay),
    first,
    initial_state=state,
    segment_ids=_ids(start_BT),
  )
  scale = jnp.exp(sums.maximum)
  return y, sums.numerator * scale, sums.denominator * scale


def _ids(start_BT):
  """Return segment ids whose documents start where start_BT is True."""
  return jnp.cumsum(start_BT, axis=1, dtype=jnp.int32)


def _tokens(start_BT, k, v, decay, first, a, b):
  keep = jnp.exp(-jnp.exp(decay))[None]

  def token(sums, inputs):
    k, v, start = inputs
    a, b = (jnp.where(start[:, None], 0, x) for x in sums)
    own = jnp.exp(first[None] + k)
    y = (a + own * v) / (b + own)
    return (keep * a + jnp.exp(k) * v, keep * b + jnp.exp(k)), y

  rows = [jnp.moveaxis(x, 1, 0) for x in (k, v, start_BT)]
  (a, b), y = jax.lax.scan(token, (a, b), tuple(rows))
  return jnp.moveaxis(y, 0, 1), a, b


def _with_gradients(run, args, weights, start_BT):
  if start_BT is None:
    start_BT = np.zeros(args[0].shape[:2], bool)
  grads, outs = _gradients(run, tuple(args), tuple(weights), start_BT)
  return jax.tree.map(np.asarray, (outs, grads))


@functools.partial(jax.jit, static_argnums=0)
def _gradients(run, args, weights, start_BT):
  def loss(*args):
    outs = run(start_BT, *args)[: len(weights)]
    return sum((w * x).sum() for w, x in zip(weights, outs, strict=True)), outs

  return jax.grad(loss, tuple(range(len(args))), has_aux=True)(*args)


def check(found, wanted, tolerance: float) -> None:
  """By each array's largest entry: cancelled ones need not agree by theirs."""
  for name, x, y in zip(NAMES, found[1], wanted[1], strict=True):
    _check(f"d {name}", x, y, tolerance)
  for name, x, y in zip(("y", "A", "B"), found[0], wanted[0], strict=False):
    _check(name, x, y, tolerance)


def _check(name: str, x, y, tolerance: float) -> None:
  assert np.isfinite(x).all(), name
  error = np.abs(x - y).max() / np.abs(y).max()
  assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("T", [1, 2, 3, 5, 67])
@pytest.mark.parametrize("documents", [False, True])
def test_values_and_gradients_of_any_length(T, documents) -> None:
  args, weights = inputs(T)
  start_BT = None
  if documents:
    start_BT = np.random.default_rng(T).random((B, T)) < 0.2
    start_BT[:, 0] = False
  # Sums of up to 67 terms, rounded to 6e-8 each.
  check(answer(args, weights, start_BT), oracle(args, weights, start_BT), 5e-6)


@pytest.mark.parametrize("k_scale", [1, 30])
def test_a_long_row(k_scale) -> None:
  """4096 tokens, decays from e^(−1e-4) to e^(−20), keys of up to ±120."""
  args, weights = inputs(4096, k_scale)
  found, wanted = answer(args, weights[:1]), oracle(args, weights[:1])
  # An exponent of 120 is rounded to 4e-6.
  check(found, wanted, 5e-5 if k_scale > 1 else 1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_all_keys_at_80(sign) -> None:
  args, weights = inputs(300)
  k_BTD = np.full_like(args[0], 80.0 * sign)
  found = answer((k_BTD, *args[1:]), weights[:1])
  wanted = oracle((k_BTD, *args[1:]), weights[:1])
  check(found, wanted, 1e-5)


def test_the_backward_holds_keys_values_and_little_else() -> None:
  T = 1024  # C = N = 32
  args, _ = inputs(T)

  def pull(k, v, decay, first, a, b):
    state = WKVState(a, b, jnp.zeros_like(a))
    call = lambda *x: wkv(*x[:4], initial_state=x[4])
    return jax.vjp(call, k, v, decay, first, state)[1]

  held = jax.tree.leaves(jax.eval_shape(pull, *args))
  floats = sum(x.size for x in held if x.dtype == jnp.float32)
  # k, v; three sums before each of 32 chunks; two states and two rows.
  assert floats <= B * T * D * (2 + 3 / 32) + 4 * B * D + 2 * D


@pytest.mark.parametrize(
  "dtype, limit", [("bfloat16", 1e-2), ("float64", 1e-12)]
)
def test_dtypes(dtype, limit) -> None:
  """Keys and values have any float dtype; sums have w's."""
  args, _ = inputs(33)
  wide = "float64" if dtype == "float64" else "float32"
  with jax.enable_x64(True):
    k, v = (np.asarray(x, jnp.dtype(dtype)) for x in args[:2])
    decay, first, a, b = (np.asarray(x, wide) for x in args[2:])

    def loss(run, *args):
      y, *sums = run(np.zeros((B, 33), bool), *args)
      total = sum(x.sum() for x in sums)
      return y.astype(total.dtype).sum() + total, y

    every = tuple(range(6))
    grad = lambda run: jax.jit(
      jax.grad(functools.partial(loss, run), argnums=every, has_aux=True)
    )
    found, y = grad(_chunks)(k, v, decay, first, a, b)
    assert y.dtype == dtype
    assert [x.dtype for x in found] == [dtype, dtype] + [wide] * 4
    wide_args = [np.float64(x) for x in (k, v, decay, first, a, b)]
    wanted, wanted_y = grad(_tokens)(*wide_args)
  for name, x, y64 in zip(
    ("y", *NAMES), (y, *found), (wanted_y, *wanted), strict=True
  ):
    _check(name, np.float64(x), np.asarray(y64), limit)


@pytest.mark.quick
def test_steps_are_a_row() -> None:
  (k, v, decay, first, *_), _ = inputs(9)
  w_D = -np.exp(decay)
  y_BTD, after = jax.jit(wkv)(k, v, w_D, first)
  state = empty_wkv_state((B, D))
  step = jax.jit(wkv_step)
  for t in range(9):
    y_BD, state = step(k[:, t], v[:, t], w_D, first, state)
    np.testing.assert_allclose(y_BD, y_BTD[:, t], rtol=1e-5, atol=1e-6)
  found, wanted = (
    (x.numerator * np.exp(x.maximum), x.denominator * np.exp(x.maximum))
    for x in (state, after)
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_rows_and_channels_over_a_mesh() -> None:
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  (k, v, decay, first, *_), _ = inputs(21)

  def loss(k, v, w, u):
    y, state = wkv(k, v, w, u, segment_ids=_ids(k[..., 0] > 1))
    return jnp.square(y).sum() + state.denominator.sum()

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
  wanted = run(k, v, -np.exp(decay), first)
  with jax.set_mesh(mesh):
    rows, channels = jax.P("data", None, "tensor"), jax.P("tensor")
    places = rows, rows, channels, channels
    arrays = (k, v, -np.exp(decay), first)
    split = [jax.device_put(*x) for x in zip(arrays, places, strict=True)]
    found = run(*split)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_gradients_through_a_prefill_and_steps_are_those_of_a_row() -> None:
  """The maximum of a state has a derivative too, in a row and in a step."""
  (k, v, decay, first, *_), _ = inputs(9)
  weights = np.random.default_rng(1).normal(size=k.shape).astype(np.float32)
  k = 3 * k  # so that the largest exponent changes hands

  def row(k, v, w, u):
    return (weights * wkv(k, v, w, u)[0]).sum()

  def prefill_and_steps(k, v, w, u):
    y, state = wkv(k[:, :4], v[:, :4], w, u)
    total = (weights[:, :4] * y).sum()
    for t in range(4, 7):
      y, state = wkv_step(k[:, t], v[:, t], w, u, state)
      total += (weights[:, t] * y).sum()
    y, _ = wkv(k[:, 7:], v[:, 7:], w, u, initial_state=state)
    return total + (weights[:, 7:] * y).sum()

  every = (0, 1, 2, 3)
  args = k, v, -np.exp(decay), first
  found, wanted = (
    jax.jit(jax.grad(f, every))(*args) for f in (prefill_and_steps, row)
  )
  for name, x, y in zip(NAMES, found, wanted, strict=False):
    # Exponents of about 10 are rounded to 5e-7.
    _check(f"d {name}", x, y, 5e-6)
