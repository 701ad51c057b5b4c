"""How often each pair of neighbouring tokens is in a data set.

    c(a, b) = #{ i : (w_i, w_i+1) = (a, b) }

over the documents one behind the other, borders among them, as rows of a stream
have them; where records are rows, within each row. `rebased count PATH` writes
the pairs that occur `least` times or more:

    PATH/bigrams.npz, or NAME.bigrams.npz beside a Megatron NAME.idx
      pair_deltas   uint64, of a · 2³² + b in ascending order, the first itself
      counts        uint32, of each pair; 2³² − 1 is that many or more
      record        JSON: version, least, tokens, the data set's fingerprint

A target of evaluation is rare where c(token, target) ≤ limit, over all data
sets of the run's training text.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import io
import json
import os
from pathlib import Path
import zipfile

import numpy as np

from train.data.batches import (
  Batch,
  Batches,
  Fingerprint,
  check_fingerprint,
)
from train.data.checks import require
from train.data.text.rows import fill_pieces, open_source
from train.data.text.token_source import DataError, Pieces, TokenSource

_VERSION = 1
_CHUNK = 1 << 22  # pairs at a time
_MERGED = 16  # chunks that wait to be merged
_MOST = 2**32 - 1
_SHIFT = np.uint64(32)

Counts = tuple[np.ndarray, np.ndarray]  # pairs, ascending; how often each is


def table_path(path: str) -> Path:
  """Where the counts of a data set are."""
  place = Path(path)
  if place.suffix == ".idx":
    return place.with_suffix(".bigrams.npz")
  return place / "bigrams.npz"


def pairs_of(a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
  """a · 2³² + b, uint64, of tokens ≥ 0."""
  return (a_N.astype(np.uint64) << _SHIFT) | b_N.astype(np.uint64)


def _read_pairs(source: TokenSource) -> Iterator[np.ndarray]:
  """The pairs of all tokens, a chunk at a time, each once."""
  length_n = source.lengths
  end_n = np.cumsum(length_n)
  total = int(end_n[-1]) if len(end_n) else 0
  for begin in range(0, total - 1, _CHUNK):
    stop = min(begin + _CHUNK + 1, total)
    first, last = np.searchsorted(end_n, (begin, stop - 1), side="right")
    document_P = np.arange(first, last + 1)
    start_P = end_n[document_P] - length_n[document_P]
    low_P = np.maximum(start_P, begin)
    size_P = np.minimum(end_n[document_P], stop) - low_P
    some_P = size_P > 0  # of documents that are not empty
    pieces = Pieces(document_P, low_P - start_P, size_P, low_P - begin)
    pieces = Pieces(*(x_P[some_P] for x_P in pieces))
    row_P = np.zeros(len(pieces.place_P), np.int64)
    filled = fill_pieces(source, pieces, row_P, (1, stop - begin))
    tokens_N = filled.tokens_RW[0]
    kept_N = np.ones(len(tokens_N) - 1, bool)
    if source.row_length is not None:
      border_P = pieces.place_P[pieces.start_P == 0]
      kept_N[border_P[border_P > 0] - 1] = False
    yield pairs_of(tokens_N[:-1], tokens_N[1:])[kept_N]


def _merge(parts: Sequence[Counts]) -> Counts:
  """The counts of several, summed."""
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
  """(pairs, how often each is): uint64 and int64, of every pair.

  Raises:
    DataError: a file cannot be read, or a token is outside of the vocabulary.
  """
  none = (np.empty(0, np.uint64), np.empty(0, np.int64))
  waiting: list[Counts] = [none]
  for pair_N in _read_pairs(source):
    waiting.append(np.unique(pair_N, return_counts=True))
    if len(waiting) > _MERGED:
      waiting = [_merge(waiting)]
  return _merge(waiting)


def write(path: str, least: int = 1) -> tuple[int, int]:
  """Counts a data set and writes its table; (pairs in it, of all).

  Args:
    path: a prepared folder, or a Megatron index.
    least: a pair that occurs less often is left out.

  Raises:
    ValueError: `least` is below 1.
    DataError: there is no data set, or it is not sound.
    OSError: the table cannot be written.
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
  out = table_path(path)
  temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
  temporary.write_bytes(data.getvalue())
  temporary.replace(out)
  return int(kept_N.sum()), len(pair_N)


def _load(path: str, limit: int, least: int | None) -> Counts:
  """The table of a data set.

  Args:
    path: of the data set.
    limit: the table has to know every pair that is more frequent.
    least: what its own has to be; None: any up to limit + 1.
  """
  place = table_path(path)
  again = f"`rebased count {path}` makes it"
  if not place.exists():
    raise DataError(f"{place}: no counts of this data set; {again}")
  try:
    with np.load(io.BytesIO(place.read_bytes())) as data:
      record = json.loads(str(data["record"]))
      delta_N, count_N = data["pair_deltas"], data["counts"]
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise DataError(f"{place}: no table of counts: {error}; {again}") from error
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
      f"{place}: it leaves out pairs of less than {record['least']} counts: "
      f"expected at most {most}; `rebased count {path} --least {most}` makes it"
    )
  return np.cumsum(delta_N, dtype=np.uint64), count_N.astype(np.int64)


def frequent(paths: Sequence[str], limit: int) -> np.ndarray:
  """The pairs that all data sets together have more than `limit` times.

  uint64, ascending. Of several data sets each table has to hold every pair.

  Raises:
    DataError: a table is missing, of another data set, or leaves out too much.
  """
  least = None if len(paths) == 1 else 1
  pair_N, count_N = _merge([_load(path, limit, least) for path in paths])
  return pair_N[count_N > limit]


@dataclasses.dataclass(frozen=True)
class RareBatches(Batches):
  """Batches of text with `rare`: float32 (B, T), 1 where the target is rare.

  Attributes:
    inner: the batches.
    paths: the data sets whose counts they are.
    limit: a pair of more counts is frequent.
  """

  inner: Batches
  paths: tuple[str, ...]
  limit: int

  def __getstate__(self) -> dict:
    fields = dataclasses.fields(self)
    return {field.name: getattr(self, field.name) for field in fields}

  @property
  def rows(self) -> int:
    return self.inner.rows

  @property
  def length(self) -> int:
    return self.inner.length

  @property
  def num_batches(self) -> int | None:
    return self.inner.num_batches

  @property
  def fingerprint(self) -> Fingerprint:
    return {**self.inner.fingerprint, "recall_limit": self.limit}

  @functools.cached_property
  def _frequent_N(self) -> np.ndarray:
    return frequent(self.paths, self.limit)

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    batch = self.inner.read(step, slice(start, stop))
    pair_BT = pairs_of(batch["tokens"], batch["targets"])
    place_BT = np.searchsorted(self._frequent_N, pair_BT)
    known_N = np.append(self._frequent_N, np.uint64(2**64 - 1))
    rare_BT = known_N[place_BT] != pair_BT
    return batch | {"rare": rare_BT.astype(np.float32)}
