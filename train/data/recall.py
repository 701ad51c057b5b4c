"""Find the targets of text that a model could recall from their context.

A target counts as associative recall (AR) if the n tokens that end with it
occurred before in the same row, and in the same document if rows are packed:

    AR_t  ⇔  ∃ s < t: (w_s−n+2, …, w_s+1) = (w_t−n+2, …, w_t+1)

where w are the tokens of the row and w_t+1 is the target at t. The definitions
are

    unigram, n = 1   the target occurred before
    bigram, n = 2    the pair of token and target occurred before
    trigram, n = 3   likewise for three tokens

The paper's Table 2 implies that 45 % of targets are AR. Bigrams give that share
on English text and code. Zoology's definition (arXiv 2312.04927) also asks that
the training text has the bigram at most 1250 times, which gives a far smaller
share. A batch that has the array `rare` follows it: only targets with rare = 1
can be AR.
"""

import jax
from jax import Array
import jax.numpy as jnp

from train.data.config import RECALLS, Recall


def recalled(batch: dict[str, Array], recall: Recall) -> Array:
  """Return which targets are associative recall: bool (B, T).

  The time is O(T log T) for each row.

  Args:
    batch: `tokens` and `targets` (B, T); `segment_ids` (B, T) if rows are
      packed; `rare` (B, T), 1 or 0, to exclude frequent bigrams. A target in
      another document than its token has weight 0, so its value is not used.
    recall: the definition.
  """
  order = 1 + RECALLS.index(recall)
  tokens_BW = jnp.concatenate(
    [batch["tokens"], batch["targets"][:, -1:]], axis=1
  )
  segments_BT = batch.get("segment_ids", jnp.zeros_like(batch["tokens"]))
  segments_BW = jnp.concatenate([segments_BT, segments_BT[:, -1:]], axis=1)
  columns = []
  for back in range(order):
    columns.append(_later(tokens_BW, back))
    columns.append(_later(segments_BW, back))
  seen_BT = jax.vmap(_seen_before)(jnp.stack(columns, axis=1))[:, 1:]
  return seen_BT & (batch["rare"] > 0) if "rare" in batch else seen_BT


def _later(x_BW: Array, steps: int) -> Array:
  """Shift a row to later positions; -1 fills the first ones."""
  width = x_BW.shape[1]
  return jnp.pad(x_BW, ((0, 0), (steps, 0)), constant_values=-1)[:, :width]


def _seen_before(columns_CW: Array) -> Array:
  """Return where a column (C,) equals an earlier column: bool (W,)."""
  # The sort is stable, so the first of equal columns is the earliest.
  order_W = jnp.lexsort(tuple(columns_CW))
  sorted_CW = columns_CW[:, order_W]
  equal_w = (sorted_CW[:, 1:] == sorted_CW[:, :-1]).all(axis=0)
  repeated_W = jnp.pad(equal_w, (1, 0))
  return jnp.zeros_like(repeated_W).at[order_W].set(repeated_W)
