"""Shuffle rows and mix data sets, without a table of the order.

The row at any place of the training order can be computed alone.

`permute` shuffles with a Feistel network over the bits of an index. If the
result is outside the range, the network is applied again (cycle walking). With
h a hash of the key, the round and R, a round is

    (L, R) ← (R, L ⊕ h)

`mix` divides every block of 2**16 places of a mixture between the data sets,
by their weights and in a shuffled order. Place p of the mixture is then a known
place of a known data set.
"""

import numpy as np

from train.data.splitmix64 import hash64

_ROUNDS = 4  # of the Feistel network
_BLOCK = 1 << 16  # places of a mixture that are divided at a time


def permute(index_B: np.ndarray, count: int, *key: int) -> np.ndarray:
  """Return the images of indices under a permutation of 0..count-1.

  Args:
    index_B: integers in [0, count).
    count: the size of the range, 1 or more.
    *key: integers that choose the permutation.

  Returns:
    int64 (B,).
  """
  half = max(1, ((count - 1).bit_length() + 1) // 2)
  mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
  key_round = [hash64(*key, i) for i in range(_ROUNDS)]
  value_B = index_B.astype(np.uint64)
  open_B = np.arange(len(value_B))
  while open_B.size:
    left, right = value_B[open_B] >> shift, value_B[open_B] & mask
    for round_key in key_round:
      left, right = right, left ^ (hash64(round_key, right) & mask)
    value_B[open_B] = (left << shift) | right
    open_B = open_B[value_B[open_B] >= np.uint64(count)]
  return value_B.astype(np.int64)


def mix_counts(weights: tuple[float, ...]) -> np.ndarray:
  """Return the places of each data set in a block of 2**16: int64 (K,).

  Args:
    weights: one positive number for each data set.
  """
  share_K = np.asarray(weights, np.float64) / sum(weights) * _BLOCK
  count_K = np.floor(share_K).astype(np.int64)
  rest = _BLOCK - int(count_K.sum())
  order_K = np.argsort(count_K - share_K, kind="stable")
  count_K[order_K[:rest]] += 1
  return count_K


def mix(
  place_B: np.ndarray, count_K: np.ndarray, *key: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return the data set, and the place in it, of each place of a mixture.

  Every place of every data set occurs once. The order of one data set's places
  is shuffled within a block.

  Args:
    place_B: places of the mixture, int64.
    count_K: from `mix_counts`.
    *key: integers that choose the order.

  Returns:
    The numbers of the data sets, and the places in them, both int64 (B,).
  """
  block_B, slot_B = place_B // _BLOCK, place_B % _BLOCK
  for block in np.unique(block_B):
    here_B = block_B == block
    slot_B[here_B] = permute(slot_B[here_B], _BLOCK, *key, int(block))
  end_K = np.cumsum(count_K)
  set_B = np.searchsorted(end_K, slot_B, side="right")
  first_B = (end_K - count_K)[set_B]
  return set_B, block_B * count_K[set_B] + slot_B - first_B
