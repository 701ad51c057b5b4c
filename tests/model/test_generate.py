"""Tests of generated tokens: greedy, sampled, compiled once, and errors."""

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  generate,
  generation,
)

V, POSITIONS, STEPS = 11, 8, 5
ROWS = 4096  # of samples
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=8,
  pairs=2,
  positions=POSITIONS,
)
PROMPT_BT = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]], jnp.int32)


def make() -> LM:
  """Return a model whose logits differ by about 1."""
  model = LM(CONFIG, rngs=nnx.Rngs(0))
  model.token_embedding[...] = model.token_embedding[...] * 20
  model.position_embedding[...] = model.position_embedding[...] * 50
  return model


@pytest.mark.quick
def test_greedy_is_the_argmax_of_the_whole_token_by_token() -> None:
  model = make()
  whole = jax.jit(lambda tokens_BT: model(tokens_BT))
  T = PROMPT_BT.shape[1]
  # Causality lets one shape serve every length.
  row_BT = jnp.pad(PROMPT_BT, ((0, 0), (0, STEPS)))
  for t in range(T, T + STEPS):
    logits_BTV = whole(row_BT[:, :-1])
    row_BT = row_BT.at[:, t].set(jnp.argmax(logits_BTV[:, t - 1], axis=-1))
  found = generate(model, PROMPT_BT, steps=STEPS)
  assert (found.shape, found.dtype) == ((2, STEPS), jnp.int32)
  np.testing.assert_array_equal(found, row_BT[:, T:])
  assert len(np.unique(found)) > 1  # not one token over and over


def test_the_likeliest_one_of_top_k_is_greedy() -> None:
  model = make()
  greedy = generate(model, PROMPT_BT, steps=STEPS)
  key = jax.random.key(1)
  sampled = generate(
    model, PROMPT_BT, steps=STEPS, temperature=2.0, top_k=1, key=key
  )
  np.testing.assert_array_equal(sampled, greedy)


def test_samples_follow_the_softmax() -> None:
  model, temperature = make(), 2.0
  prompt_BT = jnp.tile(PROMPT_BT[:1], (ROWS, 1))
  sample = lambda key, **kwargs: np.asarray(
    generate(
      model, prompt_BT, steps=STEPS, temperature=temperature, key=key, **kwargs
    )
  )
  tokens_BS = sample(jax.random.key(1))
  p_V = np.asarray(jax.nn.softmax(model(PROMPT_BT[:1])[0, -1] / temperature))
  frequency_V = np.bincount(tokens_BS[:, 0], minlength=V) / ROWS
  # Five standard deviations of a frequency over that many rows.
  assert (np.abs(frequency_V - p_V) < 5 * np.sqrt(p_V / ROWS)).all()
  assert p_V.max() < 0.9  # a greedy choice would fail
  np.testing.assert_array_equal(sample(jax.random.key(1)), tokens_BS)
  assert (sample(jax.random.key(2)) != tokens_BS).any()
  three = set(np.argsort(p_V)[-3:])
  assert set(sample(jax.random.key(1), top_k=3)[:, 0]) == three


def test_each_step_has_its_own_randomness() -> None:
  model = make()
  model.token_embedding[...] = model.token_embedding[...] * 0  # uniform
  prompt_BT = jnp.tile(PROMPT_BT[:1], (ROWS, 1))
  found = generate(
    model, prompt_BT, steps=STEPS, temperature=1.0, key=jax.random.key(1)
  )
  for t in range(1, STEPS):  # alike by chance in 1 of 11 rows
    assert (found[:, t] == found[:, 0]).mean() < 0.5


def test_a_token_past_the_table_is_named() -> None:
  model = make()
  last = POSITIONS - PROMPT_BT.shape[1] + 1  # the last token needs no place
  assert generate(model, PROMPT_BT, steps=last).shape == (2, last)
  with pytest.raises(ValueError, match=r"position table has 8 .*positions"):
    generate(model, PROMPT_BT, steps=last + 1)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(prompt=PROMPT_BT[0]), r"prompt has shape \(4,\)"),
    (dict(prompt=PROMPT_BT[:, :0]), r"prompt has shape \(2, 0\)"),
    (dict(steps=0), "steps=0"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=1.0, key=None), "`key`"),
    (dict(top_k=0), "top_k=0"),
    (dict(top_k=V + 1), "top_k=12: expected None or 1 to 11"),
    (dict(top_k=3), "top_k=3 samples: expected temperature > 0"),
    (dict(steps=2.0), "steps=2.0"),
    (dict(temperature=1e-46), "temperature=1e-46"),
  ],
)
def test_a_wrong_argument_is_named(wrong, message) -> None:
  fits = dict(prompt=PROMPT_BT, steps=1, key=jax.random.key(0))
  with pytest.raises(ValueError, match=message):
    generate(make(), **(fits | wrong))


def test_compiles_once_for_a_shape(monkeypatch) -> None:
  chex.clear_trace_counter()
  for name in ("prefill", "step"):
    once = chex.assert_max_traces(getattr(LM, name), n=1)
    monkeypatch.setattr(LM, name, once)
  model, steps = make(), 3  # a length that no earlier test has compiled
  compiled = generation._compiled
  before = compiled.cache_info().misses
  for seed, temperature in ((1, 1.0), (2, 0.5)):
    model.token_embedding[...] = model.token_embedding[...] + 1
    key = jax.random.key(seed)
    generate(model, PROMPT_BT, steps=steps, temperature=temperature, key=key)
  again = make()  # another model of the same config
  generate(again, PROMPT_BT, steps=steps, temperature=1.0, key=key)
  assert compiled.cache_info().misses == before + 1
  run = compiled(nnx.split(model)[0], steps, None, True)
  assert run._cache_size() == 1
