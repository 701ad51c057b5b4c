"""Which targets of text could be recalled from their own context.

A target is AR, associative recall, where the n tokens that end with it have
stood together before in the same row, and in the same document where rows are
packed:

    AR_t  ⇔  ∃ s < t: (w_s−n+2, …, w_s+1) = (w_t−n+2, …, w_t+1)

with w the row's tokens and w_t+1 the target at t. n = 2, a bigram seen before,
splits text as the perplexities of the paper's Table 2 do, 45 to 55; it needs no
list of rare bigrams, which that share excludes. n = 1 is a target that has
occurred at all, n = 3 a trigram. Zoology's definition (arXiv 2312.04927) asks
of a bigram too that the training text has it at most 1250 times: where a batch
has `rare`, which is 1 at such targets, no other is AR.
"""

from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp

Recall = Literal["unigram", "bigram", "trigram"]
RECALLS: tuple[Recall, ...] = ("unigram", "bigram", "trigram")  # n = 1, 2, 3


def recalled(batch: dict[str, Array], recall: Recall) -> Array:
  """AR_BT of text rows, in time T log T.

  Args:
    batch: tokens and targets (B, T), segment_ids (B, T) of packed rows. Where
      the target is of another document than its token, its weight is 0. rare
      (B, T): 1 or 0.
    recall: n, by name.
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
  """X some steps later, with -1 before the row's first."""
  width = x_BW.shape[1]
  return jnp.pad(x_BW, ((0, 0), (steps, 0)), constant_values=-1)[:, :width]


def _seen_before(columns_CW: Array) -> Array:
  """Where a column (C,) equals one to its left."""
  # It is stable: equal columns keep their order.
  order_W = jnp.lexsort(tuple(columns_CW))
  sorted_CW = columns_CW[:, order_W]
  equal_w = (sorted_CW[:, 1:] == sorted_CW[:, :-1]).all(axis=0)
  repeated_W = jnp.pad(equal_w, (1, 0))
  return jnp.zeros_like(repeated_W).at[order_W].set(repeated_W)
