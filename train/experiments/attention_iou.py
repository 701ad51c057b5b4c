"""Compare attention with the right tokens of MQAR: Table 3 of the paper.

The query of a key should look at the key's value. With the weights A of the
query rows, over the columns of the pairs alone, and with G, which is 1 at the
right column of each row and else 0:

    IoU = Σ min(A, G) / Σ max(A, G)

The sums are over all queries of all examples. "soft" has A itself, "largest"
has 1 at the largest weight of each row and else 0. Both are of the mean over
heads. The paper does not say how it treats heads, so that the best single head
is given too.
"""

import jax
from jax import Array
import jax.numpy as jnp

from rebased_jax import LM

NAMES = ("soft", "soft_best_head", "largest", "largest_best_head")


def overlaps(model: LM, tokens_BT: Array, positions_BN: Array) -> Array:
  """Return Σ min(A, G) and Σ max(A, G) of a batch of MQAR rows.

  Args:
    model: its second mixer has an attention matrix.
    tokens_BT: rows of the pairs, then the queries.
    positions_BN: where the queries are.

  Returns:
    float32 (2, 1 + H, 2): soft and largest; the mean over heads and each head;
    the two sums.
  """
  N = positions_BN.shape[1]
  A_BHNS = query_weights(model, tokens_BT, positions_BN)
  A_BKNS = jnp.concatenate([A_BHNS.mean(1, keepdims=True), A_BHNS], axis=1)
  G_BNS = right_columns(tokens_BT, positions_BN)
  G_B1NS = G_BNS.astype(jnp.float32)[:, None]
  largest_BKNS = jax.nn.one_hot(A_BKNS.argmax(-1), 2 * N)

  def sums(X_BKNS: Array) -> Array:
    return jnp.stack(
      [
        jnp.minimum(X_BKNS, G_B1NS).sum((0, 2, 3)),
        jnp.maximum(X_BKNS, G_B1NS).sum((0, 2, 3)),
      ],
      axis=-1,
    )

  return jnp.stack([sums(A_BKNS), sums(largest_BKNS)])


def query_weights(model: LM, tokens_BT: Array, positions_BN: Array) -> Array:
  """Return A: the weights of the query rows over the columns of the pairs.

  Args:
    model: its second mixer has an attention matrix.
    tokens_BT: rows of the pairs, then the queries.
    positions_BN: where the queries are.

  Returns:
    float32 (B, H, N, 2 N).
  """
  N = positions_BN.shape[1]
  A_BHTS = model.attention_matrix(tokens_BT)
  rows_B1NS = positions_BN[:, None, :, None]
  A_BHNS = jnp.take_along_axis(A_BHTS, rows_B1NS, axis=2)[..., : 2 * N]
  return A_BHNS.astype(jnp.float32)


def right_columns(tokens_BT: Array, positions_BN: Array) -> Array:
  """Return G: bool (B, N, 2 N), true where a query's value is.

  Args:
    tokens_BT: rows of the pairs, then the queries.
    positions_BN: where the queries are.
  """
  B, N = positions_BN.shape
  keys_BN = tokens_BT[:, 0 : 2 * N : 2]
  asked_BN = jnp.take_along_axis(tokens_BT, positions_BN, axis=1)
  is_asked_BNN = asked_BN[:, :, None] == keys_BN[:, None]
  none = jnp.zeros_like(is_asked_BNN)
  # Pair i has its key in column 2 i and its value in column 2 i + 1.
  return jnp.stack([none, is_asked_BNN], axis=-1).reshape(B, N, 2 * N)


def ious(sums_2K2: Array) -> dict[str, Array]:
  """Return each IoU by its name, from the sums over all batches."""
  soft_K, largest_K = sums_2K2[..., 0] / sums_2K2[..., 1]
  found = (soft_K[0], soft_K[1:].max(), largest_K[0], largest_K[1:].max())
  return dict(zip(NAMES, found, strict=True))
