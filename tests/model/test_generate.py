"""Tests of generated tokens: greedy, sampled, compiled once, and errors."""

import chex
from compilations import compilations
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
    (dict(steps=True), "steps=True"),
    (dict(top_k=2.0, temperature=1.0), "top_k=2.0"),
    (
      dict(prompt=PROMPT_BT.astype(bool)),
      "prompt has dtype bool: expected integers",
    ),
    (
      dict(prompt=PROMPT_BT.astype(float)),
      "prompt has dtype float32: expected integers",
    ),
    (dict(prompt=[[1, 2]]), "prompt is a list: expected an array"),
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
  model, steps = make(), 3
  generation._reader.cache_clear()
  generation._writer.cache_clear()
  for seed, temperature in ((1, 1.0), (2, 0.5)):
    model.token_embedding[...] = model.token_embedding[...] + 1
    key = jax.random.key(seed)
    generate(model, PROMPT_BT, steps=steps, temperature=temperature, key=key)
  again = make()  # another model of the same config
  generate(again, PROMPT_BT, steps=steps, temperature=1.0, key=key)
  for cache in (generation._reader, generation._writer):
    assert cache.cache_info().misses == 1
  graph = nnx.split(model)[0]
  choice = generation._Choice(sample=True, top_k=None)
  assert generation._reader(graph, 2).read._cache_size() == 1
  assert generation._writer(graph, 2, 16, choice, None)._cache_size() == 1


def test_prompts_of_all_lengths_share_programs() -> None:
  """Read a prompt of 7 tokens as 4, 2 and 1, and so every shorter one too."""
  model = make()
  row_BT = jnp.concatenate([PROMPT_BT, PROMPT_BT[:, ::-1]], axis=1)
  generation._reader.cache_clear()
  generate(model, row_BT[:, :7], steps=1)
  reader = generation._reader(nnx.split(model)[0], 2)
  assert reader.read._cache_size() == 3
  whole = jax.jit(lambda tokens_BT: model(tokens_BT))
  logits_BTV = np.asarray(whole(row_BT))
  key, temperature = jax.random.key(3), 2.0
  for T in range(1, 8):
    with compilations() as count:
      greedy = generate(model, row_BT[:, :T], steps=1)
    assert {"read", "write", "start"}.isdisjoint(count), count
    np.testing.assert_array_equal(
      greedy[:, 0], logits_BTV[:, T - 1].argmax(axis=-1)
    )
    # The samples of a documented formula: the first key of a split.
    sampled = generate(
      model, row_BT[:, :T], steps=1, temperature=temperature, key=key
    )
    np.testing.assert_array_equal(
      sampled[:, 0],
      jax.random.categorical(
        jax.random.split(key, 1)[0], logits_BTV[:, T - 1] / temperature
      ),
    )
  assert reader.read._cache_size() == 3


def test_fewer_tokens_are_the_first_of_more() -> None:
  """Numbers of tokens up to 16 share a program, samples included."""
  model, key = make(), jax.random.key(4)
  for how in (dict(), dict(temperature=1.5, key=key, top_k=6)):
    most = generate(model, PROMPT_BT[:, :2], steps=7, **how)
    for steps in (1, 4, 6):
      with compilations() as count:
        found = generate(model, PROMPT_BT[:, :2], steps=steps, **how)
      assert "write" not in count
      np.testing.assert_array_equal(found, most[:, :steps])


def test_the_programs_that_are_kept_are_bounded() -> None:
  for cache in (generation._reader, generation._writer):
    assert cache.cache_info().maxsize == 32


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "int64"])
def test_a_prompt_of_any_integer_dtype(dtype) -> None:
  prompt_BT = np.asarray(PROMPT_BT).astype(dtype)
  np.testing.assert_array_equal(
    generate(make(), prompt_BT, steps=2), generate(make(), PROMPT_BT, steps=2)
  )


@pytest.mark.parametrize("token", [-1, V, 2**32 + 1])
def test_a_token_out_of_the_vocabulary_is_named(token) -> None:
  prompt_BT = np.array(PROMPT_BT, np.int64)
  prompt_BT[1, 2] = token
  words = rf"prompt\[1, 2\] is the token -?\d+: .* 0 to {V - 1}"
  with pytest.raises(ValueError, match=words):
    generate(make(), prompt_BT, steps=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sample", [False, True])
def test_logits_that_are_not_finite_are_named(value, sample) -> None:
  model = make()
  model.token_embedding[...] = model.token_embedding[...].at[3, 0].set(value)
  how = dict(temperature=1.0, key=jax.random.key(1)) if sample else {}
  words = "new token 0 after prompt 0 are not finite"
  with pytest.raises(ValueError, match=words):
    generate(model, PROMPT_BT, steps=2, **how)
  # Inside `jax.jit` there is no value to refuse: −1 is no token.
  run = jax.jit(lambda prompt_BT: generate(model, prompt_BT, steps=2, **how))
  assert (run(PROMPT_BT)[0] == -1).all()


def test_moves_no_data_that_is_not_asked_for() -> None:
  model, key = make(), jax.random.key(1)
  wanted = generate(model, PROMPT_BT, steps=3, temperature=1.0, key=key)
  with jax.transfer_guard("disallow"):
    for prompt_BT in (PROMPT_BT, np.asarray(PROMPT_BT, np.uint8)):
      generate(model, prompt_BT, steps=3)
      found = generate(model, prompt_BT, steps=3, temperature=1.0, key=key)
  np.testing.assert_array_equal(found, wanted)


def test_options_may_be_scalars_of_numpy_and_jax() -> None:
  model, key = make(), jax.random.key(1)
  plain = dict(steps=3, temperature=1.5, top_k=4)
  wanted = generate(model, PROMPT_BT, key=key, **plain)
  for library in (np, jnp):
    options = {
      "steps": library.int32(3),
      "temperature": library.float32(1.5),
      "top_k": library.int32(4),
    }
    found = generate(model, PROMPT_BT, key=key, **options)
    np.testing.assert_array_equal(found, wanted)


def test_a_stream_continues_prompts_of_any_lengths() -> None:
  model = make()
  prompts = [[3, 1, 4], [5], [9, 2]]
  blocks = list(generation.stream(model, prompts, steps=5, block=2))
  assert [x.shape for x in blocks] == [(3, 2), (3, 2), (3, 1)]
  greedy_BS = np.concatenate(blocks, axis=1)
  for prompt, found in zip(prompts, greedy_BS, strict=True):
    alone = generate(model, jnp.array([prompt]), steps=5)
    np.testing.assert_array_equal(found, alone[0])


def test_a_streams_samples_depend_on_their_own_key() -> None:
  model, keys = make(), jax.random.split(jax.random.key(5), 3)
  options = dict(steps=4, block=2, temperature=2.0, top_k=7)
  prompts = [[3, 1, 4], [5], [9, 2]]
  together = list(generation.stream(model, prompts, keys=keys, **options))
  together_BS = np.concatenate(together, axis=1)
  alone = generation.stream(model, prompts[2:], keys=keys[2:], **options)
  np.testing.assert_array_equal(
    together_BS[2:], np.concatenate(list(alone), axis=1)
  )
  assert len(np.unique(together_BS)) > 2
  for wrong, options in (
    ("block=0", dict(steps=1, block=0)),
    ("position table has 8", dict(steps=7)),
    (r"prompt\[0, 1\] is the token 11", dict(steps=1, prompts=[[1, 11]])),
  ):
    prompts = options.pop("prompts", [[3, 1, 4]])
    with pytest.raises(ValueError, match=wrong):
      next(generation.stream(model, prompts, **options))
