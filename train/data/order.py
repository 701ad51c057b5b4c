"""The order of rows: index maps, read at any place without what came before.

`permute` shuffles: a Feistel network over the bits of an index, applied again
while it leaves the range (cycle walking). With h a hash of the key, the round
and R:

    (L, R) ← (R, L ⊕ h)

`mix` deals every block of 2**16 places of a mixture to its data sets, by their
weights and in a shuffled order, so that place p of the mixture is a known place
of a known set.
"""

import numpy as np

from train.data.splitmix64 import hash64

_ROUNDS = 4
_BLOCK = 1 << 16


def permute(index_B: np.ndarray, count: int, *key: int) -> np.ndarray:
  """Positions of indices in a permutation of 0..count-1: int64 (B,).

  Args:
    index_B: integers in [0, count).
    count: 1 or more.
    *key: integers that name the permutation.
  """
  half = max(1, ((count - 1).bit_length() + 1) // 2)
  mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
  key_round = [hash64(*key, i) for i in range(_ROUNDS)]
  value_B = index_B.astype(np.uint64)
  open_B = np.arange(len(value_B))
  while open_B.size:
    left, right = value_B[open_B] >> shift, value_B[open_B] & mask
    for word in key_round:
      left, right = right, left ^ (hash64(word, right) & mask)
    value_B[open_B] = (left << shift) | right
    open_B = open_B[value_B[open_B] >= np.uint64(count)]
  return value_B.astype(np.int64)


def mix_counts(weights: tuple[float, ...]) -> np.ndarray:
  """The places that each data set has of a block of 2**16: int64 (K,)."""
  share_K = np.asarray(weights, np.float64) / sum(weights) * _BLOCK
  count_K = np.floor(share_K).astype(np.int64)
  rest = _BLOCK - int(count_K.sum())
  order_K = np.argsort(count_K - share_K, kind="stable")
  count_K[order_K[:rest]] += 1
  return count_K


def mix(
  place_B: np.ndarray, count_K: np.ndarray, *key: int
) -> tuple[np.ndarray, np.ndarray]:
  """(data set, place in it) of each place of a mixture, both int64 (B,).

  Every place of every data set comes once, those of one set in an order that
  is shuffled within a block.
  """
  block_B, slot_B = place_B // _BLOCK, place_B % _BLOCK
  for block in np.unique(block_B):
    here_B = block_B == block
    slot_B[here_B] = permute(slot_B[here_B], _BLOCK, *key, int(block))
  end_K = np.cumsum(count_K)
  set_B = np.searchsorted(end_K, slot_B, side="right")
  first_B = (end_K - count_K)[set_B]
  return set_B, block_B * count_K[set_B] + slot_B - first_B
