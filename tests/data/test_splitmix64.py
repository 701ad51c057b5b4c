"""Test the hashes that serve as random numbers."""

import numpy as np

from train.data.splitmix64 import hash64, hash64_slots


def test_slots_are_the_stream_of_splitmix64():
  got = hash64_slots(np.array([1234567], np.uint64), 5)
  assert got.tolist() == [
    [
      6457827717110365317,
      3203168211198807973,
      9817491932198370423,
      4593380528125082431,
      16408922859458223821,
    ]
  ]


def test_hash64_chains_and_broadcasts():
  first = hash64(1234567)
  assert first.tolist() == [6457827717110365317]
  np.testing.assert_array_equal(
    hash64(1234567, 9), hash64(first + np.uint64(9))
  )
  assert hash64(1, 2) != hash64(2, 1)
  grid = hash64(np.arange(3)[:, None], np.arange(4))
  assert grid.shape == (3, 4)
  assert np.unique(grid).size == 12
  assert grid[2, 1] == hash64(2, 1)[0]
