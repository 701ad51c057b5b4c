"""Test log-likelihoods of texts: whole, in pieces, of documents, and errors."""

import dataclasses

from compilations import compilations
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from mixer_registry import MIXERS
import model_cases
import numpy as np
import pytest

from rebased_jax import (
  LM,
  AttentionConfig,
  BaseConvConfig,
  HyenaConfig,
  ModelConfig,
  ShardAxes,
  evaluate,
)

V = 11
LENGTHS = (37, 1, 24, 2, 40)
RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.integers(0, V, n) for n in LENGTHS]
# Some documents have one token alone. Ids come again, and may be large.
SEGMENTS = [np.cumsum(RANDOM.random(n) < 0.2) % 3 * 2**40 for n in LENGTHS]
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=MIXERS["rebased"].config,
  vocab_size=V,
  width=8,
  pairs=2,
)
# Roundings of float32 in sums of up to 39 losses.
CLOSE = dict(rtol=1e-6, atol=1e-6)


def make(config: ModelConfig) -> LM:
  return nnx.merge(*model_cases.make(config))


def by_hand(model: LM, segments=None) -> list[tuple[float, int, bool]]:
  """Return the totals, counts and greedy flags from whole rows, in float64."""
  run = jax.jit(lambda *x: model(x[0], segment_ids=x[1]))
  most = (evaluate.longest_text(model) or 65) - 1
  found = []
  for i, text in enumerate(TEXTS):
    ids = None if segments is None else np.unique(segments[i], True, True)[2]
    # Causality lets one shape serve every length.
    pad = lambda x_T: None if x_T is None else np.resize(x_T, (1, most))
    if ids is not None:
      ids = np.pad(ids, (0, most - len(ids)), constant_values=-1)
    inputs_T = text[:most]
    logits_TV = np.asarray(run(pad(inputs_T), pad(ids))[0, : len(text) - 1])
    logits_TV = logits_TV.astype(np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    targets_T = text[1:]
    keep = np.ones(len(targets_T), bool)
    if segments is not None:
      keep = segments[i][1:] == segments[i][:-1]
    log_p_T = log_p_TV[np.arange(len(targets_T)), targets_T]
    is_best_T = log_p_TV.argmax(-1) == targets_T
    found.append(
      (log_p_T[keep].sum(), int(keep.sum()), bool(is_best_T[keep].all()))
    )
  return found


def check(found: list[evaluate.LogLikelihood], wanted) -> None:
  totals, counts, greedy = zip(*wanted, strict=True)
  np.testing.assert_allclose([x.total for x in found], totals, **CLOSE)
  assert [x.tokens for x in found] == list(counts)
  assert [x.is_greedy for x in found] == list(greedy)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_pieces_have_the_log_likelihood_of_the_whole(segments) -> None:
  model = make(CONFIG)
  wanted = by_hand(model, segments)
  assert any(greedy for *_, greedy in wanted)
  for piece in (64, 7):
    found = evaluate.loglikelihood(
      model, TEXTS, segment_ids=segments, rows=2, piece=piece
    )
    check(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_takes_every_way_of_cutting(name: str) -> None:
  entry = MIXERS[name]
  mixer = entry.config
  if isinstance(mixer, HyenaConfig):
    mixer = dataclasses.replace(mixer, length=40)
  model = make(dataclasses.replace(CONFIG, second=mixer))
  for segments in (None, SEGMENTS) if entry.takes_documents else (None,):
    wanted = by_hand(model, segments)
    for piece in (64, 1, 3, 8, 17, 39):
      found = evaluate.loglikelihood(
        model, TEXTS, segment_ids=segments, rows=2, piece=piece
      )
      check(found, wanted)


@pytest.mark.slow
def test_a_mesh_splits_texts_and_their_tokens() -> None:
  model = make(dataclasses.replace(CONFIG, pairs=1))
  wanted = by_hand(model, SEGMENTS)
  kinds = (AxisType.Auto, AxisType.Auto)
  mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=kinds)
  axes = ShardAxes(batch="data", time="context")
  with jax.set_mesh(mesh):
    for piece in (64, 32):
      found = evaluate.loglikelihood(
        model, TEXTS, segment_ids=SEGMENTS, rows=2, piece=piece, axes=axes
      )
      check(found, wanted)


def test_attention_makes_its_cache_as_long_as_the_text(monkeypatch) -> None:
  # Neither the config nor the model says how long a cache is.
  mixer = AttentionConfig(heads=2, rotary=True)
  model = make(dataclasses.replace(CONFIG, second=mixer, pairs=1))
  parts, row_losses = [], evaluate.row_losses

  def noted(*args, **kwargs):
    parts.append(kwargs["parts"])
    return row_losses(*args, **kwargs)

  monkeypatch.setattr(evaluate, "row_losses", noted)
  monkeypatch.setattr(evaluate, "_MOST_LOGITS", 400)  # of 8 · 16 · V = 1408
  found = evaluate.loglikelihood(model, TEXTS, rows=8, piece=16)
  check(found, by_hand(model))
  assert set(parts) == {4}  # few logits exist at a time
  with pytest.raises(ValueError, match="nothing says how long"):
    model.init_state(1)  # the model itself has not changed


def test_learned_positions_limit_a_text() -> None:
  model = make(dataclasses.replace(CONFIG, positions=39, pairs=1))
  # 39 is no power of two, and not a multiple of a piece.
  found = evaluate.loglikelihood(model, TEXTS, rows=8, piece=16)
  check(found, by_hand(model))
  assert evaluate.longest_text(model) == 40
  with pytest.raises(ValueError, match=r"texts\[1\] has 41 tokens: expected"):
    evaluate.loglikelihood(model, [[1], np.ones(41, int)])


def test_each_power_of_two_is_compiled_once() -> None:
  model = make(dataclasses.replace(CONFIG, width=12, pairs=1))
  texts = [np.ones(n, int) for n in (3, 18, 40)]
  first = evaluate.loglikelihood(model, texts, rows=1, piece=32)
  with compilations() as count:
    for n in (5, 20, 33, 47):
      evaluate.loglikelihood(model, [np.ones(n, int)], rows=1, piece=32)
    again = evaluate.loglikelihood(model, texts, rows=1, piece=32)
  assert not count
  assert again == first


def test_a_context_is_read_and_not_counted() -> None:
  model = make(CONFIG)
  text = TEXTS[0]
  parts = {
    (found.start + t): nll
    for found in evaluate.token_losses(model, [text], rows=2, piece=7)
    for t, nll in enumerate(found.nll_N.tolist())
  }
  assert sorted(parts) == list(range(1, len(text)))
  (found,) = evaluate.loglikelihood(model, [text], starts=[30], piece=64)
  assert found.tokens == 7
  wanted = -sum(parts[t] for t in range(30, 37))
  np.testing.assert_allclose(found.total, wanted, **CLOSE)
  (none,) = evaluate.loglikelihood(model, [text], starts=[37], piece=64)
  assert (none.total, none.tokens, none.is_greedy) == (0.0, 0, True)
  assert evaluate.loglikelihood(model, []) == []


def test_prefill_gives_logits_at_all_positions() -> None:
  model = make(CONFIG)
  tokens = jnp.asarray(TEXTS[0][None, :12], jnp.int32)

  @jax.jit
  def run(tokens):
    state = model.init_state(1)
    first, state = model.prefill(tokens[:, :5], state, all_positions=True)
    last, same = model.prefill(tokens[:, 5:], state)
    rest, state = model.prefill(tokens[:, 5:], state, all_positions=True)
    return jnp.concatenate([first, rest], axis=1), last, same, state

  logits, last, same, state = run(tokens)
  np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(logits[:, -1], last, rtol=1e-6, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize(
  "texts, options, message",
  [
    ([[1, 2], [3, 11]], {}, r"texts\[1\]\[1\] is the token 11: .* 0 to 10"),
    ([[1, -1]], {}, r"texts\[0\]\[1\] is the token -1"),
    ([[2**33]], {}, r"texts\[0\]\[0\] is the token 8589934592"),
    ([[]], {}, r"texts\[0\] is empty"),
    ([[[1]]], {}, r"texts\[0\] is int64\[1, 1\]: expected integers of shape"),
    ([[0.5]], {}, r"texts\[0\] is float64\[1\]"),
    ([[1]], dict(starts=[0]), r"starts\[0\]=0: expected 1 or more"),
    ([[1]], dict(starts=[]), "starts has 0 entries: expected 1"),
    ([[1, 2]], dict(segment_ids=[[1]]), r"segment_ids\[0\] has shape \(1,\)"),
    ([[1]], dict(rows=0), "rows=0: expected an integer"),
    ([[1]], dict(piece=True), "piece=True: expected an integer"),
  ],
)
def test_wrong_arguments_are_named(texts, options, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    evaluate.loglikelihood(make(CONFIG), texts, **options)
