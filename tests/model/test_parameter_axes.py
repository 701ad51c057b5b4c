"""Names of parameters' axes, for users of NNX and of Linen."""

from flax import linen, nnx
import jax
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest

from rebased_jax import (
  LM,
  AttentionConfig,
  BaseConvConfig,
  MambaConfig,
  ModelConfig,
  ReBasedConfig,
  RWKVConfig,
  Site,
  linen as our_linen,
  name_parameter_axes,
)

CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=8),
  vocab_size=32,
  width=16,
  mlp_width=32,
)
RULES = (
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
)
TOKENS_BT = np.arange(6, dtype=np.int32).reshape(2, 3)


def _specs(model) -> dict:
  specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
  return {
    "/".join(map(str, path)): spec.get_value()
    for path, spec in nnx.to_flat_state(specs)
  }


def test_names_of_a_model() -> None:
  model = nnx.eval_shape(lambda: LM(CONFIG, rngs=nnx.Rngs(0)))
  specs = _specs(name_parameter_axes(model))
  assert specs["token_embedding"] == P("vocab", "embed")
  up, q = "pairs/second/mlp/up/kernel", "pairs/second/mixer/project/q/kernel"
  assert specs[up] == P(None, "embed", "mlp")
  assert specs[q] == P(None, "embed", "heads")
  assert specs["pairs/second/mixer/query_affine/gamma"] == P(None, "heads")
  with nnx.logical_axis_rules(RULES):
    specs = _specs(model)
  assert specs["token_embedding"] == P("tensor", "fsdp")
  assert specs[up] == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
  ("config", "path", "names"),
  [
    (AttentionConfig(heads=2), "qkv/kernel", P("embed", "heads")),
    (BaseConvConfig(), "gate/kernel", P("embed", "heads")),
    (MambaConfig(), "A_log", P("heads", None)),
    (RWKVConfig(), "decay", P("heads")),
  ],
  ids=lambda x: type(x).__name__,
)
def test_names_of_a_mixer_alone(config, path, names) -> None:
  make = lambda: config.make(Site(16), rngs=nnx.Rngs(0))
  specs = _specs(name_parameter_axes(nnx.eval_shape(make)))
  found = {name: spec for name, spec in specs.items() if name.endswith(path)}
  assert list(found.values()) == [names], specs


def test_named_parameters_compute_the_same() -> None:
  """Under both kinds of mesh axes, and sharded as the names say."""
  model = LM(CONFIG, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  wanted = model(TOKENS_BT)
  named_graph, named = nnx.split(name_parameter_axes(model))
  for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
      found = jax.jit(lambda p: nnx.merge(named_graph, p)(TOKENS_BT))(named)
    np.testing.assert_array_equal(found, wanted)
    with nnx.logical_axis_rules(RULES):
      shardings = nnx.get_named_sharding(named, mesh)
    placed = jax.device_put(named, shardings)
    embedding = placed["token_embedding"].get_value()
    assert embedding.sharding.spec == P("tensor", "fsdp")


def test_linen_boxes() -> None:
  module = our_linen.lm(CONFIG, partitioned=True)
  variables = jax.eval_shape(module.init, jax.random.key(0), TOKENS_BT)
  specs = linen.get_partition_spec(variables)["params"]
  assert specs["token_embedding"] == P("vocab", "embed")
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
  shardings = linen.logical_to_mesh_sharding(specs, mesh, RULES)
  assert shardings["token_embedding"].spec == P("tensor", "fsdp")
  plain = jax.eval_shape(
    our_linen.lm(CONFIG).init, jax.random.key(0), TOKENS_BT
  )
  unboxed = linen.unbox(variables)
  assert jax.tree.structure(unboxed) == jax.tree.structure(plain)
  out = jax.eval_shape(module.apply, variables, TOKENS_BT)
  assert out.shape == (2, 3, 32)
