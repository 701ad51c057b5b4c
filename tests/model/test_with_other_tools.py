"""Models in the hands of other tools: tables, export, donation, scalars."""

import dataclasses
import json

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp
from mixer_registry import MIXERS, ONE_OF_EACH
import numpy as np
import pytest

from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  Site,
  presets,
)

V, T = 11, 6
SMALL = dict(vocab_size=V, width=24, positions=T)
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  mlp_width=12,
  pairs=2,
  **SMALL,
)
TOKENS_BT = np.random.default_rng(1).integers(V, size=(2, T), dtype=np.int32)


def _rows(model: LM) -> list[str]:
  """Return the lines of a model's table."""
  table = nnx.tabulate(model, TOKENS_BT, console_kwargs={"width": 300})
  return table.splitlines()


def test_a_table_names_every_layer_and_harms_no_model() -> None:
  model = LM(CONFIG, rngs=nnx.Rngs(0))
  wanted_BTV = model(TOKENS_BT)
  table = _rows(model)
  for path in ("pairs/first/mixer/gate", "pairs/second/mixer/project/q"):
    assert any(f" {path}/product " in line for line in table), path
  assert _rows(model) == table  # a program of the first is not taken
  for other in (model, LM(CONFIG, rngs=nnx.Rngs(0))):
    np.testing.assert_array_equal(other(TOKENS_BT), wanted_BTV)


@pytest.mark.parametrize("name", ["mamba", "conv-rwkv", "attention", "hyena"])
def test_a_table_of_other_systems(name) -> None:
  system = presets.SYSTEMS[name]
  config = ModelConfig(**system._asdict(), **SMALL)
  table = _rows(LM(config, rngs=nnx.Rngs(0)))
  assert any(" pairs/second/mixer " in line for line in table)


def _with_length(name: str):
  """Return a mixer's config for rows of T tokens."""
  config = MIXERS[name].config
  if hasattr(config, "length"):
    return dataclasses.replace(config, length=T)
  return config


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_fresh_state_can_be_donated(name) -> None:
  """No two arrays share memory, and both calls give the same."""
  mixer = _with_length(name).make(Site(8), rngs=nnx.Rngs(0))
  graph, params = nnx.split(mixer)
  state = mixer.init_state(2)
  places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len(set(places)) == len(places)
  step = lambda params, x_BD, state: nnx.merge(graph, params).step(x_BD, state)
  x_BD = jnp.ones((2, 8))
  donating = jax.jit(step, donate_argnums=2)
  found = donating(params, x_BD, state)
  wanted = jax.jit(step)(params, x_BD, mixer.init_state(2))
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_exported_mixer_takes_any_batch_and_length(name) -> None:
  mixer = _with_length(name).make(Site(8), rngs=nnx.Rngs(0))
  graph, params = nnx.split(mixer)
  call = jax.jit(lambda params, x_BTD: nnx.merge(graph, params)(x_BTD))
  open_B, open_T = export.symbolic_shape("B, T")
  shape = jax.ShapeDtypeStruct((open_B, open_T, 8), jnp.float32)
  sizes = [(1, T), (3, 1), (2, 37)]  # 37: one token more than a chunk
  if getattr(mixer, "longest_row", None) is not None:
    with pytest.raises(
      NotImplementedError, match="length T of a row is left open"
    ):
      export.export(call)(params, shape)
    shape = jax.ShapeDtypeStruct((open_B, T, 8), jnp.float32)
    sizes = [(1, T), (3, T)]
  exported = export.export(call)(params, shape)
  for rows, length in sizes:
    rng = np.random.default_rng(rows)
    x_BTD = rng.normal(size=(rows, length, 8)).astype(np.float32)
    np.testing.assert_allclose(
      # The sums of a few terms of size 1, in another order.
      exported.call(params, x_BTD),
      call(params, x_BTD),
      rtol=1e-5,
      atol=1e-6,
    )


@pytest.mark.parametrize("library", [np, jnp])
def test_options_may_be_scalars_of_numpy_and_jax(library) -> None:
  mixer = ReBasedConfig(
    heads=library.int32(2),
    features=library.int8(4),
    eps=library.float32(0.5),
    use_beta=library.bool_(False),
  )
  config = dataclasses.replace(
    CONFIG,
    second=mixer,
    vocab_size=library.int32(V),
    width=library.int32(24),
    dropout=library.float32(0.5),
    scan_layers=library.bool_(True),
  )
  plain = dataclasses.replace(
    CONFIG,
    second=ReBasedConfig(heads=2, features=4, eps=0.5, use_beta=False),
    dropout=0.5,
    scan_layers=True,
  )
  assert config == plain and hash(config) == hash(plain)
  json.dumps(dataclasses.asdict(config))  # as a run's config is stored
  found_BTV = LM(config, rngs=nnx.Rngs(0))(TOKENS_BT)
  np.testing.assert_array_equal(
    found_BTV, LM(plain, rngs=nnx.Rngs(0))(TOKENS_BT)
  )
  assert Site(library.int32(8), layers=library.int8(2)) == Site(8, layers=2)
