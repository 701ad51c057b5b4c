"""Tests of the options of Flax's layers: dtypes, kernels, precision."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from mixer_registry import MIXERS, ONE_OF_EACH
from mixer_subject import B, D, T, tokens
import numpy as np
import pytest

from rebased_jax import LM, BaseConvConfig, ModelConfig, Site
from rebased_jax.linear import Linear

each_mixer = pytest.mark.parametrize("name", ONE_OF_EACH)
SAME = [
  "bfloat16",
  jnp.bfloat16,
  jnp.dtype("bfloat16"),
  np.dtype(jnp.bfloat16),
  jnp.zeros(1, jnp.bfloat16).dtype,
]


def kinds(tree) -> list:
  """Return (shape, dtype name) of each array of a tree."""
  return [(x.shape, x.dtype.name) for x in jax.tree.leaves(tree)]


def results(mixer, method: str, *arguments) -> list:
  """Return the kinds of the arrays that a method would return."""
  graph, params = nnx.split(mixer)
  call = lambda p, *args: getattr(nnx.merge(graph, p), method)(*args)
  return kinds(jax.eval_shape(call, params, *arguments))


def gradients(mixer, x_BTD) -> list:
  """Return the kinds of the gradients of a mixer's parameters."""
  graph, params = nnx.split(mixer)
  loss = lambda p, x_BTD: nnx.merge(graph, p)(x_BTD).sum()
  return kinds(jax.eval_shape(jax.grad(loss), params, x_BTD))


def make(name: str, **options):
  """Return a mixer by the class that a user calls, without its values."""
  entry = MIXERS[name]
  return nnx.eval_shape(
    lambda: entry.mixer_class(D, entry.config, rngs=nnx.Rngs(0), **options)
  )


@each_mixer
@pytest.mark.parametrize(
  ("dtype", "given"),
  [("float32", "bfloat16"), (jnp.bfloat16, "float32")],
  ids=["wide", "narrow"],
)
def test_the_dtype_of_the_input_changes_no_other(name, dtype, given) -> None:
  mixer = make(name, dtype=dtype)
  x_BTD = jax.ShapeDtypeStruct((B, T, D), given)
  state = jax.eval_shape(lambda: mixer.init_state(B))
  wanted = jnp.dtype(dtype).name
  whole, one = ((B, T, D), wanted), ((B, D), wanted)
  assert results(mixer, "__call__", x_BTD) == [whole]
  assert results(mixer, "prefill", x_BTD, state) == [whole, *kinds(state)]
  x_BD = jax.ShapeDtypeStruct((B, D), given)
  assert results(mixer, "step", x_BD, state) == [one, *kinds(state)]


def test_the_input_is_cast_first() -> None:
  entry = MIXERS["conv"]
  mixer = entry.config.make(Site(D), rngs=nnx.Rngs(0))
  x_BTD = tokens().astype(jnp.bfloat16)
  call = jax.jit(lambda x_BTD: mixer(x_BTD))
  wide_BTD = call(x_BTD.astype(np.float32))
  # Two programs: roundings of 6e-8. One of bfloat16 would be 4e-3.
  np.testing.assert_allclose(call(x_BTD), wide_BTD, rtol=1e-5, atol=1e-6)


@each_mixer
def test_parameters_and_their_gradients_have_the_param_dtype(name) -> None:
  mixer = make(name, param_dtype=jnp.bfloat16)
  params = nnx.state(mixer, nnx.Param)
  assert {dtype for _, dtype in kinds(params)} == {"bfloat16"}
  x_BTD = jax.ShapeDtypeStruct((B, T, D), "float32")
  assert gradients(mixer, x_BTD) == kinds(params)
  assert mixer.dtype == jnp.float32
  assert make(name, param_dtype="bfloat16", dtype=None).dtype == jnp.bfloat16


@each_mixer
def test_kernel_init_draws_every_kernel_of_a_linear_layer(name) -> None:
  entry = MIXERS[name]
  mixer = entry.mixer_class(
    D,
    entry.config,
    kernel_init=nnx.initializers.constant(3),
    rngs=nnx.Rngs(0),
  )
  layers = [x for _, x in nnx.iter_modules(mixer) if isinstance(x, Linear)]
  assert layers
  for layer in layers:
    assert (layer.kernel[...] == 3).all()


@each_mixer
def test_the_mixer_of_a_site_has_all_of_its_options(name) -> None:
  site = Site(
    D,
    dtype="float32",
    param_dtype="bfloat16",
    precision="high",
    length=T,
    kernel_init=nnx.initializers.constant(3),
  )
  mixer = MIXERS[name].config.make(site, rngs=nnx.Rngs(0))
  assert (mixer.dtype, mixer.param_dtype) == (jnp.float32, jnp.bfloat16)
  for layer in (x for _, x in nnx.iter_modules(mixer) if isinstance(x, Linear)):
    assert layer.precision == jax.lax.Precision.HIGH
    assert (layer.dtype, layer.param_dtype) == (jnp.float32, jnp.bfloat16)
    assert layer.kernel[...].dtype == jnp.bfloat16
    assert (layer.kernel[...] == 3).all()
  narrow = dataclasses.replace(site, dtype="bfloat16", param_dtype="float32")
  mixer = MIXERS[name].config.make(narrow, rngs=nnx.Rngs(0))
  assert (mixer.dtype, mixer.param_dtype) == (jnp.bfloat16, jnp.float32)


@each_mixer
def test_precision_is_a_name_or_a_member_of_jax(name) -> None:
  x_BTD = jax.ShapeDtypeStruct((B, T, D), "float32")
  high = jax.lax.Precision.HIGH

  def program(precision) -> str:
    graph, params = nnx.split(make(name, precision=precision))
    call = lambda p, x_BTD: nnx.merge(graph, p)(x_BTD)
    return str(jax.make_jaxpr(call)(params, x_BTD))

  assert program(high) == program("high") != program(None)


@pytest.mark.parametrize("dtype", SAME, ids=repr)
def test_configs_keep_the_name_of_a_dtype(dtype) -> None:
  conv = BaseConvConfig()
  fields = dict(first=conv, second=conv, vocab_size=7, width=D)
  config = ModelConfig(dtype=dtype, precision=jax.lax.Precision.HIGH, **fields)
  same = ModelConfig(dtype="bfloat16", precision="high", **fields)
  assert (config, repr(config)) == (same, repr(same))
  assert hash(config) == hash(same)
  site = Site(D, dtype=dtype, param_dtype=dtype)
  assert (site.dtype, site.param_dtype) == ("bfloat16", "bfloat16")
  assert make("conv", dtype=dtype).dtype == jnp.bfloat16
  model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
  assert model.norm.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("dtype", "word"),
  [
    ("bf16", "did you mean 'bfloat16'"),
    (jnp.int32, "'int32'"),
    (None, "'None'"),
    (3, "'3'"),
  ],
  ids=str,
)
def test_what_is_no_dtype_is_named(dtype, word) -> None:
  conv = BaseConvConfig()
  fields = dict(first=conv, second=conv, vocab_size=7, width=D)
  for call in (
    lambda: ModelConfig(dtype=dtype, **fields),
    lambda: Site(D, param_dtype=dtype),
    lambda: make("conv", param_dtype=dtype),
  ):
    with pytest.raises(ValueError, match="dtype=") as error:
      call()
    assert word in str(error.value)


def test_a_precision_of_another_name() -> None:
  with pytest.raises(ValueError, match="precision='float32'"):
    Site(D, precision="float32")
  with pytest.raises(ValueError, match="precision='float32'"):
    make("conv", precision="float32")
