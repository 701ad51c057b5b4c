"""Memories of documents: states that are added, subtracted, saved and read."""

import dataclasses

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import polynomial_attention
from rebased_jax import (
  LM,
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  ModelConfig,
  ReBasedConfig,
  Site,
  WeightsError,
  generate,
  memory,
)

V = 13
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=16,
  pairs=2,
)
LENGTHS = (30, 7, 16, 21)  # a program for 16 tokens, and one for 32
DOCUMENTS = [
  np.random.default_rng(i).integers(0, V, length)
  for i, length in enumerate(LENGTHS)
]


@pytest.fixture(scope="module")
def lm() -> LM:
  model = LM(CONFIG, rngs=nnx.Rngs(0))
  output = model.pairs.second.mixer.project.o.kernel
  output[...] = output[...] * 100  # so that the memory matters
  return model


@pytest.fixture(scope="module")
def states(lm):
  return memory.read(lm, DOCUMENTS, rows=2, piece=32)


def error(found, wanted) -> float:
  """Return the largest difference of two trees, relative to each array."""
  errors = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, wanted
  )
  return max(jax.tree.leaves(errors))


def test_the_operators_states_add_and_subtract() -> None:
  """Three documents are one pass over all, to 4e-7; a forgotten one is not."""
  H, F, P, T = 2, 8, 16, 96
  kq, kk, kv = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(kq, (1, 8, H, F))
  k = jax.random.normal(kk, (1, T, H, F))
  v = jax.random.normal(kv, (1, T, H, P))
  site = Site(H * P)
  config = ReBasedConfig(heads=H, features=F)
  mixer = config.make(site, rngs=nnx.Rngs(0))
  run = jax.jit(polynomial_attention, static_argnames="return_state")
  read = lambda part: run(
    k[:, part], k[:, part], v[:, part], return_state=True
  )[1]
  parts = [read(slice(t, t + 32)) for t in (0, 32, 64)]
  merged = memory.merge(mixer, parts)
  whole = read(slice(0, T))
  assert error(merged, whole) < 4e-7
  answer = lambda state: run(q, q, jnp.ones((1, 8, H, P)), initial_state=state)
  assert error(answer(merged), answer(whole)) < 4e-7
  kept = memory.merge(mixer, [parts[0], parts[2]])
  forgotten = memory.forget(mixer, merged, parts[1])
  assert error(forgotten, kept) < 1e-7
  assert error(forgotten, merged) > 0.1


def test_documents_are_read_as_each_alone(lm, states) -> None:
  read = jax.jit(lambda tokens: lm.prefill(tokens, lm.init_state(1))[1])
  for tokens, state in zip(DOCUMENTS[:2], states, strict=False):
    assert error(state, read(tokens[None])) < 1e-5
  assert [int(x.position_B[0]) for x in states] == list(LENGTHS)
  pieces = memory.read(lm, DOCUMENTS, rows=2, piece=8)
  assert error(states, pieces) < 1e-5


def test_a_model_answers_from_any_subset_and_forgets(lm, states) -> None:
  question = jnp.array([[1, 2, 3]])
  ask = jax.jit(lambda state: lm.prefill(question, state)[0])
  merged = memory.merge(lm, states)
  without = memory.merge(lm, [states[0], *states[2:]])
  forgotten = memory.forget(lm, merged, states[1])
  assert error(forgotten.pairs[1], without.pairs[1]) < 1e-6
  assert int(merged.position_B[0]) == sum(LENGTHS)
  chex.assert_trees_all_equal(forgotten.position_B, without.position_B)
  assert error(ask(forgotten), ask(without)) < 1e-5
  assert error(ask(forgotten), ask(merged)) > 1e-3
  # The window of the convolution is that of a text's beginning.
  chex.assert_trees_all_equal(merged.pairs[0], lm.init_state(1).pairs[0])
  # The order of documents is no matter.
  other = memory.merge(lm, states[::-1])
  assert error(ask(other), ask(merged)) < 1e-5
  tokens_BS = generate(lm, question, steps=3, state=merged)
  assert tokens_BS[0, 0] == ask(merged).argmax()


def test_a_file_is_the_state_of_one_model(lm, states, tmp_path) -> None:
  path = tmp_path / "memory.safetensors"
  merged = memory.merge(lm, states)
  memory.save(lm, merged, path)
  memory.save(lm, merged, path)  # replaces it
  assert [x.name for x in tmp_path.iterdir()] == [path.name]
  chex.assert_trees_all_equal(memory.load(lm, path), merged)
  other = LM(CONFIG, rngs=nnx.Rngs(1))
  with pytest.raises(WeightsError, match="made with other parameters"):
    memory.load(other, path)
  whole = path.read_bytes()
  path.write_bytes(whole[:-9])
  with pytest.raises(WeightsError, match="cannot be read"):
    memory.load(lm, path)
  with pytest.raises(WeightsError, match="cannot be read"):
    memory.load(lm, tmp_path / "none")
  spoilt = jax.tree.map(lambda x: x / 0, merged)
  spoilt = spoilt._replace(position_B=merged.position_B)
  with pytest.raises(WeightsError, match="values that are not finite"):
    memory.save(lm, spoilt, path)
  assert path.read_bytes() == whole[:-9]  # an older file stays


def test_what_cannot_be_added_is_refused(lm, states) -> None:
  replace = dataclasses.replace
  attention = LM(
    replace(CONFIG, second=AttentionConfig(length=8)), rngs=nnx.Rngs(0)
  )
  cache = attention.init_state(1)
  for call in (
    lambda: memory.read(attention, DOCUMENTS),
    lambda: memory.merge(attention, [cache, cache]),
    lambda: memory.forget(attention, cache, cache),
  ):
    with pytest.raises(
      NotImplementedError, match="Attention: its state is not"
    ):
      call()
  table = LM(replace(CONFIG, positions=64), rngs=nnx.Rngs(0))
  with pytest.raises(NotImplementedError, match="ModelConfig.positions=64"):
    memory.read(table, DOCUMENTS)
  based = BasedConfig(heads=2).make(Site(16), rngs=nnx.Rngs(0))
  pair, array, bad = lm.init_state(2), jnp.zeros((1, 2)), [[1], [1, 2, V]]
  # Of two rows, the second one has fewer tokens than are to be forgotten.
  more, less = (
    pair._replace(position_B=jnp.asarray(x, jnp.int32))
    for x in ([5, 1], [2, 3])
  )
  for words, call in (
    ("states is empty", lambda: memory.merge(lm, [])),
    ("state 1 is a list", lambda: memory.merge(lm, [states[0], [array]])),
    ("state 1 has position_B", lambda: memory.merge(lm, [states[0], pair])),
    ("state 0 has the structure", lambda: memory.merge(based, [array])),
    ("would have -14 tokens", lambda: memory.forget(lm, states[1], states[3])),
    ("would have -2 tokens", lambda: memory.forget(lm, more, less)),
    ("piece=0", lambda: memory.read(lm, DOCUMENTS, piece=0)),
    (r"documents\[1\]\[2\] is the token 13", lambda: memory.read(lm, bad)),
    (r"documents\[0\] is float64\[0\]", lambda: memory.read(lm, [[]])),
  ):
    with pytest.raises(ValueError, match=words):
      call()
