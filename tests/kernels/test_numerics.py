"""Gradients of parameters that all tokens share are summed in float32."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics
from rebased_jax import LM, presets


def _equations(jaxpr):
  """Yield the equations of a jaxpr and of all jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


@pytest.mark.parametrize("name", presets.SYSTEMS)
def test_no_gradient_is_summed_in_16_bits(name) -> None:
  system = presets.SYSTEMS[name]
  config = dataclasses.replace(
    presets.mqar(system, width=64, length=32, vocab_size=11),
    dtype="bfloat16",
    mlp_width=None if system.block == "mamba" else 128,
  )
  graph, params = nnx.split(LM(config, rngs=nnx.Rngs(0)))
  tokens_BT = np.ones((2, 32), np.int32)
  loss = lambda params: nnx.merge(graph, params)(tokens_BT).sum()
  # Only sums: products are summed in float32 and rounded afterwards.
  jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
  sums = [
    x.invars[0].aval
    for x in _equations(jaxpr)
    if x.primitive.name in ("reduce_sum", "scatter-add", "cumsum")
  ]
  assert sums
  assert not [x for x in sums if x.dtype.itemsize == 2], sums


def test_a_bias_in_bfloat16_is_summed_in_float32() -> None:
  x_TD, b_D = jnp.ones((6000, 8), jnp.bfloat16), jnp.ones(8, jnp.bfloat16)
  run = jax.grad(lambda b_D: numerics.add_bias(x_TD, b_D).sum())
  sums = [
    x.invars[0].aval.dtype
    for x in _equations(jax.make_jaxpr(run)(b_D).jaxpr)
    if x.primitive.name == "reduce_sum"
  ]
  assert sums and set(sums) == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_and_gradients(dtype) -> None:
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x_BTD, dy_BTD = (draw(2, 3000, 8).astype(jnp.dtype(dtype)) for _ in "xy")
  p_D = draw(8)
  narrow = np.float64(p_D.astype(x_BTD.dtype))
  x64, dy64 = np.float64(x_BTD), np.float64(dy_BTD)
  tokens = (0, 1)
  for function, y64, dx64, dp64 in (
    (numerics.add_bias, x64 + narrow, dy64, dy64.sum(tokens)),
    (
      numerics.scale_channels,
      x64 * narrow,
      dy64 * narrow,
      (dy64 * x64).sum(tokens),
    ),
  ):
    y_BTD, pull = jax.vjp(jax.jit(function), x_BTD, p_D)
    dx_BTD, dp_D = pull(jnp.asarray(dy_BTD))
    assert (y_BTD.dtype, dx_BTD.dtype, dp_D.dtype) == (dtype, dtype, "float32")
    rounding = float(jnp.finfo(dtype).eps)
    near = lambda x, wanted, rtol: np.testing.assert_allclose(
      np.float64(x), wanted, rtol=rtol, atol=rtol
    )
    near(y_BTD, y64, rounding)
    near(dx_BTD, dx64, rounding)
    # The rounding of 6,000 terms summed in float32, not in their dtype.
    assert np.linalg.norm(dp_D - dp64) <= 1e-6 * np.linalg.norm(dp64)
