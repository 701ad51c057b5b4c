"""Tests of the Linen modules: parameter names, values and gradients."""

import functools

from flax import linen, nnx
import jax
import jax.numpy as jnp
from mixer_registry import MIXERS, ONE_OF_EACH
from mixer_subject import split
import numpy as np
import pytest

from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  Site,
)
import rebased_jax.linen

B, T, D = 2, 6, 8
SIZES = dict(heads=2, features=4)
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(**SIZES),
  vocab_size=11,
  width=D,
  positions=T,
  dropout=0.5,
)
RNG = np.random.default_rng(1)
TOKENS_BT = RNG.integers(11, size=(B, T), dtype=np.int32)
X_BTD = RNG.normal(size=(B, T, D)).astype(np.float32)
# The same equations, compiled differently: roundings of 6e-8.
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


def test_the_language_model_equals_the_nnx_one() -> None:
  graph, state = split(lambda: LM(CONFIG, rngs=nnx.Rngs(3)))
  model = jax.jit(lambda s, **kwargs: nnx.merge(graph, s)(TOKENS_BT, **kwargs))
  bridged = rebased_jax.linen.lm(CONFIG)
  fresh = jax.jit(bridged.init)(jax.random.key(0), TOKENS_BT)["params"]
  params = nnx.to_pure_dict(state)
  assert shapes(fresh) == shapes(params)
  assert "pairs/second/mixer/project/q/kernel" in shapes(fresh)
  apply = jax.jit(lambda p, **kwargs: bridged.apply({"params": p}, **kwargs))
  logits_BTV = apply(params, tokens=TOKENS_BT)
  assert_close(logits_BTV, model(state))
  assert (apply(fresh, tokens=TOKENS_BT) != logits_BTV).any()

  run = lambda *args, method: bridged.apply(
    {"params": params}, *args, method=method
  )
  first_BV, past = run(
    TOKENS_BT[:, :-1], run(B, method="init_state"), method="prefill"
  )
  assert_close(first_BV, logits_BTV[:, -2])
  last_BV, past = run(TOKENS_BT[:, -1], past, method="step")
  assert_close(last_BV, logits_BTV[:, -1])
  np.testing.assert_array_equal(past.position_B, T)

  key = jax.random.key(4)
  dropped_BTV = apply(params, tokens=TOKENS_BT, dropout_key=key)
  wanted_BTV = model(state, dropout_key=key)
  assert_close(dropped_BTV, wanted_BTV)
  assert (dropped_BTV != logits_BTV).any()

  loss = lambda p: jnp.square(bridged.apply({"params": p}, TOKENS_BT)).sum()
  own = lambda s: jnp.square(nnx.merge(graph, s)(TOKENS_BT)).sum()
  wanted = jax.jit(jax.grad(own))(state)
  found = jax.jit(jax.grad(loss))(params)
  assert shapes(found) == shapes(nnx.to_pure_dict(wanted))
  # Relative to each array: a gradient sums over all the positions.
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    x, y = jax.device_get((x, y))
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_parameters_move_from_nnx_to_linen_and_back() -> None:
  model = LM(CONFIG, rngs=nnx.Rngs(3))
  bridged = rebased_jax.linen.lm(CONFIG)
  trained = bridged.init(jax.random.key(0), TOKENS_BT)["params"]
  before = jax.tree.map(np.asarray, trained)
  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, trained)
  nnx.update(model, state)
  jax.tree.map(np.testing.assert_array_equal, of_nnx(model), before)
  assert_close(model(TOKENS_BT), bridged.apply({"params": trained}, TOKENS_BT))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_mixer_inside_another_linen_module(name) -> None:
  config = MIXERS[name].config

  class Mine(linen.Module):
    @linen.compact
    def __call__(self, x_BTD):
      x_BTD = linen.Dense(D)(x_BTD)
      return rebased_jax.linen.mixer(config, D, name="mixer")(x_BTD)

  mine = Mine()
  params = jax.jit(mine.init)(jax.random.key(0), X_BTD)["params"]
  fresh = lambda: config.make(Site(D), rngs=nnx.Rngs(5))
  graph, state = nnx.split(nnx.eval_shape(fresh))
  assert shapes(params["mixer"]) == shapes(nnx.to_pure_dict(state))
  nnx.replace_by_pure_dict(state, params["mixer"])
  dense = jax.device_get(params["Dense_0"])
  h_BTD = X_BTD @ dense["kernel"] + dense["bias"][None, None]

  def loss(params):
    y_BTD = mine.apply({"params": params}, X_BTD)
    return jnp.square(y_BTD).sum(), y_BTD

  grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
  wanted = jax.jit(lambda s: nnx.merge(graph, s)(h_BTD))(state)
  assert_close(found, wanted)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    grad = np.asarray(grad)
    assert np.isfinite(grad).all() and (grad != 0).any(), path


class Twice(linen.Module):
  """Two mixers, which decode: a call reads a row, and `step` one token."""

  def setup(self):
    make = functools.partial(rebased_jax.linen.mixer, BaseConvConfig(), D)
    self.mixers = [make(), make()]

  def __call__(self, x_BTD):
    states = []
    for mixer in self.mixers:
      x_BTD, state = mixer.prefill(x_BTD, mixer.init_state(B))
      states.append(state)
    return x_BTD, states

  def step(self, x_BD, states):
    for mixer, state in zip(self.mixers, states, strict=True):
      x_BD, _ = mixer.step(x_BD, state)
    return x_BD


def test_mixers_of_a_linen_module_decode() -> None:
  module = Twice()
  variables = module.init(jax.random.key(0), X_BTD)
  y_BTD, _ = module.apply(variables, X_BTD)
  _, states = module.apply(variables, X_BTD[:, :-1])
  y_BD = module.apply(variables, X_BTD[:, -1], states, method="step")
  assert_close(y_BD, y_BTD[:, -1])


def test_a_mixer_without_a_name_has_that_of_its_class() -> None:
  class Mine(linen.Module):
    @linen.compact
    def __call__(self, x_BTD):
      return rebased_jax.linen.mixer(BaseConvConfig(), D)(x_BTD)

  variables = jax.eval_shape(Mine().init, jax.random.key(0), X_BTD)
  assert set(variables["params"]) == {"Mixer_0"}
  wrong = variables["params"]["Mixer_0"]
  apply = rebased_jax.linen.mixer(BaseConvConfig(), D).apply
  for params, problem in (
    ({**wrong, "gate": {}}, "gate.bias is missing"),
    ({**wrong, "extra": X_BTD}, "extra is not expected"),
    ({**wrong, "bias": X_BTD}, r"bias has shape \(2, 6, 8\), not \(8,\)"),
    ({}, "bias is missing"),
  ):
    with pytest.raises(ValueError, match=f"^Mixer: parameter {problem}: exp"):
      apply({"params": params}, X_BTD)


def test_a_mixer_takes_segment_ids_and_a_dtype() -> None:
  config = ReBasedConfig(**SIZES)
  bridged = rebased_jax.linen.mixer(config, D, dtype="bfloat16")
  x_BTD = X_BTD.astype(jnp.bfloat16)
  params = jax.jit(bridged.init)(jax.random.key(0), x_BTD)["params"]
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  ids_BT = np.array([[1] * 3 + [2] * 3] * B, np.int32)
  apply = jax.jit(functools.partial(bridged.apply, segment_ids=ids_BT))
  call = lambda x_BTD: np.asarray(apply({"params": params}, x_BTD))
  y_BTD = call(x_BTD)
  assert y_BTD.dtype == jnp.bfloat16
  x_BTD[:, :3] = np.nan
  spoilt_BTD = call(x_BTD)
  np.testing.assert_array_equal(spoilt_BTD[:, 3:], y_BTD[:, 3:])
