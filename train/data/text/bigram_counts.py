"""Count how often each pair of neighbouring tokens occurs in a data set.

    c(a, b) = #{ i : (w_i, w_i+1) = (a, b) }

The documents are concatenated, and pairs across a document boundary count, as
they occur in the rows of a stream. If the data set consists of rows, pairs are
counted within each row. `rebased count PATH` writes the pairs that occur
`least` times or more:

    PATH/bigrams.npz, or NAME.bigrams.npz beside a Megatron NAME.idx
      pair_deltas   uint64, the pairs a · 2³² + b in ascending order, stored as
                    differences; the first one is stored itself
      counts        uint32, of each pair; 2³² − 1 means that many or more
      record        JSON: version, least, tokens, the data set's fingerprint

A target of evaluation is rare if c(token, target) ≤ limit, summed over all data
sets that the run trains on.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from rebased_jax.atomic import write_bytes
from train.data.batches import Batch, Fingerprint, check_fingerprint
from train.data.checks import require
from train.data.text.open_files import file_size
from train.data.text.rows import fill_pieces, open_source
from train.data.text.token_source import DataError, Pieces, TokenSource
from train.data.wrapped_batches import WrappedBatches

_VERSION = 1
_BLOCK = 1 << 22  # pairs that are counted at a time
_MERGED = 16  # blocks whose counts are merged together
_MOST = 2**32 - 1  # the largest count that is stored
_SHIFT = np.uint64(32)

# Pairs a · 2³² + b, uint64, ascending; and the count of each, int64.
Counts = tuple[np.ndarray, np.ndarray]


def table_path(path: str) -> Path:
  """Return the path of the counts of the data set at `path`."""
  place = Path(path)
  if place.suffix == ".idx":
    return place.with_suffix(".bigrams.npz")
  return place / "bigrams.npz"


def pairs_of(a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
  """Return the pairs a · 2³² + b of tokens a, b ≥ 0, as uint64."""
  return (a_N.astype(np.uint64) << _SHIFT) | b_N.astype(np.uint64)


def _read_pairs(source: TokenSource) -> Iterator[np.ndarray]:
  """Yield the pairs of all tokens, block by block, each pair once."""
  length_n = source.lengths
  end_n = np.cumsum(length_n)
  total = int(end_n[-1]) if len(end_n) else 0
  for begin in range(0, total - 1, _BLOCK):
    stop = min(begin + _BLOCK + 1, total)
    first, last = np.searchsorted(end_n, (begin, stop - 1), side="right")
    document_P = np.arange(first, last + 1)
    start_P = end_n[document_P] - length_n[document_P]
    low_P = np.maximum(start_P, begin)
    size_P = np.minimum(end_n[document_P], stop) - low_P
    some_P = size_P > 0  # leave out empty documents
    pieces = Pieces(document_P, low_P - start_P, size_P, low_P - begin)
    pieces = Pieces(*(x_P[some_P] for x_P in pieces))
    row_P = np.zeros(len(pieces.place_P), np.int64)
    filled = fill_pieces(source, pieces, row_P, (1, stop - begin))
    tokens_N = filled.tokens_RW[0]
    kept_N = np.ones(len(tokens_N) - 1, bool)
    if source.row_length is not None:
      # A pair across two rows does not occur in training.
      begin_P = pieces.place_P[pieces.start_P == 0]
      kept_N[begin_P[begin_P > 0] - 1] = False
    yield pairs_of(tokens_N[:-1], tokens_N[1:])[kept_N]


def _merge(parts: Sequence[Counts]) -> Counts:
  """Return the sums of counts."""
  pair_M = np.concatenate([pairs for pairs, _ in parts])
  count_M = np.concatenate([counts for _, counts in parts])
  order_M = np.argsort(pair_M, kind="stable")
  pair_M, count_M = pair_M[order_M], count_M[order_M]
  first_M = np.append(True, pair_M[1:] != pair_M[:-1])[: len(pair_M)]
  first_N = np.flatnonzero(first_M)
  if not first_N.size:
    return pair_M, count_M
  return pair_M[first_N], np.add.reduceat(count_M, first_N)


def count(source: TokenSource) -> Counts:
  """Count every pair of a data set.

  Args:
    source: the data set.

  Returns:
    The pairs in ascending order, uint64, and their counts, int64.

  Raises:
    DataError: a file cannot be read, or a token is outside the vocabulary.
  """
  none = (np.empty(0, np.uint64), np.empty(0, np.int64))
  waiting: list[Counts] = [none]
  for pair_N in _read_pairs(source):
    waiting.append(np.unique(pair_N, return_counts=True))
    if len(waiting) > _MERGED:
      waiting = [_merge(waiting)]
  return _merge(waiting)


def write(path: str, least: int = 1) -> tuple[int, int]:
  """Count the pairs of a data set and write the counts beside it.

  Args:
    path: a prepared folder, or a Megatron index.
    least: leave out pairs that occur less often.

  Returns:
    The number of pairs in the file, and the number of all pairs.

  Raises:
    ValueError: `least` is below 1.
    DataError: there is no data set, or it is damaged.
    OSError: the file cannot be written.
  """
  require(least >= 1, "least", least, "1 or more")
  source = open_source(path)
  pair_N, count_N = count(source)
  kept_N = count_N >= least
  record = {
    "version": _VERSION,
    "least": least,
    "tokens": int(source.lengths.sum()),
    "fingerprint": source.fingerprint,
  }
  data = io.BytesIO()
  np.savez_compressed(
    data,
    pair_deltas=np.diff(pair_N[kept_N], prepend=np.uint64(0)),
    counts=np.minimum(count_N[kept_N], _MOST).astype(np.uint32),
    record=np.array(json.dumps(record)),
  )
  write_bytes(table_path(path), data.getvalue())
  return int(kept_N.sum()), len(pair_N)


def _load(path: str, limit: int, least: int | None) -> Counts:
  """Read the counts of a data set.

  Args:
    path: the data set.
    limit: the file must hold every pair that occurs more often.
    least: the largest `least` that the file may have been written with; None
      for limit + 1.

  Raises:
    DataError: the file is missing or damaged, belongs to another data set, or
      leaves out too many pairs.
  """
  place = table_path(path)
  again = f"`rebased count {path}` makes it"
  if not place.exists():
    raise DataError(f"{place}: no counts of this data set; {again}")
  file_size(place)
  try:
    with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as data:
      record = json.loads(str(data["record"]))
      delta_N, count_N = data["pair_deltas"], data["counts"]
    if not (
      isinstance(record, dict)
      and type(record.get("least")) is int
      and isinstance(record.get("fingerprint"), dict)
      and (delta_N.dtype, count_N.dtype) == (np.uint64, np.uint32)
      and delta_N.ndim == 1
      and delta_N.shape == count_N.shape
    ):
      raise DataError("an array or its record has another form")
  # zipfile, zlib and NumPy's parser raise a dozen kinds of errors.
  except Exception as error:
    raise DataError(
      f"{place}: not a file of counts: {error}; {again}"
    ) from error
  if record.get("version") != _VERSION:
    raise DataError(f"{place}: version {record.get('version')}; {again}")
  try:
    check_fingerprint(record["fingerprint"], open_source(path).fingerprint)
  except ValueError as error:
    raise DataError(
      f"{place}: counts of another data set or tokenizer: {error}; {again}"
    ) from error
  most = limit + 1 if least is None else least
  if record["least"] > most:
    raise DataError(
      f"{place}: it leaves out pairs with fewer than {record['least']} counts: "
      f"expected at most {most}; `rebased count {path} --least {most}` makes it"
    )
  return np.cumsum(delta_N, dtype=np.uint64), count_N.astype(np.int64)


def frequent(paths: Sequence[str], limit: int) -> np.ndarray:
  """Return the pairs that occur more than `limit` times, uint64, ascending.

  Args:
    paths: the data sets, whose counts are summed.
    limit: the largest count of a rare pair.

  Raises:
    DataError: a file of counts is missing, belongs to another data set, or
      leaves out too many pairs.
  """
  # With several data sets, pairs that are rare in each may be frequent in sum.
  least = None if len(paths) == 1 else 1
  pair_N, count_N = _merge([_load(path, limit, least) for path in paths])
  return pair_N[count_N > limit]


@dataclasses.dataclass(frozen=True)
class RareBatches(WrappedBatches):
  """Add the array `rare` to batches: float32 (B, T), 1 if a target is rare.

  Attributes:
    inner: the batches of text.
    paths: the data sets whose counts are used.
    limit: the largest count of a rare pair.
  """

  paths: tuple[str, ...]
  limit: int

  def __getstate__(self) -> dict[str, Any]:
    # Without the cached pairs: a worker process reads them itself.
    fields = dataclasses.fields(self)
    return {field.name: getattr(self, field.name) for field in fields}

  @property
  def fingerprint(self) -> Fingerprint:
    """The fingerprint of the batches, and the limit."""
    return {**super().fingerprint, "recall_limit": self.limit}

  @functools.cached_property
  def _frequent_N(self) -> np.ndarray:
    return frequent(self.paths, self.limit)

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    """Return rows of a batch, with the array `rare`."""
    batch = self.inner.read(step, slice(start, stop))
    pair_BT = pairs_of(batch["tokens"], batch["targets"])
    place_BT = np.searchsorted(self._frequent_N, pair_BT)
    # A last entry that no pair equals keeps `place_BT` inside the array.
    known_N = np.append(self._frequent_N, np.uint64(2**64 - 1))
    rare_BT = known_N[place_BT] != pair_BT
    return batch | {"rare": rare_BT.astype(np.float32)}
