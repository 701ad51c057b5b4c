"""Tests of dropout by train() and eval(), beside the explicit key."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest

from rebased_jax import (
  LM,
  Attention,
  AttentionConfig,
  BaseConvConfig,
  ModelConfig,
  load,
  save,
)
from rebased_jax.evaluate import loglikelihood

B, T, V, D = 2, 6, 7, 8
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=AttentionConfig(heads=2, dropout=0.5, length=T),
  vocab_size=V,
  width=D,
  dropout=0.5,
)
TOKENS_BT = np.random.default_rng(1).integers(V, size=(B, T), dtype=np.int32)
X_BTD = np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)
equal = np.testing.assert_array_equal


@functools.cache
def _split():
  make = nnx.jit(lambda: LM(CONFIG, rngs=nnx.Rngs(0, dropout=1)))
  return nnx.split(make())


def model() -> LM:
  """Return a fresh model with a stream of keys."""
  graph, state = _split()
  return nnx.merge(graph, jax.tree.map(lambda x: x, state))


@nnx.jit
def logits(model):
  return model(TOKENS_BT)


def test_the_mode_decides_where_no_key_is_given() -> None:
  lm = model()
  plain = logits(lm)
  lm.train()
  first, second = logits(lm), logits(lm)
  assert (first != plain).any()
  assert (second != first).any()  # the stream has moved on
  lm.eval()
  equal(logits(lm), plain)
  for config, has in (
    (CONFIG, True),
    (dataclasses.replace(CONFIG, dropout=0.0), True),  # the mixer's alone
    (dataclasses.replace(CONFIG, second=BaseConvConfig()), True),
    (dataclasses.replace(CONFIG, second=BaseConvConfig(), dropout=0.0), False),
  ):
    abstract = nnx.eval_shape(lambda c=config: LM(c, rngs=nnx.Rngs(0)))
    assert abstract.has_dropout == has
  view = nnx.view(lm, deterministic=False)
  assert (logits(view) != plain).any()
  assert lm.deterministic


def test_an_explicit_key_wins_in_both_modes() -> None:
  run = nnx.jit(lambda m: m(TOKENS_BT, dropout_key=jax.random.key(3)))
  lm = model()
  wanted = run(lm)
  lm.train()
  equal(run(lm), wanted)
  equal(lm.dropout_stream.count[...], 0)


def test_what_is_no_training_call_has_no_dropout(tmp_path) -> None:
  lm = model()
  log_p_BTV = np.asarray(jax.nn.log_softmax(logits(lm)))
  lm.train()
  for row, text in enumerate(loglikelihood(lm, list(TOKENS_BT), rows=B)):
    log_p_T = log_p_BTV[row, np.arange(T - 1), TOKENS_BT[row, 1:]]
    np.testing.assert_allclose(text.total, log_p_T.sum(), rtol=1e-5)
  state = lm.init_state(B)
  logits_BTV, _ = lm.prefill(TOKENS_BT, state, all_positions=True)
  log_q_BTV = jax.nn.log_softmax(logits_BTV)
  np.testing.assert_allclose(log_q_BTV, log_p_BTV, rtol=1e-4, atol=1e-5)
  assert jax.eval_shape(lm.attention_matrix, TOKENS_BT).shape == (B, 2, T, T)
  save(lm, tmp_path / "saved")
  loaded = load(tmp_path / "saved")
  assert loaded.deterministic
  equal(loaded.token_embedding[...], lm.token_embedding[...])


def test_a_model_without_a_stream_of_keys() -> None:
  make = lambda rngs: nnx.split(LM(CONFIG, rngs=rngs))[1]
  with_stream = jax.eval_shape(lambda: make(nnx.Rngs(0, dropout=1)))
  without = jax.eval_shape(lambda: make(nnx.Rngs(0)))
  assert len(jax.tree.leaves(with_stream)) == len(jax.tree.leaves(without)) + 2
  lm = nnx.eval_shape(lambda: LM(CONFIG, rngs=nnx.Rngs(0)))
  lm.train()
  with pytest.raises(
    ValueError, match="LM is in training mode, and the call ha"
  ):
    lm(TOKENS_BT)


def test_a_layer_in_a_module_of_flax() -> None:
  class Mine(nnx.Module):
    def __init__(self, rngs):
      self.attention = Attention(D, CONFIG.second, rngs=rngs)
      self.dropout = nnx.Dropout(0, rngs=rngs)

    def __call__(self, x_BTD):
      return self.dropout(self.attention(x_BTD))

  mine = Mine(nnx.Rngs(0, dropout=1))
  run = nnx.jit(lambda mine: mine(X_BTD))
  plain = run(mine)
  mine.train()
  assert (run(mine) != plain).any()
  mine.eval()
  equal(run(mine), plain)
  other = Attention(D, CONFIG.second, rngs=nnx.Rngs(0))
  other.train()
  with pytest.raises(ValueError, match="Attention is in training mode"):
    other(X_BTD)


def test_a_model_without_dropout_needs_no_key() -> None:
  conv = BaseConvConfig()
  config = ModelConfig(first=conv, second=conv, vocab_size=V, width=D)
  lm = LM(config, rngs=nnx.Rngs(0, dropout=1))
  assert lm.dropout_stream is None
  plain = logits(lm)
  lm.train()
  equal(logits(lm), plain)
