"""Pack documents into rows: which pieces of which documents make up row r.

A row has W = L + 1 tokens, for L inputs and L targets. A packing is one of:

    rows       a document of W tokens is a row
    stream     row r holds the tokens r L … r L + L of all documents, which are
               concatenated. Neighbouring rows share a token, and nothing marks
               a document boundary. GPT-NeoX and the paper's Pile runs do this.
    documents  whole documents are packed into rows by best fit. A document of
               more than W tokens is cut into pieces that share a token, so that
               each token is predicted once.

The result is a row plan. It depends only on the lengths of the documents, is
computed once, and gives any row at any time. `train/data/order.py` decides in
which order training reads the rows.

A data set may have hundreds of millions of documents. So arrays over documents
and pieces have the smallest dtype, are filled block by block, and are freed as
soon as possible.

Best fit follows "Fewer Truncations Improve Language Modeling", arXiv
2404.10830. Here all pieces of one length are placed at once.
"""

import abc
import dataclasses

import numpy as np

from train.data.splitmix64 import hash64
from train.data.text.token_source import Pieces

SPLITS = ("train", "validation", "test")

_SPLIT_KEY = 0x5EED50F5711  # makes the splits independent of other hashes
_BLOCK = 1 << 18  # documents or pieces that are handled at a time
_LEAST = 2  # the shortest piece; one token has nothing to predict


class RowPlan(abc.ABC):
  """Abstract: rows as pieces of documents.

  Attributes:
    width: W, the number of tokens of a row.
  """

  width: int

  @abc.abstractmethod
  def __len__(self) -> int:
    """Return the number of rows."""

  @abc.abstractmethod
  def pieces(self, rows_R: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces of some rows.

    Args:
      rows_R: the numbers of the rows, int64.

    Returns:
      The pieces, and for each piece the index of its row in `rows_R`, int64
      (P,). Row i of the R rows has the places i W … i W + W − 1 of the buffer.
    """

  def arrays(self) -> dict[str, np.ndarray]:
    """Return the arrays of the plan by the names of its fields."""
    values = vars(self).items()
    return {name: x for name, x in values if isinstance(x, np.ndarray)}


@dataclasses.dataclass(frozen=True)
class FixedRows(RowPlan):
  """Plan the rows of packing "rows": each document is a row.

  Attributes:
    width: W, the number of tokens of a document.
    count: the number of documents.
  """

  width: int
  count: int

  def __len__(self) -> int:
    """Return the number of rows."""
    return self.count

  def pieces(self, rows_R: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces of some rows; see `RowPlan.pieces`."""
    row_R = np.arange(len(rows_R))
    width_R = np.full(len(rows_R), self.width)
    pieces = Pieces(rows_R, np.zeros_like(row_R), width_R, row_R * self.width)
    return pieces, row_R


@dataclasses.dataclass(frozen=True)
class RowRange(RowPlan):
  """Take the rows first..first+count-1 of another plan.

  Attributes:
    plan: the other plan.
    first: the first row.
    count: the number of rows.
  """

  plan: RowPlan
  first: int
  count: int

  @property
  def width(self) -> int:
    """The number of tokens of a row."""
    return self.plan.width

  def __len__(self) -> int:
    """Return the number of rows."""
    return self.count

  def pieces(self, rows_R: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces of some rows; see `RowPlan.pieces`."""
    return self.plan.pieces(self.first + rows_R)


@dataclasses.dataclass(frozen=True)
class StreamRows(RowPlan):
  """Plan the rows of packing "stream": cut from concatenated documents.

  Attributes:
    width: W, the number of tokens of a row.
    document_n: the documents that are not empty, in their order, uint32, or
      int64 if there are 2³² documents or more.
    start_n: the place of each document in the stream, and the end of the
      stream, int64 (n + 1,).
  """

  width: int
  document_n: np.ndarray
  start_n: np.ndarray

  def __len__(self) -> int:
    """Return the number of rows."""
    return max(0, (int(self.start_n[-1]) - 1) // (self.width - 1))

  def pieces(self, rows_R: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces of some rows; see `RowPlan.pieces`."""
    return self.pieces_at(rows_R * (self.width - 1))

  def pieces_at(self, begin_R: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces of rows that begin anywhere in the stream.

    Args:
      begin_R: the places where the rows begin, int64.

    Returns:
      The same arrays as `pieces`.
    """
    end_R = begin_R + self.width
    first_R = np.searchsorted(self.start_n, begin_R, side="right") - 1
    count_R = np.searchsorted(self.start_n, end_R, side="left") - first_R
    row_P, within_P = _expand(count_R)
    index_P = first_R[row_P] + within_P
    origin_P = self.start_n[index_P]
    start_P = np.maximum(begin_R[row_P] - origin_P, 0)
    stop_P = np.minimum(end_R[row_P], self.start_n[index_P + 1]) - origin_P
    place_P = origin_P + start_P - begin_R[row_P] + row_P * self.width
    pieces = Pieces(
      self.document_n[index_P].astype(np.int64),
      start_P,
      stop_P - start_P,
      place_P,
    )
    return pieces, row_P


@dataclasses.dataclass(frozen=True)
class PackedRows(RowPlan):
  """Plan the rows of packing "documents"; the end of a row may be empty.

  Attributes:
    width: W, the number of tokens of a row.
    first_R: the first piece of each row, and the number of pieces, int64
      (rows + 1,).
    document_P: the document of each piece, row by row; uint32, or int64 if
      there are 2³² documents or more.
    start_P: the first token of each piece in its document, uint32 or int64.
    length_P: the tokens of each piece, uint16 or uint32.
  """

  width: int
  first_R: np.ndarray
  document_P: np.ndarray
  start_P: np.ndarray
  length_P: np.ndarray

  def __len__(self) -> int:
    """Return the number of rows."""
    return len(self.first_R) - 1

  def pieces(self, rows_R: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces of some rows; see `RowPlan.pieces`."""
    first_R = self.first_R[rows_R]
    row_P, within_P = _expand(self.first_R[rows_R + 1] - first_R)
    index_P = first_R[row_P] + within_P
    length_P = self.length_P[index_P].astype(np.int64)
    before_P = np.cumsum(length_P) - length_P  # over all rows together
    row_first_P = np.flatnonzero(within_P == 0)[row_P]
    place_P = before_P - before_P[row_first_P] + row_P * self.width
    pieces = Pieces(
      self.document_P[index_P].astype(np.int64),
      self.start_P[index_P].astype(np.int64),
      length_P,
      place_P,
    )
    return pieces, row_P


def split_documents(
  count: int, split: str, validation: float, test: float
) -> np.ndarray:
  """Return the documents of a split, ascending, uint32 or int64.

  A hash of its number decides the split of a document. Each shard therefore
  gives its share, and the splits do not depend on the run's seed.

  Args:
    count: the number of documents.
    split: one of SPLITS.
    validation: the fraction that is held out for validation.
    test: the fraction that is held out for tests.
  """
  dtype = _index_dtype(count)
  if validation == test == 0:
    return np.arange(count if split == "train" else 0, dtype=dtype)
  edges = np.array([validation, validation + test])
  chosen = {"validation": 0, "test": 1, "train": 2}[split]
  found = [np.zeros(0, dtype)]
  for first in range(0, count, _BLOCK):
    number_C = np.arange(first, min(first + _BLOCK, count))
    unit_C = (hash64(_SPLIT_KEY, number_C) >> np.uint64(11)) * 2.0**-53
    kind_C = np.searchsorted(edges, unit_C, side="right")
    found.append(number_C[kind_C == chosen].astype(dtype))
  return np.concatenate(found)


def split_rows(
  plan: RowPlan, split: str, validation: float, test: float
) -> RowRange:
  """Return the rows of a split; at least one if its fraction is above 0.

  The last rows are held out, so that the others keep their order.

  Args:
    plan: all rows.
    split: one of SPLITS.
    validation: the fraction that is held out for validation.
    test: the fraction that is held out for tests.
  """
  count = len(plan)

  def size(fraction: float) -> int:
    return min(count, max(int(count * fraction), fraction > 0))

  sizes = {"validation": size(validation), "test": size(test)}
  train = max(count - sum(sizes.values()), 0)
  firsts = {"train": 0, "validation": train, "test": train}
  firsts["test"] += sizes["validation"]
  return RowRange(plan, firsts[split], {"train": train, **sizes}[split])


def stream_plan(
  width: int, lengths_n: np.ndarray, document_n: np.ndarray
) -> StreamRows:
  """Plan rows that are cut from concatenated documents.

  Args:
    width: W, 2 or more.
    lengths_n: the tokens of each document of the data set.
    document_n: the documents to use, in the order of the stream.
  """
  blocks = range(0, len(document_n), _BLOCK)
  kept = sum(
    np.count_nonzero(lengths_n[document_n[i : i + _BLOCK]]) for i in blocks
  )
  used_n = np.empty(kept, _index_dtype(len(lengths_n)))
  start_n = np.zeros(kept + 1, np.int64)
  place = 0
  for i in blocks:
    document_C = document_n[i : i + _BLOCK]
    length_C = lengths_n[document_C]
    some_C = length_C > 0
    stop = place + np.count_nonzero(some_C)
    used_n[place:stop] = document_C[some_C]
    ends_C = np.cumsum(length_C[some_C], dtype=np.int64)
    start_n[place + 1 : stop + 1] = start_n[place] + ends_C
    place = stop
  return StreamRows(width, used_n, start_n)


def packed_plan(
  width: int, lengths_n: np.ndarray, document_n: np.ndarray
) -> PackedRows:
  """Plan rows of whole documents, packed by best fit.

  Documents of fewer than 2 tokens are left out.

  Args:
    width: W, 2 or more.
    lengths_n: the tokens of each document of the data set.
    document_n: the documents to use.
  """
  document_P, start_P, length_P = _cut(width, lengths_n, document_n)
  del lengths_n, document_n
  count_L = np.zeros(width + 1, np.int64)
  for i in range(0, len(length_P), _BLOCK):
    count_L += np.bincount(length_P[i : i + _BLOCK], minlength=width + 1)
  # Longest first: the pieces of one length come after all longer ones.
  first_L = np.cumsum(count_L[::-1])[::-1] - count_L
  order_P = _stable_order(length_P, first_L)
  bins_P, rows = best_fit(width, count_L)
  per_row = np.zeros(rows + 1, np.int64)
  for i in range(0, len(bins_P), _BLOCK):
    per_row += np.bincount(bins_P[i : i + _BLOCK], minlength=rows + 1)
  first_R = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_row[:-1])])
  del per_row
  by_row_P = _stable_order(bins_P, first_R[:-1])
  del bins_P
  order_P = order_P[by_row_P]
  del by_row_P
  document_P = document_P[order_P]
  start_P = start_P[order_P]
  length_P = length_P[order_P]
  return PackedRows(width, first_R, document_P, start_P, length_P)


def _cut(
  width: int, lengths_n: np.ndarray, document_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cut documents into pieces of 2 to W tokens.

  Args:
    width: W.
    lengths_n: the tokens of each document of the data set.
    document_n: the documents to use.

  Returns:
    The document of each piece, its first token and its number of tokens, in the
    order of the documents.
  """
  blocks = range(0, len(document_n), _BLOCK)

  def pieces(first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of a block of documents, and their pieces."""
    length_C = lengths_n[document_n[first : first + _BLOCK]].astype(np.int64)
    short_C = length_C < _LEAST
    return length_C, np.where(short_C, 0, -(-(length_C - 1) // (width - 1)))

  count = longest = 0
  for i in blocks:
    length_C, count_C = pieces(i)
    count += int(count_C.sum())
    longest = max(longest, int(length_C.max()))
  document_P = np.empty(count, _index_dtype(len(lengths_n)))
  start_P = np.empty(count, _index_dtype(longest))
  length_P = np.empty(count, np.uint16 if width < 2**16 else np.uint32)
  place = 0
  for i in blocks:
    length_C, count_C = pieces(i)
    index_Q, within_Q = _expand(count_C)
    stop = place + len(index_Q)
    document_P[place:stop] = document_n[i : i + _BLOCK][index_Q]
    start_P[place:stop] = start_Q = within_Q * (width - 1)
    length_P[place:stop] = np.minimum(length_C[index_Q] - start_Q, width)
    place = stop
  return document_P, start_P, length_P


def _stable_order(key_P: np.ndarray, first_K: np.ndarray) -> np.ndarray:
  """Return the order that groups equal keys, which keep their order.

  It is a counting sort by blocks, because `np.argsort` takes 16 bytes an entry.

  Args:
    key_P: the keys, in [0, K).
    first_K: the place of the first entry of each key in the result.

  Returns:
    The index of each entry in `key_P`, uint32 or int64 (P,).
  """
  next_K = first_K.copy()
  order_P = np.empty(len(key_P), _index_dtype(len(key_P)))
  for first in range(0, len(key_P), _BLOCK):
    order_C = np.argsort(key_P[first : first + _BLOCK], kind="stable")
    key_C = key_P[first : first + _BLOCK][order_C]
    begin_G = np.flatnonzero(np.append(True, key_C[1:] != key_C[:-1]))
    count_G = np.diff(begin_G, append=len(key_C))
    rank_C = np.arange(len(key_C)) - np.repeat(begin_G, count_G)
    order_P[next_K[key_C] + rank_C] = first + order_C
    next_K[key_C[begin_G]] += count_G
  return order_P


def _index_dtype(count: int) -> type:
  """Return the dtype of integers below `count` or equal to it."""
  return np.uint32 if count < 2**32 else np.int64


def best_fit(width: int, counts: np.ndarray) -> tuple[np.ndarray, int]:
  """Place pieces in bins, longest first, each where the least room is left.

  Args:
    width: W, the size of a bin.
    counts: the number of pieces of each length, (W + 1,); 0 below length 2.

  Returns:
    The bin of each piece, longest pieces first, uint32 or int64; and the number
    of bins.
  """
  rooms: list[list[np.ndarray]] = [[] for _ in range(width + 1)]
  open_ = np.zeros(width + 1, bool)
  pieces = int(counts.sum())
  dtype = _index_dtype(pieces)
  bins_P = np.empty(pieces, dtype)
  placed = bins = 0

  def leave(room: int, bins_m: np.ndarray) -> None:
    """Keep bins that have this much room left."""
    if room >= _LEAST and bins_m.size:
      rooms[room].append(bins_m)
      open_[room] = True

  for length in range(width, _LEAST - 1, -1):
    missing = int(counts[length])
    while missing:
      room = length + int(np.argmax(open_[length:]))
      if not open_[room]:
        full, rest = divmod(missing, width // length)
        new_m = np.arange(bins, bins + full + (rest > 0), dtype=dtype)
        bins += len(new_m)
        each = width // length
        bins_P[placed : placed + missing] = np.repeat(new_m, each)[:missing]
        placed += missing
        leave(width % length, new_m[:full])
        leave(width - rest * length, new_m[full:])
        break
      bins_m = rooms[room].pop()
      open_[room] = bool(rooms[room])
      taken_m, kept_m = bins_m[:missing], bins_m[missing:]
      bins_P[placed : placed + len(taken_m)] = taken_m
      placed += len(taken_m)
      missing -= len(taken_m)
      leave(room, kept_m)
      leave(room - length, taken_m)
  return bins_P, bins


def _expand(count_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Repeat each index by its count, and number the repetitions.

  Counts (2, 1, 3) give (0 0 1 2 2 2) and (0 1 0 0 1 2).
  """
  index_P = np.repeat(np.arange(len(count_n)), count_n)
  first_n = np.cumsum(count_n) - count_n
  return index_P, np.arange(len(index_P)) - first_n[index_P]
