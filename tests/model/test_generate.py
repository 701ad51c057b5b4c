"""Tests of generated tokens: greedy, sampled, compiled once, and errors."""

import dataclasses

import chex
from compilations import compilations
from flax import nnx
import jax
import jax.numpy as jnp
from mixer_registry import LENGTH, MIXERS, ONE_OF_EACH, WIDTH
import numpy as np
import pytest

from rebased_jax import (
  LM,
  AttentionConfig,
  BaseConvConfig,
  HyenaConfig,
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
    (dict(prompt="abc"), "prompt is a str: expected an array"),
    (dict(prompt=[]), "prompt is an empty list: expected at least one"),
    (dict(prompt=[[1], []]), r"prompt 1 is float64\[0\]: expected integers"),
    (dict(prompt=[[1], [[1]]]), r"prompt 1 is int64\[1, 1\]"),
    (dict(piece=0), "piece=0: expected an integer ≥ 1"),
    (dict(top_p=0.5), "top_p=0.5 samples: expected temperature > 0"),
    (dict(top_p=0.0, temperature=1.0), r"top_p=0.0: .* in \(0, 1\]"),
    (dict(top_p=1.5, temperature=1.0), "top_p=1.5"),
    (dict(top_p=float("nan"), temperature=1.0), "top_p=nan"),
    (dict(stop_tokens=[V]), r"stop_tokens=\[11\]: expected tokens"),
    (dict(stop_tokens=[1.0]), "stop_tokens"),
    (
      dict(key=jax.random.split(jax.random.key(0), 3), temperature=1.0),
      r"key holds PRNG keys of shape \(3,\): expected one key, or \(2,\)",
    ),
    (dict(key="a", temperature=1.0), "key is a str: expected a PRNG key"),
    (dict(state=make().init_state(3)), "state has 3 rows: expected 2"),
    (dict(state=()), "state is a tuple: expected an LMState"),
    (dict(temperature=1e-46), "temperature=1e-46"),
    (dict(sharding=jax.devices()), "with an array, which is read where it"),
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
  choice = generation._Choice(sample=True, top_k=None, has_top_p=False)
  assert generation._reader(graph, 2).read._cache_size() == 1
  writer = generation._writer(graph, 2, 16, choice, None)
  assert writer.whole._cache_size() == 1


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
    # The samples of a documented formula.
    sampled = generate(
      model, row_BT[:, :T], steps=1, temperature=temperature, key=key
    )
    fold = jax.random.fold_in
    for b, token in enumerate(sampled[:, 0]):
      logits_V = logits_BTV[b, T - 1] / temperature
      assert token == jax.random.categorical(fold(fold(key, b), 0), logits_V)
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
  words = rf"prompt\[1, 2\] is the token {token}: .* 0 to {V - 1}"
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


PROMPTS = [[3, 1, 4], [5], [9, 2]]
SAMPLING = dict(temperature=2.0, top_k=9, top_p=0.9)


def test_a_stream_continues_prompts_of_any_lengths() -> None:
  model = make()
  blocks = list(generation.stream(model, PROMPTS, steps=6, block=2))
  assert [x.shape for x in blocks] == [(3, 1), (3, 2), (3, 2), (3, 1)]
  greedy_BS = np.concatenate(blocks, axis=1)
  for prompt, found in zip(PROMPTS, greedy_BS, strict=True):
    alone = generate(model, jnp.array([prompt]), steps=6)
    np.testing.assert_array_equal(found, alone[0])


def test_prompts_of_several_lengths_are_read_together() -> None:
  """All lists of so many prompts share programs, whatever their lengths."""
  model = make()
  generation._reader.cache_clear()
  prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8]]
  whole = generate(model, prompts, steps=1)
  # The state before belongs to its row.
  first_BT = jnp.array([[prompt[0]] for prompt in prompts])
  _, state = model.prefill(first_BT, model.init_state(3))
  rest = [prompt[1:] for prompt in prompts]
  with compilations() as count:
    other = generate(model, [*prompts[1:], [7, 9, 3, 2, 3, 8]], steps=1)
    continued = generate(model, rest, steps=1, state=state)
  assert {"read", "read_some", "write"}.isdisjoint(count), count
  np.testing.assert_array_equal(other[:2], whole[1:])
  np.testing.assert_array_equal(continued, whole)
  assert generation._reader.cache_info().misses == 1
  reader = generation._reader(nnx.split(model)[0], 3)
  sizes = reader.read._cache_size(), reader.read_some._cache_size()
  assert sizes == (0, 3)  # 4, 2 and 1 tokens of three rows
  # A long prompt is read alone, piece by piece, and not with empty rows.
  pieces = generate(model, [prompts[0], [7], [3]], steps=1, piece=2)
  np.testing.assert_array_equal(pieces[0], whole[0])
  one = generation._reader(nnx.split(model)[0], 1)
  assert one.read._cache_size() == 1


def test_samples_depend_on_a_rows_own_key() -> None:
  model, key = make(), jax.random.key(5)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
  together = generate(model, PROMPTS, steps=6, key=key, **SAMPLING)
  for i, prompt in enumerate(PROMPTS):
    row = jnp.array([prompt])
    alone = generate(model, row, steps=6, key=keys[i : i + 1], **SAMPLING)
    np.testing.assert_array_equal(together[i], alone[0])
  # Neither the blocks nor the type of the keys matter.
  raw = jax.random.key_data(keys)
  blocks = generation.stream(
    model, PROMPTS, steps=6, key=raw, block=2, **SAMPLING
  )
  found = np.concatenate(list(blocks), axis=1)
  np.testing.assert_array_equal(found, together)
  assert len(np.unique(together)) > 2


def test_top_p_takes_the_fewest_likeliest_tokens() -> None:
  model, temperature = make(), 2.0
  p_V = np.asarray(jax.nn.softmax(model(PROMPT_BT[:1])[0, -1] / temperature))
  order = np.argsort(-p_V)
  before = np.cumsum(p_V[order]) - p_V[order]
  prompt_BT = jnp.tile(PROMPT_BT[:1], (ROWS, 1))
  options = dict(steps=1, temperature=temperature, key=jax.random.key(1))
  for top_p in (1e-6, 0.5, 0.8):
    with compilations() as count:
      found = generate(model, prompt_BT, top_p=top_p, **options)
    if top_p > 1e-6:  # other values need no other program
      assert "write" not in count
    assert set(np.unique(found)) == set(order[before < top_p])
  everything = generate(model, prompt_BT, top_p=1.0, **options)
  np.testing.assert_array_equal(
    everything, generate(model, prompt_BT, **options)
  )
  # It is taken of the `top_k` likeliest tokens.
  p_K = p_V[order[:4]] / p_V[order[:4]].sum()
  kept = order[:4][np.cumsum(p_K) - p_K < 0.6]
  found = generate(model, prompt_BT, top_p=0.6, top_k=4, **options)
  assert set(np.unique(found)) == set(kept)


def test_a_stop_token_is_repeated_and_ends_a_stream() -> None:
  model, key = make(), jax.random.key(2)
  free = np.asarray(generate(model, PROMPTS, steps=6, key=key, **SAMPLING))
  stops = [int(free[0, 2]), int(free[1, 1]), int(free[2, 0])]
  wanted, ends = free.copy(), []
  for row in wanted:
    ends.append(np.flatnonzero(np.isin(row, stops))[0])
    row[ends[-1] :] = row[ends[-1]]
  options = dict(key=key, stop_tokens=stops, **SAMPLING)
  found = generate(model, PROMPTS, steps=6, **options)
  np.testing.assert_array_equal(found, wanted)
  assert (wanted != free).any() and max(ends) < 3
  blocks = generation.stream(model, PROMPTS, steps=6, block=2, **options)
  assert sum(x.shape[1] for x in blocks) <= 3
  # The program of prompts of one length does the same.
  free_BS = generate(model, PROMPT_BT, steps=5)
  stop = [int(free_BS[0, 1]), int(free_BS[1, 0])]
  found = np.asarray(generate(model, PROMPT_BT, steps=5, stop_tokens=stop))
  assert (found[0, 1:] == stop[0]).all() or found[0, 0] == stop[1]
  assert (found[1] == stop[1]).all()


def test_a_long_prompt_is_read_in_pieces() -> None:
  config = dataclasses.replace(CONFIG, positions=None)
  model = LM(config, rngs=nnx.Rngs(0))
  model.token_embedding[...] = model.token_embedding[...] * 20
  prompt_BT = jax.random.randint(jax.random.key(0), (1, 21), 0, V)
  generation._reader.cache_clear()
  found = generate(model, prompt_BT, steps=4, piece=4)
  reader = generation._reader(nnx.split(model)[0], 1)
  assert reader.read._cache_size() == 2  # 4 tokens five times, and 1
  np.testing.assert_array_equal(found, generate(model, prompt_BT, steps=4))
  # The state after a part of the prompt takes the place of that part.
  _, state = model.prefill(prompt_BT[:, :16], model.init_state(1))
  rest_BT = prompt_BT[:, 16:]
  for prompt in (rest_BT, [rest_BT[0]]):
    continued = generate(model, prompt, steps=4, state=state)
    np.testing.assert_array_equal(continued, found)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(x, marks=() if x in ONE_OF_EACH else pytest.mark.slow)
    for x in MIXERS
  ],
)
def test_every_mixer_continues_as_the_whole(name: str) -> None:
  """Greedy tokens are the argmax of the full forward pass of their row."""
  config = dataclasses.replace(
    CONFIG, second=MIXERS[name].config, width=WIDTH, pairs=1, positions=None
  )
  model = LM(config, rngs=nnx.Rngs(0))
  model.token_embedding[...] = model.token_embedding[...] * 20
  # The first row reads 4 tokens alone, the second 1 and the third 2.
  prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
  tokens_BS = generate(model, prompts, steps=7, piece=4)
  row_BT = np.zeros((3, LENGTH - 1), np.int32)
  for row, prompt, new in zip(row_BT, prompts, tokens_BS, strict=True):
    known = [*prompt, *new[:-1].tolist()]
    row[: len(known)] = known
  best_BT = np.asarray(jax.jit(model)(row_BT)).argmax(axis=-1)
  for best, prompt, new in zip(best_BT, prompts, tokens_BS, strict=True):
    first = len(prompt) - 1
    np.testing.assert_array_equal(best[first : first + 7], new)


def test_a_cache_is_as_long_as_the_text_and_a_filter_is_not() -> None:
  attention = dataclasses.replace(
    CONFIG, second=AttentionConfig(), pairs=1, positions=None
  )
  model = LM(attention, rngs=nnx.Rngs(0))
  assert generate(model, PROMPT_BT, steps=20).shape == (2, 20)
  # The prompt needs most of the cache, and is longer than there are rows.
  model.token_embedding[...] = model.token_embedding[...] * 20
  prompt_1T = np.arange(40, dtype=np.int32)[None] % model.config.vocab_size
  (new_S,) = generate(model, prompt_1T, steps=2)
  row_1T = np.append(prompt_1T, new_S[:1])[None]
  best_T = np.asarray(model(row_1T))[0].argmax(axis=-1)
  np.testing.assert_array_equal(new_S, best_T[-2:])
  assert model.pairs.second.mixer.length is None  # the model is not changed
  hyena = dataclasses.replace(attention, second=HyenaConfig(length=8))
  with pytest.raises(ValueError, match="a row of 9 tokens.* at most 8"):
    generate(LM(hyena, rngs=nnx.Rngs(0)), PROMPT_BT, steps=6)


def test_a_loop_over_tokens_does_not_copy_the_caches() -> None:
  config = dataclasses.replace(
    CONFIG, second=AttentionConfig(heads=2, length=64), positions=None
  )
  model = LM(config, rngs=nnx.Rngs(0))

  def read(state, tokens_BT):
    step = lambda state, token_B: model.step(token_B, state)[::-1]
    return jax.lax.scan(step, state, tokens_BT.T)

  run = jax.jit(read, donate_argnums=0)
  compiled = run.lower(model.init_state(2), PROMPT_BT).compile()
  shape = "f32[2,2,64,2,4]"  # pairs, rows, slots, heads, features
  text = compiled.as_text()
  assert shape in text
  assert not [
    x for x in text.splitlines() if f"= {shape}" in x and "copy(" in x
  ]
  _, logits_TBV = compiled(model.init_state(2), PROMPT_BT)
  wanted_BTV = jax.jit(model)(PROMPT_BT)
  np.testing.assert_allclose(logits_TBV.swapaxes(0, 1), wanted_BTV, atol=1e-6)


def test_a_wrong_prompt_of_a_list_is_named() -> None:
  model = make()
  mesh = jax.make_mesh((2,), ("data",))
  by = lambda *names: jax.NamedSharding(mesh, jax.P(*names))
  for words, prompts, options in (
    (
      "splits 3 prompts over 2 devices: expected a multiple of 2",
      PROMPTS,
      dict(steps=1, sharding=by("data")),
    ),
    ("of the axis of rows", PROMPTS, dict(steps=1, sharding=by(None, "data"))),
    ("block=0", PROMPTS, dict(steps=1, block=0)),
    ("position table has 8", PROMPTS, dict(steps=7)),
    (r"prompt\[1, 2\] is the token 11", [[1], [1, 2, V]], dict(steps=1)),
  ):
    with pytest.raises(ValueError, match=words):
      next(generation.stream(model, prompts, **options))
  # Logits of late tokens are named by their number.
  model.position_embedding[...] = (
    model.position_embedding[...].at[5].set(jnp.nan)
  )
  with pytest.raises(ValueError, match="new token 3 after prompt 0"):
    list(generation.stream(model, PROMPTS, steps=5, block=1))
