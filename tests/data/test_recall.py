"""Test associative-recall targets, and their held-out metrics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_cases import evaluated, folder as folder, make_config
from train_cases import tiny, trainer as trainer

from train import metrics
from train.commands.evaluate import with_recall
from train.data import recall
from train.data.recall import RECALLS


def _by_definition(words_W, segments_W, order: int) -> list[bool]:
  """Return for each target whether its n-gram occurred before."""
  found = []
  for t in range(1, len(words_W)):
    grams = [
      (*words_W[s - order + 1 : s + 1], *segments_W[s - order + 1 : s + 1])
      for s in range(order - 1, t)
    ]
    here = t - order + 1
    gram = (*words_W[here : t + 1], *segments_W[here : t + 1])
    found.append(here >= 0 and gram in grams)
  return found


@pytest.mark.parametrize("name", RECALLS)
@pytest.mark.parametrize("packed", [False, True])
def test_recalled_follows_the_definition(name, packed: bool) -> None:
  rng = np.random.default_rng(3)
  words_BW = rng.integers(0, 3, (3, 41))
  segments_BW = np.zeros_like(words_BW)
  if packed:
    segments_BW[:, 13:] += 1
    segments_BW[1, 30:] += 1
  batch = dict(tokens=words_BW[:, :-1], targets=words_BW[:, 1:])
  if packed:
    batch["segment_ids"] = segments_BW[:, :-1]
  order = 1 + RECALLS.index(name)
  found_BT = recall.recalled(jax.tree.map(jnp.asarray, batch), name)
  # A target in another document than its token has weight 0.
  counts_BT = segments_BW[:, 1:] == segments_BW[:, :-1]
  for row in range(3):
    wanted_T = _by_definition(
      words_BW[row].tolist(), segments_BW[row].tolist(), order
    )
    assert 3 < sum(wanted_T) < 40
    np.testing.assert_array_equal(
      np.asarray(found_BT[row])[counts_BT[row]],
      np.asarray(wanted_T)[counts_BT[row]],
    )


def test_the_papers_perplexities_imply_one_share() -> None:
  """Check log All = p log AR + (1 − p) log nonAR, p = 0.45, in all rows."""
  for whole, ar, rest in (
    (16.62, 3.57, 58.57),
    (16.69, 3.72, 57.21),
    (16.45, 3.67, 56.31),
  ):
    share = math.log(rest / whole) / math.log(rest / ar)
    assert abs(share - 0.4505) < 0.001


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_held_out_perplexities(folder, packing: str) -> None:
  config = make_config(folder, data=dict(packing=packing))
  found = evaluated(config)
  data = config.data.eval_batches(config.batch, 0)
  ar, tokens = 0, 0
  for index in range(data.num_batches):
    batch = data.read(index)
    mask_BT = np.asarray(recall.recalled(batch, "bigram"))
    ar += (batch["weights"] * mask_BT).sum()
    tokens += batch["weights"].sum()
  assert found["tokens"] == tokens and 0.02 < ar / tokens < 0.9
  np.testing.assert_allclose(found["ar_share"], ar / tokens)
  shown = metrics.with_derived(found, text=True)
  share = found["ar_share"]
  np.testing.assert_allclose(
    math.log(shown["perplexity"]),
    share * math.log(shown["ar_perplexity"])
    + (1 - share) * math.log(shown["non_ar_perplexity"]),
    rtol=1e-5,
  )
  assert shown["ar_perplexity"] != shown["non_ar_perplexity"]


@pytest.mark.parametrize(
  "name, limit, said",
  [("trigram", None, "recall='trigram'"), (None, 0, "recall_limit=0")],
)
def test_recall_is_refused_for_mqar(name, limit, said: str) -> None:
  with pytest.raises(ValueError, match=f"^{said}: expected none with MQAR"):
    with_recall(tiny(), name, limit)
