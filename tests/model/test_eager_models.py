"""Calls of a model outside `jax.jit` compile once."""

import dataclasses

from compilations import compilations
from flax import nnx
import jax
import jax.numpy as jnp
from mixer_subject import B, T
import model_cases
import numpy as np
import pytest

from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  generate,
)

V = 11
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=8,
  pairs=2,
)
TOKENS_BT = jnp.asarray(
  np.random.default_rng(1).integers(V, size=(B, T), dtype=np.int32)
)


def _calls(config: ModelConfig) -> dict:
  """Return eager calls of a language model, by name."""
  graph, params = model_cases.make(config)
  params = jax.tree.map(jnp.asarray, params)
  model = nnx.merge(graph, params)
  loss = lambda params: nnx.merge(graph, params)(TOKENS_BT).sum()
  state = model.init_state(B)
  return {
    "call": lambda: model(TOKENS_BT),
    "documents": lambda: model(TOKENS_BT, segment_ids=TOKENS_BT),
    "positions": lambda: model(
      TOKENS_BT, positions_to_predict=TOKENS_BT[:, :2]
    ),
    "gradient": lambda: jax.grad(loss)(params),
    "init_state": lambda: model.init_state(B),
    "prefill": lambda: model.prefill(TOKENS_BT, state),
    "step": lambda: model.step(TOKENS_BT[:, 0], state),
  }


@pytest.mark.parametrize("changes", [{}, {"scan_layers": False}])
def test_a_language_model_compiles_nothing_anew(changes) -> None:
  config = dataclasses.replace(CONFIG, **changes)
  for name, call in _calls(config).items():
    first = jax.block_until_ready(call())
    with compilations() as count:
      again = jax.block_until_ready(call())
    assert not count, (name, count)
    for x, y in zip(
      jax.tree.leaves(first), jax.tree.leaves(again), strict=True
    ):
      np.testing.assert_array_equal(x, y)


def test_a_mixer_with_a_list_still_runs() -> None:
  """A program is kept under its model's structure, and a list has no hash."""
  model = LM(CONFIG, rngs=nnx.Rngs(0))
  wanted_BTV = model(TOKENS_BT)
  model.pairs.first.mixer.notes = {"of": "a user"}
  np.testing.assert_allclose(model(TOKENS_BT), wanted_BTV, rtol=1e-6)
  assert generate(model, TOKENS_BT, steps=1).shape == (len(TOKENS_BT), 1)
