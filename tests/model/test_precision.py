"""Every float32 product of a model has the precision that its config names.

A GPU rounds the operands of a float32 product to TF32 and a TPU to bfloat16,
unless the product asks for more. A CPU rounds nothing, so that values cannot
show a product that asks for nothing. The tests therefore read the jaxprs of the
loss and its gradient.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
import jax.numpy as jnp
import pytest

from pallas_kernels import cross_entropy, numerics
from rebased_jax import LM, ModelConfig, config_checks, linen, presets
from rebased_jax.linear import linear
from train import step

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
B, T, D, V = 2, 72, 16, 32  # more than the 64 tokens of one chunk
_ONLY_TABLE_1 = ("x2", "gamma", "gamma-beta")
SYSTEMS = presets.SYSTEMS | {
  name: presets.hybrid(presets.VARIANTS[name]) for name in _ONLY_TABLE_1
}


def products(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Any]:
  """Yield the matrix products and convolutions of a jaxpr, at any depth."""
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      yield equation
    is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    for x in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
      if is_jaxpr(x):
        yield from products(x)


def config_of(system: presets.System, **changes) -> ModelConfig:
  few = lambda mixer: (
    dataclasses.replace(mixer, heads=2, features=4)
    if hasattr(mixer, "features")
    else mixer
  )
  return ModelConfig(
    first=few(system.first),
    second=few(system.second),
    block=system.block,
    mlp_width=None if system.block == "mamba" else 2 * D,
    **dict(vocab_size=V, width=D, positions=T) | changes,
  )


def step_products(config: ModelConfig, loss_chunks: int = 2) -> list[Any]:
  """Return the products of a model's loss and its gradient."""
  model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
  graph, params = nnx.split(model)
  program = step.Program(graph, None, 1, None, loss_chunks=loss_chunks)
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  weights = jax.ShapeDtypeStruct((B, T), jnp.float32)
  batch = dict(tokens=tokens, targets=tokens, weights=weights)
  loss = lambda params, batch: step.loss_sums(params, batch, program)[0]
  traced = jax.jit(jax.value_and_grad(loss)).trace(params, batch)
  return list(products(traced.jaxpr))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_product_of_a_step_has_the_precision_asked_for(name) -> None:
  found = step_products(config_of(SYSTEMS[name], precision="highest"))
  # The logits and two MLPs have 3 products each, and mixers have more.
  assert len(found) >= 9 if SYSTEMS[name].block == "pre-norm" else 3
  for equation in found:
    assert equation.params["precision"] == HIGHEST, equation


def test_nothing_is_asked_for_by_default() -> None:
  """Then jax's own setting holds, except for the operator's products."""
  config = config_of(SYSTEMS["rebased"])
  asked = [x.params["precision"] for x in step_products(config)]
  assert set(asked) == {None, HIGHEST}
  attention = config_of(SYSTEMS["attention"], precision="default")
  low = (jax.lax.Precision.DEFAULT,) * 2
  found = [x.params["precision"] for x in step_products(attention)]
  assert set(found) == {low, HIGHEST}
  assert found.count(low) > 2 * 12  # 4 projections in 3 products, 2 layers


def test_the_loss_in_one_part_and_16_bits() -> None:
  config = config_of(SYSTEMS["rebased"], precision="highest")
  for equation in step_products(config, loss_chunks=1):
    assert equation.params["precision"] == HIGHEST
  narrow = dataclasses.replace(config, dtype="bfloat16")
  for equation in step_products(narrow):
    # What has 16 bits is not rounded. The operator's sums are float32.
    wide = equation.invars[0].aval.dtype == jnp.float32
    assert (equation.params["precision"] == HIGHEST) == wide


def test_decoding_has_the_precision_too() -> None:
  config = config_of(SYSTEMS["conv-attention"], precision="highest")
  model = LM(config, rngs=nnx.Rngs(0))
  state = model.init_state(B)
  tokens = jnp.zeros((B, T), jnp.int32)
  for call in (
    lambda: model.prefill(tokens, state),
    lambda: model.step(tokens[:, 0], state),
    lambda: model(tokens),
  ):
    found = list(products(jax.make_jaxpr(call)()))
    assert len(found) >= 9
    for equation in found:
      assert equation.params["precision"] == HIGHEST


def test_every_parameter_has_the_param_dtype() -> None:
  for name, system in SYSTEMS.items():
    config = config_of(system, param_dtype=jnp.bfloat16)
    assert config.param_dtype == "bfloat16"
    model = nnx.eval_shape(lambda c=config: LM(c, rngs=nnx.Rngs(0)))
    for x in jax.tree.leaves(nnx.state(model, nnx.Param)):
      assert x.dtype == jnp.bfloat16, name


def test_unknown_precisions_are_refused_by_name() -> None:
  words = r"precision='float32': expected .*'highest'"
  with pytest.raises(ValueError, match=words):
    config_of(SYSTEMS["rebased"], precision="float32")
  with pytest.raises(ValueError, match=words):
    linear(4, 4, dtype="float32", rngs=nnx.Rngs(0), precision="float32")
  with pytest.raises(ValueError, match=words):
    x, targets = jnp.ones((1, 2, 4)), jnp.zeros((1, 2), jnp.int32)
    cross_entropy(x, jnp.ones((8, 4)), targets, precision="float32")


def test_a_linen_mixer_has_a_precision() -> None:
  config = presets.VARIANTS["rebased"]
  mixer = linen.mixer(config, D, precision="highest")
  x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  jaxpr = jax.make_jaxpr(mixer.init_with_output)(key, x_BTD)
  for equation in products(jaxpr):
    assert equation.params["precision"] == HIGHEST


def test_configs_know_the_precisions_of_the_operators() -> None:
  """They have their own copy, so that they import no jax."""
  assert config_checks.PRECISIONS == numerics.PRECISIONS
