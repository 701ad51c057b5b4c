"""A token that is Inf or NaN changes no output before it, of any operator."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import pallas_kernels as pk

T, D = 96, 4  # two chunks of 48 tokens in "xla", without padding
TOKENS = (0, 20, 47, 48, 95)  # that are spoilt


def draw(seed, *shape):
  return np.float32(np.random.default_rng(seed).normal(size=shape))


ROW, TAPS, A = draw(5, D), draw(6, 3, D), -np.abs(draw(7, D, 3))
ONE_ROW = dict(q=(1, T, 2, D), k=(1, T, 2, D), v=(1, T, 2, 3))
ROWS = dict(x=(1, T, D), y=(1, T, D))


def attention(q, k, v, **options):
  return pk.polynomial_attention(q, k, v, coefficients=pk.BASED, **options)


def with_state(q, k, v):
  state = pk.zero_state(1, 2, D, 3, coefficients=pk.BASED)
  state = jax.tree.map(jnp.ones_like, state)
  return attention(q, k, v, initial_state=state, return_state=True)[0]


def steps(q, k, v):
  def step(state, token):
    return pk.polynomial_attention_step(state, *token)[::-1]

  first = [jnp.moveaxis(x, 1, 0) for x in (q, k, v)]
  _, o = jax.lax.scan(step, pk.zero_state(1, 2, D, 3), tuple(first))
  return jnp.moveaxis(o, 0, 1)


def at_all_positions(q, k, v):
  return pk.polynomial_attention_at(q, k, v, jnp.arange(T)[None])


def weights(q, k):
  return jnp.moveaxis(pk.polynomial_attention_weights(q, k), 2, 1)


def losses(x, y, parts):
  targets = jnp.zeros((1, T), jnp.int32)
  _, tokens = pk.cross_entropy(x + y, jnp.asarray(TAPS), targets, parts=parts)
  return tokens.nll_BM


def scan(x, delta, B, C):
  return pk.selective_scan(x, delta**2, A, B, C)[0]


CALLS = {
  "xla": (functools.partial(attention, implementation="xla"), ONE_ROW),
  "reference": (
    functools.partial(attention, implementation="reference"),
    ONE_ROW,
  ),
  "state": (with_state, ONE_ROW),
  "steps": (steps, ONE_ROW),
  "at": (at_all_positions, ONE_ROW),
  "weights": (weights, dict(q=ONE_ROW["q"], k=ONE_ROW["k"])),
  "layer_norm": (lambda x: pk.layer_norm(x), dict(x=ROWS["x"])),
  "add_layer_norm": (
    lambda x, y: jnp.stack(pk.add_layer_norm(x, y, ROW, ROW), axis=2),
    ROWS,
  ),
  "gelu": (lambda x: pk.gelu(x, ROW), dict(x=ROWS["x"])),
  "gated_conv": (lambda x, y: pk.gated_conv(x, y, TAPS, ROW), ROWS),
  "causal_conv": (
    lambda x: pk.causal_conv(x, TAPS, ROW)[0],
    dict(x=ROWS["x"]),
  ),
  "loss": (functools.partial(losses, parts=1), ROWS),
  "loss in parts": (functools.partial(losses, parts=4), ROWS),
  "selective_scan": (
    scan,
    dict(x=ROWS["x"], delta=ROWS["x"], B=(1, T, 3), C=(1, T, 3)),
  ),
  "wkv": (lambda x, y: pk.wkv(x, y, -(ROW**2), ROW)[0], ROWS),
}


def assert_earlier_outputs_stay(call, shapes, tokens=TOKENS):
  call = jax.jit(call)
  arrays = {name: draw(i, *x) for i, (name, x) in enumerate(shapes.items())}
  clean = np.asarray(call(**arrays))
  assert np.isfinite(clean).all()
  for name, array in arrays.items():
    for t in tokens:
      for value in (np.nan, np.inf):
        spoilt = array.copy()
        spoilt[:, t] = value
        found = np.asarray(call(**arrays | {name: spoilt}))
        np.testing.assert_array_equal(found[:, :t], clean[:, :t])
        assert not np.array_equal(found[:, t], clean[:, t])


@pytest.mark.parametrize("name", CALLS)
def test_earlier_outputs_do_not_change(name):
  assert_earlier_outputs_stay(*CALLS[name])


def test_earlier_gradients_of_queries_do_not_change():
  """The later tokens' outputs depend on earlier keys and values."""

  def gradient(q, k, v):
    return jax.grad(lambda q: attention(q, k, v).sum())(q)

  assert_earlier_outputs_stay(gradient, ONE_ROW, (20, 60))


@pytest.mark.parametrize("name", ["xla", "causal_conv"])
def test_earlier_outputs_do_not_change_where_time_is_split(name):
  mesh = jax.make_mesh((4,), ("t",), (AxisType.Auto,))
  axes = pk.ShardAxes(time="t")
  call = {
    "xla": functools.partial(attention, axes=axes),
    "causal_conv": lambda x: pk.causal_conv(x, TAPS, ROW, axes=axes)[0],
  }[name]
  with jax.set_mesh(mesh):
    assert_earlier_outputs_stay(call, CALLS[name][1], (20, 24))
