"""Plans of rows, their cache, and the order of rows."""

import logging
from pathlib import Path

from data_cases import documents
import numpy as np
import pytest

from train.data import order
from train.data.text import packing as plans
from train.data.text.packing_cache import cached

_TEXTS = documents(200, seed=7, most=90)
_LENGTHS = np.array([len(x) for x in _TEXTS])
_ALL = np.arange(200)


def _rows(plan: plans.RowPlan, rows: np.ndarray) -> list[list[np.ndarray]]:
  """The pieces of each row, as tokens, in the order of their places."""
  pieces, row_P = plan.pieces(rows)
  result: list[list[np.ndarray]] = [[] for _ in rows]
  ends = np.arange(len(rows)) * plan.width
  for document, start, length, place, row in zip(*pieces, row_P, strict=True):
    assert length > 0 and place == ends[row], "a gap or an overlap"
    ends[row] += length
    result[row].append(_TEXTS[document][start : start + length])
  assert (ends <= (np.arange(len(rows)) + 1) * plan.width).all()
  return result


@pytest.mark.parametrize("width", [2, 3, 33, 300])
def test_a_stream_is_cut_with_one_shared_token(width: int) -> None:
  chosen = _ALL[::3]
  stream = np.concatenate([_TEXTS[i] for i in chosen])
  plan = plans.stream_plan(width, _LENGTHS, chosen)
  assert len(plan) == (len(stream) - 1) // (width - 1)
  rows = np.random.default_rng(0).permutation(len(plan))
  for row, pieces in zip(rows, _rows(plan, rows), strict=True):
    begin = row * (width - 1)
    np.testing.assert_array_equal(
      np.concatenate(pieces), stream[begin : begin + width]
    )


def test_a_stream_leaves_empty_documents_out() -> None:
  lengths = np.array([0, 3, 0, 0, 4, 0])
  plan = plans.stream_plan(4, lengths, np.arange(6))
  assert plan.document_n.tolist() == [1, 4] and len(plan) == 2
  pieces, row_P = plan.pieces(np.array([0, 1]))
  assert pieces.length_P.tolist() == [3, 1, 4]
  assert row_P.tolist() == [0, 0, 1]


@pytest.mark.parametrize("lengths", [[], [0], [3], [1, 1, 1]])
def test_a_stream_shorter_than_a_row_has_none(lengths: list[int]) -> None:
  lengths = np.array(lengths, np.int64)
  plan = plans.stream_plan(4, lengths, np.arange(len(lengths)))
  assert len(plan) == 0


@pytest.mark.parametrize("width", [2, 3, 17, 64, 300])
def test_packed_documents_are_predicted_once(width: int) -> None:
  plan = plans.packed_plan(width, _LENGTHS, _ALL)
  pieces, row_P = plan.pieces(np.arange(len(plan)))
  assert set(row_P.tolist()) == set(range(len(plan)))
  seen = [np.zeros(n, int) for n in _LENGTHS]
  for document, start, length, _, _ in zip(*pieces, row_P, strict=True):
    assert length >= 2
    seen[document][start + 1 : start + length] += 1
  for count in seen:
    assert (count[1:] == 1).all()
  _rows(plan, np.arange(len(plan)))  # no gap and no overlap
  once = np.bincount(pieces.document_P, minlength=200)
  whole = (_LENGTHS > 1) & (width + 1 > _LENGTHS)
  assert whole.any() and (once[whole] == 1).all()


def test_packing_wastes_little() -> None:
  lengths = np.random.default_rng(0).integers(2, 100, 5000)
  plan = plans.packed_plan(129, lengths, np.arange(5000))
  used = lengths.sum() / (len(plan) * 129)
  assert used > 0.995  # first-fit in the order of arrival leaves 7 % empty


def test_best_fit_takes_the_least_room() -> None:
  counts = np.bincount([7, 6, 4, 3, 3, 2], minlength=11)
  bins, rows = plans.best_fit(10, counts)
  # 7 opens bin 0, 6 bin 1; 4 fills bin 1; 3 fills bin 0; 3 and 2 share a bin.
  assert bins.tolist() == [0, 1, 1, 0, 2, 2] and rows == 3
  bins, rows = plans.best_fit(10, np.bincount([3] * 7, minlength=11))
  assert bins.tolist() == [0, 0, 0, 1, 1, 1, 2] and rows == 3
  bins, rows = plans.best_fit(10, np.zeros(11, int))
  assert bins.tolist() == [] and rows == 0


def test_splits_part_the_documents() -> None:
  parts = {
    split: plans.split_documents(20_000, split, 0.05, 0.1)
    for split in plans.SPLITS
  }
  joined = np.sort(np.concatenate(list(parts.values())))
  np.testing.assert_array_equal(joined, np.arange(20_000))
  # Five standard deviations of 20,000 draws are 0.008 and 0.011.
  assert abs(len(parts["validation"]) / 20_000 - 0.05) < 0.008
  assert abs(len(parts["test"]) / 20_000 - 0.1) < 0.011
  more = plans.split_documents(30_000, "test", 0.05, 0.1)
  np.testing.assert_array_equal(more[more < 20_000], parts["test"])
  other = plans.split_documents(20_000, "validation", 0.05, 0)
  np.testing.assert_array_equal(other, parts["validation"])
  assert plans.split_documents(5, "train", 0, 0).tolist() == [0, 1, 2, 3, 4]
  assert plans.split_documents(5, "test", 0, 0).tolist() == []


def test_splits_of_ready_rows_keep_the_order_of_the_first() -> None:
  def parts(count: int, *fractions: float) -> list[list[int]]:
    whole = plans.FixedRows(3, count)
    found = []
    for split in plans.SPLITS:
      plan = plans.split_rows(whole, split, *fractions)
      assert plan.width == 3
      pieces, _ = plan.pieces(np.arange(len(plan)))
      found.append(pieces.document_P.tolist())
    return found

  def ranges(*ends: int) -> list[list[int]]:
    return [list(range(a, b)) for a, b in zip((0, *ends), ends, strict=False)]

  assert parts(100, 0.1, 0.05) == ranges(85, 95, 100)
  # Few rows: one is held out all the same, the last of them.
  assert parts(3, 0.01, 0) == ranges(2, 3, 3)
  assert parts(1, 0.01, 0) == ranges(0, 1, 1)
  assert parts(3, 0, 0) == ranges(3, 3, 3)


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


def test_the_cache_makes_a_plan_once(tmp_path: Path, caplog) -> None:
  calls = []

  def make() -> dict[str, np.ndarray]:
    calls.append(1)
    return {"a": np.arange(5), "b": np.arange(3, dtype=np.int32)}

  for _ in range(2):
    found = cached({"lengths": "x"}, make, tmp_path)
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["b"].dtype == np.int32 and not found["a"].flags.writeable
  assert len(calls) == 1
  cached({"lengths": "y"}, make, tmp_path)
  assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("file", ["a.npy", "plan.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_plan_is_made_again(tmp_path, caplog, file, damage) -> None:
  make = lambda: {"a": np.arange(50)}
  cached({"k": 1}, make, tmp_path)
  (folder,) = tmp_path.iterdir()
  path = folder / file
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  if damage == "gone":
    path.unlink()
  else:
    path.write_bytes(content if damage == "flip" else content[:-9])
  with caplog.at_level(logging.WARNING):
    found = cached({"k": 1}, make, tmp_path)
  assert found["a"].tolist() == list(range(50))
  assert "is damaged and will be made again" in caplog.text
  assert [x.name for x in tmp_path.iterdir()] == [folder.name]


def test_a_failed_plan_leaves_nothing(tmp_path: Path) -> None:
  def make() -> dict[str, np.ndarray]:
    raise MemoryError("too long")

  with pytest.raises(MemoryError):
    cached({"k": 1}, make, tmp_path)
  assert list(tmp_path.iterdir()) == []
