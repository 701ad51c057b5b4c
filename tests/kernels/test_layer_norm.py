"""Layer normalisation against its equations in float64."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import devices, layer_norm
from rebased_jax.layer_norm import LayerNorm

EPS = 1e-5


def _equations(x_D, scale_D, bias_D):
  """Return y, which jax differentiates."""
  mean_1 = x_D.mean(axis=-1, keepdims=True)
  variance_1 = ((x_D - mean_1) ** 2).mean(axis=-1, keepdims=True)
  scale_D, bias_D = (
    p.reshape((1,) * (x_D.ndim - 1) + p.shape) for p in (scale_D, bias_D)
  )
  return scale_D * (x_D - mean_1) / jnp.sqrt(variance_1 + EPS) + bias_D


def _inputs(shape, mean=0.0):
  rng = np.random.default_rng(0)
  x_D = mean + rng.standard_normal(shape)
  scale_D, bias_D = 1 + rng.standard_normal((2, shape[-1]))
  return x_D, scale_D, bias_D, rng.standard_normal(shape)


def _with_gradients(call, *inputs, dy_D):
  """Return (y, dx, dscale, dbias), from one compiled program."""

  @jax.jit
  def run(inputs, dy_D):
    y_D, pull = jax.vjp(call, *inputs)
    return y_D, *pull(dy_D)

  return jax.device_get(run(inputs, dy_D))


@functools.cache
def _wanted(shape):
  """Return inputs, a cotangent, and what the equations give in float64."""
  *inputs, dy_D = _inputs(shape, mean=0.5)
  with jax.enable_x64(True):
    return inputs, dy_D, _with_gradients(_equations, *inputs, dy_D=dy_D)


def _error(found, wanted) -> float:
  a, b = (np.asarray(x, np.float64) for x in (found, wanted))
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(params=["cpu", "gpu"])
def program(request, monkeypatch) -> None:
  """Run each platform's program: a GPU's has one reduction for both moments."""
  monkeypatch.setattr(devices, "platform", lambda: request.param)


@pytest.mark.quick
@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 1), (5, 3), (768,)])
@pytest.mark.parametrize(
  "dtype, out, limit",
  [
    ("float32", "float32", 1e-6),
    ("float32", "bfloat16", 4e-3),  # y and dy are rounded to 2⁻⁹
    ("float64", "float64", 1e-13),
    ("bfloat16", "bfloat16", 1e-2),  # and so are x and the parameters
    ("float16", "float32", 1.5e-3),
  ],
)
def test_values_and_gradients(shape, dtype, out, limit) -> None:
  inputs, dy_D, wanted = _wanted(shape)
  with jax.enable_x64(True):
    cast = [x.astype(dtype) for x in inputs]
    call = lambda *x: layer_norm(*x, eps=EPS, dtype=out)
    y, *found = _with_gradients(call, *cast, dy_D=dy_D.astype(jnp.dtype(out)))
  assert y.dtype == out and [x.dtype for x in found] == [dtype] * 3
  if shape[-1] == 1:  # y is β, whatever x is
    np.testing.assert_array_equal(found[0], 0 * inputs[0])
    pairs = [(y, wanted[0]), (found[2], wanted[3])]
  else:
    pairs = zip((y, *found), wanted, strict=True)
  for a, b in pairs:
    assert _error(a, b) <= limit


def test_the_backward_computes_the_normalised_row_again() -> None:
  """Otherwise XLA keeps it from the forward, in float32."""
  x_D, scale_D, bias_D, _ = (np.float32(x) for x in _inputs((3, 8)))
  loss = lambda x: layer_norm(x, scale_D, bias_D, eps=EPS).sum()
  lowered = jax.jit(jax.grad(loss)).lower(x_D).as_text()
  # A row, its mean and its 1/σ: nothing computed from them passes the barrier.
  (barrier,) = re.findall(r"optimization_barrier.* : (.*)", lowered)
  assert re.findall(r"<(.*?)>", barrier) == ["3x8xf32", *["3x1xf32"] * 2]


@pytest.mark.usefixtures("program")
def test_the_variance_of_a_row_far_from_zero() -> None:
  # E x² − μ² would lose all of it.
  x_D, scale_D, bias_D, _ = _inputs((64, 768), mean=3e3)
  x_D = np.float32(x_D)
  # A new function for each platform: jax.jit would reuse the other's program.
  call = jax.jit(lambda *x: layer_norm(*x, eps=EPS))
  found = call(x_D, np.float32(scale_D), np.float32(bias_D))
  with jax.enable_x64(True):
    wanted = _equations(np.float64(x_D), scale_D, bias_D)
  # √768 roundings of μ, 3e3 · 2⁻²⁴ each, where the sum is taken in sequence.
  assert _error(found, wanted) <= 5e-3


@pytest.mark.usefixtures("program")
def test_batches_and_second_derivatives() -> None:
  x_D, scale_D, bias_D, dy_D = (
    jnp.asarray(x, jnp.float32) for x in _inputs((3, 8))
  )
  one = lambda x: layer_norm(x, scale_D, bias_D, eps=EPS)
  loss = lambda x, f: (f(x) * dy_D[0]).sum() ** 2
  gradient = lambda f: jax.vmap(jax.grad(lambda x: loss(x, f)))
  plain = lambda x: _equations(x, scale_D, bias_D)
  twice = lambda f: jax.grad(
    lambda x: jnp.square(jax.grad(lambda z: loss(z, f))(x)).sum()
  )
  both = lambda f: jax.jit(lambda x_D: (gradient(f)(x_D), twice(f)(x_D[0])))
  for found, wanted in zip(both(one)(x_D), both(plain)(x_D), strict=True):
    assert _error(found, wanted) <= 1e-5


@pytest.mark.usefixtures("program")
def test_groups_have_parameters_each() -> None:
  rng = np.random.default_rng(0)
  x_GD, scale_GD, bias_GD = np.float32(rng.standard_normal((3, 4, 6)))
  found = layer_norm(x_GD[None], scale_GD, bias_GD, eps=EPS)[0]
  each = zip(x_GD, scale_GD, bias_GD, strict=True)
  wanted = [layer_norm(*group, eps=EPS) for group in each]
  np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-6, atol=1e-6)


def test_no_scale_and_no_bias_are_1_and_0() -> None:
  x_D, scale_D, bias_D, _ = (np.float32(x) for x in _inputs((3, 8)))
  one, zero = np.ones_like(scale_D), np.zeros_like(bias_D)
  for found, wanted in (
    (layer_norm(x_D), layer_norm(x_D, one, zero)),
    (layer_norm(x_D, scale_D), layer_norm(x_D, scale_D, zero)),
    (layer_norm(x_D, bias=bias_D), layer_norm(x_D, one, bias_D)),
  ):
    np.testing.assert_array_equal(found, wanted)


def test_parameters_start_at_one_and_zero() -> None:
  dtype = jnp.dtype("float32")
  norm = LayerNorm(4, eps=EPS, dtype=dtype, rngs=nnx.Rngs(0))
  assert norm.scale[...].tolist() == [1.0] * 4
  assert norm.bias[...].tolist() == [0.0] * 4
