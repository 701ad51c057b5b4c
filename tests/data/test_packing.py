"""Test packing: which pieces of which documents make up each row."""

import tracemalloc

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


def _packed_by_sorting(width, lengths_n, document_n) -> list[np.ndarray]:
  """Return first_R, document_P, start_P and length_P by sorts of all pieces."""
  piece_P = [
    (int(n), start, min(int(lengths_n[n]) - start, width))
    for n in document_n
    for start in range(0, int(lengths_n[n]) - 1, width - 1)
  ]
  piece_P = np.array(piece_P).reshape(-1, 3)
  piece_P = piece_P[np.argsort(-piece_P[:, 2], kind="stable")]
  counts = np.bincount(piece_P[:, 2], minlength=width + 1)
  bins_P, rows = packing.best_fit(width, counts)
  piece_P = piece_P[np.argsort(bins_P, kind="stable")]
  first_R = np.append(0, np.cumsum(np.bincount(bins_P, minlength=rows)))
  return [first_R, *piece_P.T]


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize("width", [9, 300])
def test_blocks_of_documents_change_no_plan(monkeypatch, block, width) -> None:
  monkeypatch.setattr(packing, "_BLOCK", block)
  chosen = packing.split_documents(200, "train", 0.2, 0.0)
  plan = packing.packed_plan(width, _LENGTHS, chosen)
  found = [plan.first_R, plan.document_P, plan.start_P, plan.length_P]
  expected = _packed_by_sorting(width, _LENGTHS, chosen)
  for array, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(array, other)
  stream = packing.stream_plan(width, _LENGTHS, chosen)
  assert stream.document_n.tolist() == chosen.tolist()
  ends = np.append(0, np.cumsum(_LENGTHS[chosen]))
  assert stream.start_n.tolist() == ends.tolist()


def test_rows_of_more_than_65536_tokens() -> None:
  lengths = np.array([66_000, 5, 150_000])
  plan = packing.packed_plan(70_000, lengths, np.arange(3))
  pieces, row_P = plan.pieces(np.arange(len(plan)))
  columns = (pieces.document_P, pieces.start_P, pieces.length_P, row_P)
  assert sorted(zip(*(x.tolist() for x in columns), strict=True)) == [
    (0, 0, 66_000, 2),
    (1, 0, 5, 2),
    (2, 0, 70_000, 0),
    (2, 69_999, 70_000, 1),
    (2, 139_998, 10_002, 3),
  ]


@pytest.mark.parametrize("make", [packing.stream_plan, packing.packed_plan])
def test_making_a_plan_takes_few_bytes_a_document(monkeypatch, make) -> None:
  monkeypatch.setattr(packing, "_BLOCK", 1 << 14)
  count = 200_000
  length_n = np.random.default_rng(0).integers(1, 600, count).astype(np.int32)
  tracemalloc.start()
  try:
    plan = make(513, length_n, packing.split_documents(count, "train", 0.1, 0))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert len(plan) > 10_000
  # The lengths take 4 of them before, and the result 11 or 16.
  limit = 20 if make is packing.stream_plan else 42
  assert peak / count < limit, f"{peak / count:.1f} bytes a document"


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
