"""Test packing: which pieces of which documents make up each row."""

from data_cases import documents
import numpy as np
import pytest

from train.data.text import packing

_TEXTS = documents(200, seed=7, most=90)
_LENGTHS = np.array([len(x) for x in _TEXTS])
_ALL = np.arange(200)


def _rows(plan: packing.RowPlan, rows: np.ndarray) -> list[list[np.ndarray]]:
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


@pytest.mark.quick
@pytest.mark.parametrize("width", [2, 3, 33, 300])
def test_a_stream_is_cut_with_one_shared_token(width: int) -> None:
  chosen = _ALL[::3]
  stream = np.concatenate([_TEXTS[i] for i in chosen])
  plan = packing.stream_plan(width, _LENGTHS, chosen)
  assert len(plan) == (len(stream) - 1) // (width - 1)
  rows = np.random.default_rng(0).permutation(len(plan))
  for row, pieces in zip(rows, _rows(plan, rows), strict=True):
    begin = row * (width - 1)
    np.testing.assert_array_equal(
      np.concatenate(pieces), stream[begin : begin + width]
    )


def test_a_stream_leaves_empty_documents_out() -> None:
  lengths = np.array([0, 3, 0, 0, 4, 0])
  plan = packing.stream_plan(4, lengths, np.arange(6))
  assert plan.document_n.tolist() == [1, 4] and len(plan) == 2
  pieces, row_P = plan.pieces(np.array([0, 1]))
  assert pieces.length_P.tolist() == [3, 1, 4]
  assert row_P.tolist() == [0, 0, 1]


@pytest.mark.parametrize("lengths", [[], [0], [3], [1, 1, 1]])
def test_a_stream_shorter_than_a_row_has_none(lengths: list[int]) -> None:
  lengths = np.array(lengths, np.int64)
  plan = packing.stream_plan(4, lengths, np.arange(len(lengths)))
  assert len(plan) == 0


@pytest.mark.quick
@pytest.mark.parametrize("width", [2, 3, 17, 64, 300])
def test_packed_documents_are_predicted_once(width: int) -> None:
  plan = packing.packed_plan(width, _LENGTHS, _ALL)
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
  plan = packing.packed_plan(129, lengths, np.arange(5000))
  used = lengths.sum() / (len(plan) * 129)
  assert used > 0.995  # first-fit in the order of arrival leaves 7 % empty


@pytest.mark.quick
def test_best_fit_takes_the_least_room() -> None:
  counts = np.bincount([7, 6, 4, 3, 3, 2], minlength=11)
  bins, rows = packing.best_fit(10, counts)
  # 7 opens bin 0, 6 bin 1; 4 fills bin 1; 3 fills bin 0; 3 and 2 share a bin.
  assert bins.tolist() == [0, 1, 1, 0, 2, 2] and rows == 3
  bins, rows = packing.best_fit(10, np.bincount([3] * 7, minlength=11))
  assert bins.tolist() == [0, 0, 0, 1, 1, 1, 2] and rows == 3
  bins, rows = packing.best_fit(10, np.zeros(11, int))
  assert bins.tolist() == [] and rows == 0


def test_splits_part_the_documents() -> None:
  parts = {
    split: packing.split_documents(20_000, split, 0.05, 0.1)
    for split in packing.SPLITS
  }
  joined = np.sort(np.concatenate(list(parts.values())))
  np.testing.assert_array_equal(joined, np.arange(20_000))
  # Five standard deviations of 20,000 draws are 0.008 and 0.011.
  assert abs(len(parts["validation"]) / 20_000 - 0.05) < 0.008
  assert abs(len(parts["test"]) / 20_000 - 0.1) < 0.011
  more = packing.split_documents(30_000, "test", 0.05, 0.1)
  np.testing.assert_array_equal(more[more < 20_000], parts["test"])
  other = packing.split_documents(20_000, "validation", 0.05, 0)
  np.testing.assert_array_equal(other, parts["validation"])
  assert packing.split_documents(5, "train", 0, 0).tolist() == [0, 1, 2, 3, 4]
  assert packing.split_documents(5, "test", 0, 0).tolist() == []


def test_splits_of_ready_rows_keep_the_order_of_the_first() -> None:
  def parts(count: int, *fractions: float) -> list[list[int]]:
    whole = packing.FixedRows(3, count)
    found = []
    for split in packing.SPLITS:
      plan = packing.split_rows(whole, split, *fractions)
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
