"""Tests of learned positions that start from 0 at each document."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from model_cases import make
import numpy as np
import pytest

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig
from rebased_jax.config_json import from_dict, to_dict
from rebased_jax.evaluate import loglikelihood

B, T, V = 2, 12, 7
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=V,
  width=8,
  positions=T,
  restart_positions=True,
)
PUBLISHED = dataclasses.replace(CONFIG, restart_positions=False)
TOKENS_BT = np.random.default_rng(1).integers(V, size=(B, T), dtype=np.int32)
# The id 1 returns in the second row, which is a new document.
IDS_BT = np.array([[4] * 5 + [2] * 7, [1] * 6 + [2] * 2 + [1] * 4], np.int32)
DOCUMENTS = [(0, 0, 5), (0, 5, 12), (1, 0, 6), (1, 6, 8), (1, 8, 12)]
# Two orders of the same float32 sums: roundings of 6e-8 and two norms.
CLOSE = dict(rtol=3e-5, atol=3e-5)


@jax.jit
def _logits(params, tokens_BT, ids_BT):
  model = nnx.merge(make(CONFIG)[0], params)
  return model(tokens_BT, segment_ids=ids_BT)


def logits(tokens_BT, ids_BT) -> np.ndarray:
  return np.asarray(_logits(make(CONFIG)[1], tokens_BT, ids_BT))


def model_of(config: ModelConfig):
  return nnx.merge(make(config)[0], make(CONFIG)[1])


def test_a_packed_document_has_the_logits_that_it_has_alone() -> None:
  packed_BTV = logits(TOKENS_BT, IDS_BT)
  for row, start, stop in DOCUMENTS:
    alone_BT = np.zeros((B, T), np.int32)
    alone_BT[0, : stop - start] = TOKENS_BT[row, start:stop]
    found_TV = packed_BTV[row, start:stop]
    wanted_TV = logits(alone_BT, 0 * IDS_BT)[0, : stop - start]
    np.testing.assert_allclose(found_TV, wanted_TV, **CLOSE)


def test_positions_of_the_table_run_through_the_row_as_published() -> None:
  embed = lambda config: model_of(config)._embed(
    TOKENS_BT, model_of(config)._positions(TOKENS_BT, IDS_BT)
  )
  differs_BT = (embed(CONFIG) != embed(PUBLISHED)).any(axis=-1)
  first_BT = np.arange(T)[None] < np.array([[5], [6]])
  np.testing.assert_array_equal(differs_BT, ~first_BT)


def test_parts_of_a_row_have_the_positions_of_the_whole() -> None:
  model, wanted_BTV = model_of(CONFIG), logits(TOKENS_BT, IDS_BT)
  state, found = model.init_state(B), []
  for part in (slice(0, 4), slice(4, 8)):  # the first cuts a document
    y_BTV, state = model.prefill(
      TOKENS_BT[:, part], state, segment_ids=IDS_BT[:, part], all_positions=True
    )
    found.append(y_BTV)
  np.testing.assert_array_equal(state.position_B, [3, 2])
  y_BV, state = model.step(TOKENS_BT[:, 8], state)
  found = np.concatenate([*found, y_BV[:, None]], axis=1)
  # Row 1 has a new document at token 8, which a step cannot know of.
  np.testing.assert_allclose(found[0], wanted_BTV[0, :9], **CLOSE)
  np.testing.assert_allclose(found[1, :8], wanted_BTV[1, :8], **CLOSE)
  np.testing.assert_array_equal(state.position_B, [4, 3])


def test_a_long_text_of_documents_is_read_in_pieces() -> None:
  found = loglikelihood(
    model_of(CONFIG),
    list(TOKENS_BT),
    segment_ids=list(IDS_BT),
    rows=B,
    piece=6,  # the second document of row 1 begins a piece
  )
  log_p_BTV = jax.nn.log_softmax(logits(TOKENS_BT, IDS_BT))
  for row, text in enumerate(found):
    starts = {start for at, start, _ in DOCUMENTS if at == row}
    wanted = [
      log_p_BTV[row, t - 1, TOKENS_BT[row, t]]
      for t in range(1, T)
      if t not in starts
    ]
    np.testing.assert_allclose(text.total, sum(wanted), **CLOSE)


def test_wrong_documents_and_configs_are_named() -> None:
  model = model_of(CONFIG)
  with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 11\)"):
    model(TOKENS_BT, segment_ids=IDS_BT[:, 1:])
  with pytest.raises(ValueError, match="segment_ids has dtype float32"):
    model(TOKENS_BT, segment_ids=jnp.zeros((B, T)))
  with pytest.raises(ValueError, match="restart_positions=True with positions"):
    dataclasses.replace(CONFIG, positions=None)


def test_a_config_stored_without_the_option_is_as_published() -> None:
  stored = to_dict(CONFIG)
  assert from_dict(stored) == CONFIG
  del stored["restart_positions"]
  assert from_dict(stored) == PUBLISHED
