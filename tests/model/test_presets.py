"""Tests of the paper's models: parameter counts of its tables, and sizes."""

from flax import nnx
import jax
from paper_tables import PARAMETERS
import pytest

from rebased_jax import (
  LM,
  BaseConvConfig,
  MambaConfig,
  ModelConfig,
  parameter_count,
  presets,
)

TABLE_1 = {
  256: {16: 142_192, 24: 214_056, 32: 285_664, 48: 431_568},
  2048: {16: 170_864, 24: 257_064, 32: 343_008, 48: 517_584},
}
# Above Based: γ and β of 192 numbers, for queries and keys.
EXTRA = {
  "based": 0,
  "x2": 0,
  "norm": 0,
  "gamma": 384,
  "gamma-beta": 768,
  "rebased": 768,
}
_MODELS = presets.make_models()


def count(config: ModelConfig) -> int:
  make = lambda: nnx.state(LM(config, rngs=nnx.Rngs(0)), nnx.Param)
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(make)))


def test_the_tables_have_28_and_3_models() -> None:
  assert _MODELS.keys() == PARAMETERS.keys()
  assert len(PARAMETERS) == 28 + 3


@pytest.mark.parametrize(("name", "wanted"), PARAMETERS.items())
def test_parameter_counts_of_tables_4_and_9(name, wanted) -> None:
  assert count(_MODELS[name]) == wanted


@pytest.mark.quick
@pytest.mark.parametrize("name", presets.VARIANTS)
@pytest.mark.parametrize("length", TABLE_1)
def test_parameter_counts_of_table_1(length, name) -> None:
  system = presets.hybrid(presets.VARIANTS[name])
  for width, wanted in TABLE_1[length].items():
    config = presets.mqar(system, width=width, length=length)
    assert count(config) == wanted + EXTRA[name]


def test_a_count_is_of_the_model_that_is_made() -> None:
  config = presets.mqar(
    presets.SYSTEMS["mamba"], width=8, length=4, vocab_size=11
  )
  assert parameter_count(LM(config, rngs=nnx.Rngs(0))) == count(config)


def test_the_layers_of_each_system() -> None:
  """Hybrids have the short convolution first, the others one mixer twice."""
  for name, system in presets.SYSTEMS.items():
    is_hybrid = name.startswith("conv-") or name in ("based", "rebased")
    assert (system.first == BaseConvConfig()) == is_hybrid
    assert is_hybrid or system.first == system.second
    assert (system.block == "mamba") == (name == "mamba")
  for name in ("attention", "rwkv", "hyena"):  # Figure 7's pairs
    pair, hybrid = presets.SYSTEMS[name], presets.SYSTEMS[f"conv-{name}"]
    assert pair.second == hybrid.second
  for name in ("based", "rebased"):
    double = presets.SYSTEMS[f"double-{name}"]
    assert double.first == double.second == presets.SYSTEMS[name].second


def test_sizes_that_a_parameter_count_does_not_show() -> None:
  for name, config in _MODELS.items():
    mamba = isinstance(config.second, MambaConfig)
    assert config.dropout == (0.0 if mamba else 0.1), name
    assert config.vocab_size == (50304 if "-9-" in name else 8192)
    if "attention" in name:
      assert config.second.heads == (12 if "-9-" in name else 1)
    if name in ("table-9-based", "table-9-rebased"):
      assert (config.second.heads, config.second.features) == (64, 16)
