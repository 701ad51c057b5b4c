"""The residual sum with its norm: both programs against float64 equations."""

import re

from flax import nnx
from hopper_cases import (
  assert_gradients_near,
  assert_lowers,
  on_the_card,
  same_bits,
)
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import ShardAxes, devices, layer_norm
from pallas_kernels.layer_norm.xla import Stream, add_layer_norm
from rebased_jax import LM, AttentionConfig, ModelConfig, ReBasedConfig

EPS = 1e-5


def _inputs(shape, dtype="bfloat16", *, has_bias=True):
  rng = np.random.default_rng(0)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)
  x_BTD, y_BTD = 3 + normal(*shape), normal(*shape).astype(jnp.dtype(dtype))
  scale_D, bias_D, of_y_D = 1 + normal(3, shape[-1])
  cotangents = normal(*shape), normal(*shape).astype(jnp.dtype(dtype))
  stream = Stream(x_BTD, y_BTD, of_y_D if has_bias else None)
  return (stream, scale_D, bias_D), cotangents


def _equations(stream, scale_D, bias_D):
  x_BTD, y_BTD, of_y_D = stream
  s_BTD = x_BTD + y_BTD
  if of_y_D is not None:
    s_BTD += of_y_D.reshape((1,) * (s_BTD.ndim - 1) + of_y_D.shape)
  mean_BT1 = s_BTD.mean(axis=-1, keepdims=True)
  variance_BT1 = ((s_BTD - mean_BT1) ** 2).mean(axis=-1, keepdims=True)
  hat_BTD = (s_BTD - mean_BT1) / jnp.sqrt(variance_BT1 + EPS)
  row = lambda p: p.reshape((1,) * (s_BTD.ndim - 1) + p.shape)
  return s_BTD, row(scale_D) * hat_BTD + row(bias_D)


def _both(call, inputs, cotangents):
  found, pull = jax.vjp(call, *inputs)
  return *found, *jax.tree.leaves(pull(cotangents))


def _wanted(inputs, cotangents):
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, (inputs, cotangents))
    return jax.device_get(jax.jit(_both, static_argnums=0)(_equations, *wide))


def _assert_near(found, wanted) -> None:
  names = ["s", "n", "dx", "dy", "dof_y", "dscale", "dbias"]
  if len(found) < len(names):
    names.remove("dof_y")
  for name, a, b in zip(names, found, wanted, strict=True):
    wide = np.asarray(a, np.float64)
    error = np.linalg.norm(wide - b) / np.linalg.norm(b)
    # 16 bits round to 2⁻⁹ of a value at most; sums are of float32.
    assert error <= (2e-6 if a.dtype == np.float32 else 2.5e-3), (name, error)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_and_gradients_of_xla(dtype, has_bias) -> None:
  inputs, cotangents = _inputs((2, 5, 24), dtype, has_bias=has_bias)
  call = lambda *x: add_layer_norm(*x, EPS)
  run = jax.jit(_both, static_argnums=0)
  found = jax.device_get(run(call, inputs, cotangents))
  assert [x.dtype for x in found[:4]] == [np.float32, dtype, np.float32, dtype]
  _assert_near(found, _wanted(inputs, cotangents))
  assert not layer_norm.runs_on(*inputs[0][:2])


@pytest.mark.parametrize(
  "shape, dtype, programs, has_bias",
  [
    ((1, 1, 128), "bfloat16", 4, False),
    ((1, 5, 384), "float16", 2, True),
  ],
)
def test_interpreted_kernels(
  interpreted, monkeypatch, shape, dtype, programs, has_bias
) -> None:
  from pallas_kernels.layer_norm import gpu

  monkeypatch.setattr(gpu, "PROGRAMS", programs)
  monkeypatch.setattr(gpu, "PROGRAMS_OF_BIAS", programs)
  inputs, cotangents = _inputs(shape, dtype, has_bias=has_bias)
  assert layer_norm.runs_on(*inputs[0][:2])
  call = lambda *x: add_layer_norm(*x, EPS)
  found = _both(call, jax.tree.map(jnp.asarray, inputs), cotangents)
  _assert_near(found, _wanted(inputs, cotangents))


def test_rows_over_a_mesh(interpreted) -> None:
  mesh = jax.make_mesh((2, 2), ("data", "time"), (AxisType.Auto,) * 2)
  inputs, cotangents = _inputs((2, 4, 128))
  with jax.set_mesh(mesh):
    call = lambda *x: add_layer_norm(
      *x, EPS, axes=ShardAxes(batch="data", time="time")
    )
    found = jax.jit(lambda *x: _both(call, *x))(inputs, cotangents)
  _assert_near(found, _wanted(inputs, cotangents))


@pytest.fixture
def equations_for_kernels(hopper, monkeypatch):
  """The same in XLA, so that a program over a mesh can be read."""
  from pallas_kernels.layer_norm import gpu

  def forward(x_RD, y_RD, of_y_D, scale_D, bias_D, *, eps):
    assert eps == EPS
    stream = Stream(x_RD, y_RD.astype(x_RD.dtype), of_y_D)
    s_RD, n_RD = _equations(stream, scale_D, bias_D)
    return s_RD, n_RD.astype(y_RD.dtype)

  def backward(s_RD, ds_RD, dn_RD, scale_D, *, eps, has_bias):
    assert eps == EPS
    stream = Stream(s_RD, jnp.zeros_like(s_RD), jnp.zeros_like(scale_D))
    _, pull = jax.vjp(_equations, stream, scale_D, jnp.zeros_like(scale_D))
    (dx_RD, _, dof_y_D), *sums = pull((ds_RD, dn_RD.astype(s_RD.dtype)))
    sums += [dof_y_D] * has_bias
    return dx_RD, dx_RD.astype(dn_RD.dtype), *sums

  monkeypatch.setattr(gpu, "forward", forward)
  monkeypatch.setattr(gpu, "backward", backward)


@pytest.mark.parametrize("has_bias", [False, True])
def test_devices_sum_the_parameters_gradients_alone(
  equations_for_kernels, has_bias
):
  names = ("data", "time", "tensor")
  mesh = jax.make_mesh((2, 2, 2), names, (AxisType.Auto,) * 3)
  inputs, cotangents = _inputs((2, 4, 128), has_bias=has_bias)
  axes = ShardAxes(batch="data", time="time", heads="tensor")
  call = lambda *x: add_layer_norm(*x, EPS, axes=axes)
  with jax.set_mesh(mesh):
    run = jax.jit(lambda *x: _both(call, *x)).lower(inputs, cotangents)
    run = run.compile()
    _assert_near(run(inputs, cotangents), _wanted(inputs, cotangents))
  sums = re.findall(r"= (.*) all-reduce(?:-start)?\(", run.as_text())
  assert sums and not re.findall(r"\[\d+,", " ".join(sums)), sums


def test_parameters_in_bfloat16(equations_for_kernels):
  (stream, *of_norm), cotangents = _inputs((1, 5, 128))
  narrow = lambda p: p.astype(jnp.bfloat16)
  stream = stream._replace(bias_D=narrow(stream.bias_D))
  inputs = (stream, *map(narrow, of_norm))
  found = _both(lambda *x: add_layer_norm(*x, EPS), inputs, cotangents)
  assert [x.dtype for x in found[-3:]] == [jnp.bfloat16] * 3


def test_a_model_without_mlps(interpreted, monkeypatch) -> None:
  config = ModelConfig(
    first=AttentionConfig(),
    second=ReBasedConfig(heads=2, features=8),
    vocab_size=11,
    width=128,
    pairs=2,
    dtype="bfloat16",
    scan_layers=False,
  )
  graph, params = nnx.split(LM(config, rngs=nnx.Rngs(0)))
  tokens_BT = np.arange(10, dtype=np.int32).reshape(2, 5)

  def loss(params):
    logits_BTV = nnx.merge(graph, params)(tokens_BT)
    return jnp.square(logits_BTV).sum(), logits_BTV

  run = jax.grad(loss, has_aux=True)
  found = jax.jit(run)(params)
  with monkeypatch.context() as plain:
    plain.setattr(devices, "is_hopper", lambda: False)
    wanted = jax.jit(lambda p: run(p))(params)
  # Sums of a row in another order move roundings to bfloat16, 2⁻⁹ each.
  assert_gradients_near(found, wanted, 2e-2)


@pytest.mark.parametrize("width", [128, 768, 2048])
def test_the_kernels_lower(hopper, width) -> None:
  inputs, cotangents = _inputs((2, 7, width))
  run = lambda *x: _both(lambda *y: add_layer_norm(*y, EPS), *x)
  assert_lowers(run, inputs, cotangents, kernel="add_norm_backward")


@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((1, 2, 96), "bfloat16"),
    ((1, 2, 4096), "bfloat16"),
    ((1, 2, 128), "float32"),
    ((0, 2, 128), "bfloat16"),
  ],
)
def test_what_the_kernels_do_not_take(monkeypatch, shape, dtype) -> None:
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  assert not layer_norm.runs_on(
    np.zeros(shape, np.float32), np.zeros(shape, dtype)
  )


@on_the_card
@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((1, 1, 128), "bfloat16"),
    ((3, 5, 384), "float16"),
    ((2, 1063, 768), "bfloat16"),
    ((1, 130, 2048), "bfloat16"),
  ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_kernels_on_the_card(shape, dtype, has_bias) -> None:
  inputs, cotangents = _inputs(shape, dtype, has_bias=has_bias)
  assert layer_norm.runs_on(*inputs[0][:2])
  call = jax.jit(lambda *x: _both(lambda *y: add_layer_norm(*y, EPS), *x))
  found = same_bits(call, inputs, cotangents)
  _assert_near(found, _wanted(inputs, cotangents))
