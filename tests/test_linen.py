"""Flax Linen: the same modules, names and values."""

import functools

from flax import linen, nnx
import jax
import jax.numpy as jnp
from mixer_subject import compiled
import numpy as np
import pytest

from rebased_jax import (
  LM,
  MIXER_CONFIGS,
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  ModelConfig,
  ReBasedConfig,
  RWKVConfig,
)
import rebased_jax.linen
from rebased_jax.mixers import base

B, T, D = 2, 6, 8
SIZES = dict(heads=2, features=4)
CONFIG = ModelConfig(
  conv=BaseConvConfig(),
  mixer=ReBasedConfig(**SIZES),
  vocab_size=11,
  width=D,
  positions=T,
  dropout=0.5,
)
TOKENS_BT = jax.random.randint(jax.random.key(1), (B, T), 0, 11)
X_BTD = jax.random.normal(jax.random.key(2), (B, T, D))
# The same program up to the compiler's choices: roundings of 6e-8.
assert_close = functools.partial(
  np.testing.assert_allclose, rtol=1e-5, atol=1e-5
)


def of_nnx(module) -> dict:
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def shapes(params) -> dict:
  pairs = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in pairs
  }


def test_the_model() -> None:
  model = LM(CONFIG, rngs=nnx.Rngs(3))
  bridged = rebased_jax.linen.lm(CONFIG)
  fresh = bridged.init(jax.random.key(0), TOKENS_BT)["params"]
  params = of_nnx(model)
  assert shapes(fresh) == shapes(params)
  assert "pairs/mixer/mixer/project/q/kernel" in shapes(fresh)
  apply = compiled(lambda p, **kwargs: bridged.apply({"params": p}, **kwargs))
  logits_BTV = apply(params, tokens=TOKENS_BT)
  assert_close(logits_BTV, model(TOKENS_BT))
  assert (apply(fresh, tokens=TOKENS_BT) != logits_BTV).any()

  key = jax.random.key(4)
  dropped_BTV = apply(params, tokens=TOKENS_BT, dropout_key=key)
  assert_close(dropped_BTV, model(TOKENS_BT, dropout_key=key))
  assert (dropped_BTV != logits_BTV).any()

  loss = lambda p: jnp.square(bridged.apply({"params": p}, TOKENS_BT)).sum()
  graph, state = nnx.split(model)
  wanted = jax.grad(lambda s: jnp.square(nnx.merge(graph, s)(TOKENS_BT)).sum())(
    state
  )
  found = compiled(jax.grad(loss))(params)
  assert shapes(found) == shapes(nnx.to_pure_dict(wanted))
  # Relative to each array: a gradient sums over all the positions.
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_from_nnx_to_linen_and_back() -> None:
  model = LM(CONFIG, rngs=nnx.Rngs(3))
  bridged = rebased_jax.linen.lm(CONFIG)
  trained = bridged.init(jax.random.key(0), TOKENS_BT)["params"]
  before = jax.tree.map(np.asarray, trained)
  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, trained)
  nnx.update(model, state)
  jax.tree.map(np.testing.assert_array_equal, of_nnx(model), before)
  assert_close(model(TOKENS_BT), bridged.apply({"params": trained}, TOKENS_BT))


MIXERS = [
  ReBasedConfig(**SIZES),
  BasedConfig(**SIZES),
  BaseConvConfig(),
  RWKVConfig(wkv_dtype="float32"),
  AttentionConfig(heads=2),
  HyenaConfig(length=T),
  MambaConfig(state=3),
]


def test_every_mixer_is_listed() -> None:
  assert {type(config) for config in MIXERS} == set(MIXER_CONFIGS)


@pytest.mark.parametrize(
  "config", MIXERS, ids=lambda config: type(config).__name__
)
def test_a_mixer_in_a_module_of_ones_own(config) -> None:
  class Mine(linen.Module):
    @linen.compact
    def __call__(self, x_BTD):
      x_BTD = linen.Dense(D)(x_BTD)
      return rebased_jax.linen.mixer(config, D, name="mixer")(x_BTD)

  mine = Mine()
  params = mine.init(jax.random.key(0), X_BTD)["params"]
  mixer = config.make(base.Site(D), rngs=nnx.Rngs(5))
  assert shapes(params["mixer"]) == shapes(of_nnx(mixer))
  params = {**params, "mixer": of_nnx(mixer)}
  dense = params["Dense_0"]
  h_BTD = X_BTD @ dense["kernel"] + dense["bias"][None, None]
  found = jax.jit(mine.apply)({"params": params}, X_BTD)
  assert_close(found, mixer(h_BTD))
  loss = lambda p: jnp.square(mine.apply({"params": p}, X_BTD)).sum()
  grads = compiled(jax.grad(loss))(params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all() and (grad != 0).any(), path


def test_a_mixer_takes_segment_ids_and_a_dtype() -> None:
  config = ReBasedConfig(**SIZES)
  bridged = rebased_jax.linen.mixer(config, D, dtype="bfloat16")
  x_BTD = X_BTD.astype(jnp.bfloat16)
  params = bridged.init(jax.random.key(0), x_BTD)["params"]
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  ids_BT = jnp.asarray([[1] * 3 + [2] * 3] * B)
  call = lambda x: bridged.apply({"params": params}, x, segment_ids=ids_BT)
  y_BTD = call(x_BTD)
  assert y_BTD.dtype == jnp.bfloat16
  spoilt_BTD = call(x_BTD.at[:, :3].set(jnp.nan))
  np.testing.assert_array_equal(spoilt_BTD[:, 3:], y_BTD[:, 3:])
