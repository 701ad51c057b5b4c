"""Test the order of rows: shuffling, and mixing of data sets."""

import numpy as np
import pytest

from train.data import order


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(count: int) -> None:
  index = np.arange(count)
  order_n = order.permute(index, count, 3, 0)
  assert sorted(order_n.tolist()) == index.tolist()
  if count > 60:
    assert (order_n != order.permute(index, count, 4, 0)).any()
    assert (order_n != order.permute(index, count, 3, 1)).any()
    some = index[::7]
    np.testing.assert_array_equal(
      order.permute(some, count, 3, 0), order_n[some]
    )


def test_permute_mixes() -> None:
  """Neighbours part, and the order is the same for ever."""
  count = 10_000
  order_n = order.permute(np.arange(count), count, 1)
  rank = np.corrcoef(np.arange(count), order_n)[0, 1]
  step = np.corrcoef(order_n[1:], order_n[:-1])[0, 1]
  assert abs(rank) < 0.05 and abs(step) < 0.05  # five standard deviations
  big = order.permute(np.arange(4), 10**12, 5, 6)
  assert len(set(big.tolist())) == 4 and big.max() > 10**10
  assert order.permute(np.arange(4), 1000, 5, 6).tolist() == [
    645,
    388,
    264,
    374,
  ]


def test_mix_deals_by_weight_and_loses_nothing() -> None:
  counts = order.mix_counts((6.0, 3.0, 1.0))
  assert counts.sum() == 2**16
  # Shares of 35,288.6, 20,164.9 and 10,082.5: the largest fractions round up.
  rounded = order.mix_counts((7.0, 4.0, 2.0))
  assert rounded.tolist() == [35_289, 20_165, 10_082]
  np.testing.assert_allclose(counts / 2**16, [0.6, 0.3, 0.1], atol=2**-16)
  places = np.arange(2**17)
  which, place = order.mix(places, counts, 9)
  for k in range(3):
    mine = place[which == k]
    assert sorted(mine.tolist()) == list(range(2 * counts[k]))
  # 1,000 places in a row: five standard deviations of the share are 0.08.
  assert abs((which[5000:6000] == 0).mean() - 0.6) < 0.08
  some = np.array([70_000, 3, 65_535, 65_536])
  for full, part in zip(
    (which, place), order.mix(some, counts, 9), strict=True
  ):
    np.testing.assert_array_equal(part, full[some])
  assert (order.mix(places, counts, 8)[0] != which).any()


def test_each_block_of_a_mixture_has_an_order_of_its_own() -> None:
  counts = order.mix_counts((6.0, 3.0, 1.0))
  which, place = order.mix(np.arange(3 * 2**16), counts, 9)
  sets, places = which.reshape(3, -1), place.reshape(3, -1)
  within = places - np.arange(3)[:, None] * counts[sets]
  for a, b in ((0, 1), (0, 2), (1, 2)):
    # Of random orders 0.46 of the places have the same set: Σ share².
    assert abs((sets[a] == sets[b]).mean() - 0.46) < 0.02
    assert (within[a] == within[b]).mean() < 0.001
  # The order is the same for ever, also across the end of a block.
  ends = slice(2**16 - 3, 2**16 + 4)
  assert which[ends].tolist() == [0, 0, 0, 0, 0, 0, 2]
  wanted = [23493, 5934, 26719, 44409, 69297, 77636, 8047]
  assert place[ends].tolist() == wanted
