"""A residual sum with its norm: XLA and kernels against float64 equations."""

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

from pallas_kernels import ShardAxes, add_layer_norm, devices
from pallas_kernels.layer_norm.operator import has_kernel
from rebased_jax import LM, AttentionConfig, ModelConfig, ReBasedConfig

EPS = 1e-5


def _inputs(shape, dtype="bfloat16", *, has_bias=True):
  """Return (x, y, y_bias, scale, bias) and the cotangents of s and n."""
  rng = np.random.default_rng(0)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)
  x_BTD, y_BTD = 3 + normal(*shape), normal(*shape).astype(jnp.dtype(dtype))
  scale_D, bias_D, y_bias_D = 1 + normal(3, shape[-1])
  cotangents = normal(*shape), normal(*shape).astype(jnp.dtype(dtype))
  y_bias_D = y_bias_D if has_bias else None
  return (x_BTD, y_BTD, y_bias_D, scale_D, bias_D), cotangents


def _call(x_BTD, y_BTD, y_bias_D, scale_D, bias_D, axes=None):
  return add_layer_norm(
    x_BTD, y_BTD, scale_D, bias_D, y_bias=y_bias_D, eps=EPS, axes=axes
  )


def _equations(x_BTD, y_BTD, y_bias_D, scale_D, bias_D):
  s_BTD = x_BTD + y_BTD
  if y_bias_D is not None:
    s_BTD += y_bias_D.reshape((1,) * (s_BTD.ndim - 1) + y_bias_D.shape)
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
  names = ["s", "n", "dx", "dy", "dy_bias", "dscale", "dbias"]
  if len(found) < len(names):
    names.remove("dy_bias")
  for name, a, b in zip(names, found, wanted, strict=True):
    wide = np.asarray(a, np.float64)
    error = np.linalg.norm(wide - b) / np.linalg.norm(b)
    # 16 bits round to 2⁻⁹ of a value at most; sums are float32.
    assert error <= (2e-6 if a.dtype == np.float32 else 2.5e-3), (name, error)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((2, 5, 24), "bfloat16"),
    ((2, 5, 24), "float16"),
    ((2, 5, 24), "float32"),
    ((1, 1, 3), "float32"),
    ((7, 13), "bfloat16"),
  ],
)
def test_values_and_gradients_of_xla(shape, dtype, has_bias) -> None:
  inputs, cotangents = _inputs(shape, dtype, has_bias=has_bias)
  run = jax.jit(_both, static_argnums=0)
  found = jax.device_get(run(_call, inputs, cotangents))
  assert [x.dtype for x in found[:4]] == [np.float32, dtype, np.float32, dtype]
  _assert_near(found, _wanted(inputs, cotangents))
  assert not has_kernel(*inputs[:2])


def test_in_float64() -> None:
  (x, y, *parameters), (ds, dn) = _inputs((2, 5, 24), "float32")
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, ((x, y, *parameters), (ds, dn)))
    found = jax.device_get(jax.jit(_both, static_argnums=0)(_call, *wide))
  assert {a.dtype for a in found} == {np.dtype("float64")}
  for a, b in zip(found, _wanted(*wide), strict=True):
    assert np.linalg.norm(a - b) <= 1e-13 * np.linalg.norm(b)


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
  assert has_kernel(*inputs[:2])
  found = _both(_call, jax.tree.map(jnp.asarray, inputs), cotangents)
  _assert_near(found, _wanted(inputs, cotangents))


def test_rows_over_a_mesh(interpreted) -> None:
  mesh = jax.make_mesh((2, 2), ("data", "time"), (AxisType.Auto,) * 2)
  inputs, cotangents = _inputs((2, 4, 128))
  with jax.set_mesh(mesh):
    axes = ShardAxes(batch="data", time="time")
    call = lambda *x: _call(*x, axes)
    found = jax.jit(lambda *x: _both(call, *x))(inputs, cotangents)
  _assert_near(found, _wanted(inputs, cotangents))


@pytest.fixture
def equations_for_kernels(hopper_on_the_cpu, monkeypatch):
  """Replace the kernels by XLA, so that a program over a mesh can be read."""
  from pallas_kernels.layer_norm import gpu

  def forward(x_RD, y_RD, y_bias_D, scale_D, bias_D, *, eps):
    assert eps == EPS
    y_RD_wide = y_RD.astype(x_RD.dtype)
    s_RD, n_RD = _equations(x_RD, y_RD_wide, y_bias_D, scale_D, bias_D)
    return s_RD, n_RD.astype(y_RD.dtype)

  def backward(s_RD, ds_RD, dn_RD, scale_D, *, eps, has_bias):
    assert eps == EPS
    zero_RD, zero_D = jnp.zeros_like(s_RD), jnp.zeros_like(scale_D)
    _, pull = jax.vjp(_equations, s_RD, zero_RD, zero_D, scale_D, zero_D)
    cotangents = ds_RD, dn_RD.astype(s_RD.dtype)
    dx_RD, _, dy_bias_D, *sums = pull(cotangents)
    if has_bias:
      sums.append(dy_bias_D)
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
  call = lambda *x: _call(*x, axes)
  with jax.set_mesh(mesh):
    run = jax.jit(lambda *x: _both(call, *x)).lower(inputs, cotangents)
    run = run.compile()
    _assert_near(run(inputs, cotangents), _wanted(inputs, cotangents))
  sums = re.findall(r"= (.*) all-reduce(?:-start)?\(", run.as_text())
  assert sums and not re.findall(r"\[\d+,", " ".join(sums)), sums


def test_parameters_in_bfloat16(equations_for_kernels):
  (x, y, *parameters), cotangents = _inputs((1, 5, 128))
  inputs = (x, y, *(p.astype(jnp.bfloat16) for p in parameters))
  found = _both(_call, inputs, cotangents)
  assert [x.dtype for x in found[-3:]] == [jnp.bfloat16] * 3


def test_a_model_without_mlps(interpreted, monkeypatch) -> None:
  config = ModelConfig(
    first=AttentionConfig(),
    # The operator's kernels cannot be interpreted as they are.
    second=ReBasedConfig(heads=2, features=8, implementation="xla"),
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
  # Another order of a row's sums changes roundings to bfloat16, 2⁻⁹ each.
  assert_gradients_near(found, wanted, 2e-2)


@pytest.mark.parametrize("width", [128, 768, 2048])
def test_the_kernels_lower(hopper, width) -> None:
  inputs, cotangents = _inputs((2, 7, width))
  run = lambda *x: _both(_call, *x)
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
  assert not has_kernel(np.zeros(shape, np.float32), np.zeros(shape, dtype))


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
  assert has_kernel(*inputs[:2])
  call = jax.jit(lambda *x: _both(_call, *x))
  found = same_bits(call, inputs, cotangents)
  _assert_near(found, _wanted(inputs, cotangents))
