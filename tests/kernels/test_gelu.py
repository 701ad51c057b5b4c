"""GELU of x + bias: XLA and kernels against float64 equations."""

import math
import re

from hopper_cases import assert_lowers, on_the_card, same_bits
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import ShardAxes, devices, gelu
from pallas_kernels.gelu import xla
from pallas_kernels.gelu.operator import has_kernel

_ERF = np.vectorize(math.erf)


def _inputs(shape, dtype="bfloat16"):
  rng = np.random.default_rng(0)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)
  x_BTD, dy_BTD = (2 * normal(*shape) for _ in range(2))
  to = lambda x: x.astype(jnp.dtype(dtype))
  return to(x_BTD), normal(shape[-1]), to(dy_BTD)


def _wanted(x_BTD, b_D, dy_BTD):
  """Return y, dx and db in float64."""
  x_BTD, b_D, dy_BTD = map(np.float64, (x_BTD, b_D, dy_BTD))
  u_BTD = x_BTD + b_D
  below_BTD = 0.5 * (1 + _ERF(u_BTD / math.sqrt(2)))
  density_BTD = np.exp(-(u_BTD**2) / 2) / math.sqrt(2 * math.pi)
  dx_BTD = dy_BTD * (below_BTD + u_BTD * density_BTD)
  tokens = tuple(range(x_BTD.ndim - 1))
  return u_BTD * below_BTD, dx_BTD, dx_BTD.sum(axis=tokens)


def _both(x_BTD, b_D, dy_BTD, axes=None):
  y_BTD, pull = jax.vjp(lambda x, b: gelu(x, b, axes=axes), x_BTD, b_D)
  return y_BTD, *pull(dy_BTD)


def _assert_near(found, wanted, *, of_sum=1e-6) -> None:
  names = ("y", "dx", "db")[: len(wanted)]
  for name, a, b in zip(names, found, wanted, strict=True):
    assert a.shape == b.shape
    error = np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)
    # 16 bits round to 2⁻⁹ of a value at most; sums are float32.
    limit = of_sum if a.dtype == np.float32 else 2.5e-3
    assert error <= limit, (name, error)


@pytest.mark.parametrize(
  "shape, dtype, of_sum",
  # In 16 bits x + b is rounded to them, and dx before it is summed.
  [
    ((2, 65, 24), "float32", 1e-6),
    ((2, 65, 24), "bfloat16", 5e-3),
    ((2, 65, 24), "float16", 1e-3),
    ((2, 1, 7), "float32", 1e-6),
    ((130, 5), "bfloat16", 5e-3),
  ],
)
def test_values_and_gradients_of_xla(shape, dtype, of_sum) -> None:
  inputs = _inputs(shape, dtype)
  found = jax.device_get(jax.jit(_both)(*inputs))
  assert [x.dtype for x in found] == [dtype, dtype, np.float32]
  _assert_near(found, _wanted(*inputs), of_sum=of_sum)
  assert not has_kernel(inputs[0])


def test_in_float64() -> None:
  with jax.enable_x64(True):
    inputs = [np.float64(x) for x in _inputs((2, 5, 24), "float32")]
    found = jax.device_get(jax.jit(_both)(*inputs))
  for a, b in zip(found, _wanted(*inputs), strict=True):
    assert a.dtype == np.float64
    assert np.linalg.norm(a - b) <= 1e-13 * np.linalg.norm(b)


@pytest.mark.quick
def test_without_a_bias() -> None:
  x_BTD, b_D, dy_BTD = _inputs((2, 5, 24), "float32")
  found, pull = jax.vjp(gelu, x_BTD)
  y_BTD, dx_BTD, _ = _wanted(x_BTD, np.zeros_like(b_D), dy_BTD)
  np.testing.assert_allclose(found, y_BTD, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(pull(dy_BTD)[0], dx_BTD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "shape, dtype, programs",
  [
    ((1, 1, 128), "bfloat16", 4),
    ((1, 5, 384), "float16", 6),  # three parts of the columns
    ((3, 2, 2048), "bfloat16", 8),
    ((7, 256), "bfloat16", 1),  # a token of each row; fewer than the parts
  ],
)
def test_interpreted_kernels(
  interpreted, monkeypatch, shape, dtype, programs
) -> None:
  from pallas_kernels.gelu import gpu

  monkeypatch.setattr(gpu, "PROGRAMS", programs)
  monkeypatch.setattr(gpu, "PROGRAMS_BACKWARD", programs)
  inputs = _inputs(shape, dtype)
  assert has_kernel(inputs[0])
  found = jax.jit(_both)(*inputs)
  assert [x.dtype for x in found] == [dtype, dtype, np.float32]
  _assert_near(found, _wanted(*inputs))


def test_interpreted_kernels_without_a_bias(interpreted) -> None:
  x_BTD, b_D, dy_BTD = _inputs((1, 3, 128))
  found, pull = jax.vjp(gelu, x_BTD)
  wanted = _wanted(x_BTD, np.zeros_like(b_D), dy_BTD)
  _assert_near((found, *pull(dy_BTD)), wanted[:2])


@pytest.mark.quick
def test_the_distribution(hopper) -> None:
  from pallas_kernels.gelu import gpu

  x = np.float32([0, -0.0, 1e-30, -1e-30, 300, -300, 1e30, -1e30])
  x = np.concatenate([x, np.linspace(-15, 15, 4001, dtype=np.float32)])
  below, bell = gpu._normal(jnp.asarray(x))
  wide = x.astype(np.float64)
  wanted = 0.5 * (1 + _ERF(wide / math.sqrt(2)))
  # The formula is 7.5e-8 off at most, float32's roundings come to it.
  np.testing.assert_allclose(below, wanted, rtol=0, atol=3e-7)
  with np.errstate(under="ignore"):
    np.testing.assert_allclose(bell, np.exp(-(wide**2) / 2), rtol=0, atol=1e-6)
  # Far to the left gelu(x) is 0, and x φ(x) is, without an infinity between.
  assert np.all(np.isfinite(x * below)) and np.all(np.isfinite(x * bell))
  assert np.all(np.isnan(gpu._normal(jnp.float32([np.nan]))[0]))


def test_channels_over_a_mesh(interpreted) -> None:
  names = ("data", "time", "tensor")
  mesh = jax.make_mesh((1, 2, 2), names, (AxisType.Auto,) * 3)
  inputs = _inputs((2, 4, 256))
  axes = ShardAxes(batch="data", heads="tensor", time="time")
  with jax.set_mesh(mesh):
    found = jax.jit(lambda *x: _both(*x, axes))(*inputs)
    # The kernels do not take parts of 64 channels.
    narrow = [x[..., :128] for x in inputs]
    text = str(jax.make_jaxpr(lambda *x: gelu(*x, axes=axes))(*narrow[:2]))
  _assert_near(found, _wanted(*inputs))
  assert "shard_map" not in text


@pytest.mark.parametrize(
  "axes", [ShardAxes(batch="data"), ShardAxes(heads="m")]
)
def test_axes_without_a_mesh(axes) -> None:
  with pytest.raises(ValueError, match="there is no mesh"):
    gelu(*_inputs((2, 4, 256))[:2], axes=axes)


def test_the_backward_keeps_x_alone() -> None:
  x_BTD, b_D, _ = _inputs((2, 4, 24), "float32")
  kept = jax.vjp(gelu, x_BTD, b_D)[1]
  sizes = [x.shape for x in jax.tree.leaves(kept) if x.size >= x_BTD.size]
  assert sizes == [x_BTD.shape]


@pytest.fixture
def equations_for_kernels(hopper_on_the_cpu, monkeypatch):
  """Replace the kernels by XLA, so that a program over a mesh can be read."""
  from pallas_kernels.gelu import gpu

  def backward(x_RD, b_D, dy_RD):
    wide = lambda x: x.astype(jnp.float32)
    dx_RD, db_D = jax.vjp(xla.gelu, wide(x_RD), b_D)[1](wide(dy_RD))
    return dx_RD.astype(x_RD.dtype), db_D

  monkeypatch.setattr(gpu, "forward", xla.gelu)
  monkeypatch.setattr(gpu, "backward", backward)


def test_devices_sum_the_biass_gradient_alone(equations_for_kernels):
  names = ("data", "time", "tensor")
  mesh = jax.make_mesh((2, 2, 2), names, (AxisType.Auto,) * 3)
  inputs = _inputs((2, 4, 256))
  axes = ShardAxes(batch="data", heads="tensor", time="time")
  with jax.set_mesh(mesh):
    places = [axes.btx(), jax.P("tensor"), axes.btx()]
    inputs = [jax.device_put(*x) for x in zip(inputs, places, strict=True)]
    run = jax.jit(lambda *x: _both(*x, axes)).lower(*inputs).compile()
    _assert_near(run(*inputs), _wanted(*inputs), of_sum=5e-3)
  text = run.as_text()
  # 128 numbers of a device's channels, and of no tokens.
  assert re.findall(r"= (\w+\[[\d,]*\])\S* all-reduce(?:-start)?\(", text) == [
    "f32[128]"
  ]
  assert "all-gather" not in text and "all-to-all" not in text


def test_channels_that_the_axes_do_not_name_stay_split(equations_for_kernels):
  # The tensor axis splits the weights, but not heads that it does not divide.
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  x_BTD, b_D, _ = _inputs((2, 4, 256))
  axes = ShardAxes(batch="data")
  with jax.set_mesh(mesh):
    x_BTD = jax.device_put(x_BTD, jax.P("data", None, "tensor"))
    b_D = jax.device_put(b_D, jax.P("tensor"))
    run = jax.jit(lambda x, b: gelu(x, b, axes=axes)).lower(x_BTD, b_D)
    text = run.compile().as_text()
  assert "bf16[1,4,128]" in text and "all-gather" not in text


def test_a_bias_in_bfloat16(equations_for_kernels):
  x_BTD, b_D, dy_BTD = _inputs((1, 5, 128))
  found = _both(x_BTD, b_D.astype(jnp.bfloat16), dy_BTD)
  assert [x.dtype for x in found] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("width", [128, 3072, 8192])
def test_the_kernels_lower(hopper, width) -> None:
  call = lambda *x: jax.vmap(_both)(*x)
  x_BTD, b_D, dy_BTD = _inputs((2, 7, width))
  inputs = x_BTD, np.stack([b_D, b_D]), dy_BTD
  assert_lowers(call, *inputs, kernel="gelu_backward")


@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((1, 2, 96), "bfloat16"),
    ((1, 2, 128), "float32"),
    ((0, 2, 128), "bfloat16"),
  ],
)
def test_what_the_kernels_do_not_take(monkeypatch, shape, dtype) -> None:
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  assert not has_kernel(np.zeros(shape, dtype))


@on_the_card
@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((1, 1, 128), "bfloat16"),
    ((3, 5, 384), "float16"),
    ((2, 1063, 3072), "bfloat16"),
    ((1, 130, 8192), "bfloat16"),
  ],
)
def test_the_kernels_on_the_card(shape, dtype) -> None:
  inputs = _inputs(shape, dtype)
  assert has_kernel(inputs[0])
  call = jax.jit(_both)
  found = same_bits(call, *inputs)
  _assert_near(found, _wanted(*inputs))


@on_the_card
def test_vmap_on_the_card() -> None:
  each = [_inputs((2, 9, 256)), _inputs((2, 9, 256), "bfloat16")]
  each[1] = tuple(-x for x in each[1])
  found = jax.jit(jax.vmap(_both))(*map(np.stack, zip(*each, strict=True)))
  for n, inputs in enumerate(each):
    _assert_near([x[n] for x in found], _wanted(*inputs))
