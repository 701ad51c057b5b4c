"""IoU of attention and the right tokens, and the fixed first layer."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebased_jax import Site
from train.data.mqar import MQARConfig, mqar_rows
from train.data.mqar_paper import paper_examples
from train.experiments import attention_iou, paper
from train.experiments.previous_token import PreviousTokenConfig

CONFIG = MQARConfig(vocab_size=64, length=16, pairs=3)
B, H = 4, 2


class _Model:
  def __init__(self, A_BHTS):
    self.attention_matrix = lambda tokens_BT: A_BHTS


def _batch():
  return mqar_rows(CONFIG, *paper_examples(CONFIG, B, 0))


def _ious(A_BHTS, batch):
  found = attention_iou.overlaps(
    _Model(jnp.asarray(A_BHTS)),
    jnp.asarray(batch["tokens"]),
    jnp.asarray(batch["positions"]),
  )
  return {name: float(x) for name, x in attention_iou.ious(found).items()}


def _right_column(batch, row, query):
  """The column of the value that is the query's target."""
  (column,) = np.flatnonzero(
    batch["tokens"][row, : 2 * CONFIG.pairs] == batch["targets"][row, query]
  )
  return column


def test_ious_are_those_of_loops():
  batch = _batch()
  rng = np.random.default_rng(0)
  A_BHTS = rng.dirichlet(np.full(CONFIG.length, 0.2), (B, H, CONFIG.length))
  A_BHTS = np.float32(A_BHTS)
  wanted = {}
  for head in (None, 0, 1):
    A_BTS = A_BHTS.mean(axis=1) if head is None else A_BHTS[:, head]
    sums = np.zeros((2, 2))
    for row in range(B):
      for query, position in enumerate(batch["positions"][row]):
        right = _right_column(batch, row, query)
        a_S = A_BTS[row, position, : 2 * CONFIG.pairs]
        for kind, x_S in enumerate((a_S, np.arange(len(a_S)) == a_S.argmax())):
          g_S = np.arange(len(a_S)) == right
          sums[kind] += np.minimum(x_S, g_S).sum(), np.maximum(x_S, g_S).sum()
    wanted[head] = sums[:, 0] / sums[:, 1]
  best = np.maximum(wanted[0], wanted[1])
  for order in (slice(None), slice(None, None, -1)):  # either head may be best
    found = _ious(A_BHTS[:, order], batch)
    np.testing.assert_allclose(
      [found[name] for name in attention_iou.NAMES],
      [wanted[None][0], best[0], wanted[None][1], best[1]],
      rtol=1e-5,
    )


def test_perfect_attention_has_1_and_a_mass_m_has_m_over_2_minus_m():
  batch, m = _batch(), 0.3
  A_BHTS = np.zeros((B, H, CONFIG.length, CONFIG.length), np.float32)
  for row in range(B):
    for query, position in enumerate(batch["positions"][row]):
      right = _right_column(batch, row, query)
      A_BHTS[row, :, position, right] = m
      A_BHTS[row, :, position, (right + 1) % 6] = 1 - m
  assert _ious(A_BHTS, batch)["soft"] == pytest.approx(m / (2 - m))
  assert _ious(A_BHTS, batch)["largest"] == 0
  right_BHTS = np.isclose(A_BHTS, m).astype(np.float32)
  assert _ious(right_BHTS, batch) == dict.fromkeys(attention_iou.NAMES, 1)


def test_the_fixed_layer_adds_the_token_before():
  mixer = PreviousTokenConfig().make(Site(3), rngs=nnx.Rngs(0))
  assert not jax.tree.leaves(nnx.state(mixer))
  site = Site(3, dtype="bfloat16")
  narrow = PreviousTokenConfig().make(site, rngs=nnx.Rngs())
  assert narrow(np.ones((1, 2, 3), np.float32)).dtype == jnp.bfloat16
  x_BTD = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  wanted = x_BTD.copy()
  wanted[:, 1:] += x_BTD[:, :-1]
  np.testing.assert_array_equal(mixer(x_BTD), wanted)
  state, found = mixer.init_state(2), []
  first, state = mixer.prefill(x_BTD[:, :2], state)
  found = [first]
  for t in range(2, 5):
    y_BD, state = mixer.step(jnp.asarray(x_BTD[:, t]), state)
    found.append(y_BD[:, None])
  np.testing.assert_array_equal(np.concatenate(found, axis=1), wanted)


def test_the_cells_are_those_of_section_5_5():
  experiment = paper.make_experiments()["table-3"]
  for cell in experiment.cells.values():
    assert cell.run.model.first == PreviousTokenConfig()
    assert (cell.run.data.length, cell.run.data.pairs) == (128, 32)
    assert cell.attention_examples == 10_000
  with pytest.raises(ValueError, match="expected a multiple of 250"):
    dataclasses.replace(cell, attention_examples=10)
