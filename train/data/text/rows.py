"""Open a data set, plan its rows, and read them.

path → TokenSource → RowPlan → rows of W = L + 1 tokens
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from train.data.checks import require
from train.data.text import packing
from train.data.text.megatron_source import MegatronSource, Unit
from train.data.text.packing_cache import Arrays, cached
from train.data.text.prepared_source import PreparedSource
from train.data.text.token_source import DataError, Pieces, TokenSource

Packing = Literal["stream", "documents", "rows"]
PACKINGS = ("stream", "documents", "rows")
HeldOut = Literal["documents", "end"]
HELD_OUT = ("documents", "end")

_VERSION = 2  # of the row plans; raise it when they change
_BLOCK = 1 << 20  # lengths that are checked at a time


@dataclasses.dataclass(frozen=True)
class Layout:
  """How documents become rows.

  Attributes:
    length: L, the inputs of a row, which has L + 1 tokens.
    packing: "stream", "documents" or "rows"; see `packing.py`.
    validation: the fraction that is held out for validation.
    test: the fraction that is held out for tests.
    held_out: what is held out with packing "stream": "documents" holds out
      some of the documents, "end" the last rows of the stream, which works
      even for a single document. Packing "rows" always holds out the last rows.

  Raises:
    ValueError: a field is outside its range.
  """

  length: int
  packing: Packing = "stream"
  validation: float = 0.01
  test: float = 0.0
  held_out: HeldOut = "documents"

  def __post_init__(self) -> None:
    positive = isinstance(self.length, int) and self.length >= 1
    require(positive, "length", self.length, "a positive integer")
    known = self.packing in PACKINGS
    require(known, "packing", self.packing, f"one of {PACKINGS}")
    for field in ("validation", "test"):
      value = getattr(self, field)
      require(0 <= value < 1, field, value, "a fraction in [0, 1)")
    known = self.held_out in HELD_OUT
    require(known, "held_out", self.held_out, f"one of {HELD_OUT}")
    packed = self.packing == "documents" and self.held_out == "end"
    expected = "'documents' with packing='documents'"
    require(not packed, "held_out", self.held_out, expected)
    left = self.validation + self.test < 1
    require(left, "test", self.test, "below 1 with validation added")


def open_source(path: str, packing: Packing = "stream") -> TokenSource:
  """Open a data set.

  A process opens a data set once, until its files change.

  Args:
    path: a prepared folder, or a Megatron index NAME.idx.
    packing: with "rows", the documents of an index are its sequences.

  Raises:
    DataError: there is no data set, or it is damaged.
  """
  place = Path(path)
  if place.is_dir():
    stamp = _stamp(place, "dataset.json", "*.arrayrecord", "*.npy")
    return _opened_prepared(os.fspath(place), stamp)
  if place.suffix == ".idx" and place.exists():
    unit = "sequence" if packing == "rows" else "document"
    stamp = _stamp(place.parent, place.name, f"{place.stem}*.bin")
    return _opened_megatron(os.fspath(place), unit, stamp)
  if place.is_file():
    raise DataError(
      f"{path} is a file: expected a prepared folder or a Megatron .idx file; "
      f"`rebased prepare {path} --out DIR` makes a folder of text, and "
      "`rebased evaluate --text` takes text as it is"
    )
  raise DataError(f"{path}: expected a prepared folder or a Megatron .idx file")


def _stamp(folder: Path, *patterns: str) -> tuple:
  """Return the names, sizes, times and inodes of a data set's files."""
  found = sorted({x for pattern in patterns for x in folder.glob(pattern)})
  # A link may lead nowhere. If it belongs to the data set, opening names it.
  stats = ((path.name, path.stat()) for path in found if path.exists())
  return tuple((name, x.st_size, x.st_mtime_ns, x.st_ino) for name, x in stats)


@functools.lru_cache(maxsize=16)
def _opened_prepared(path: str, stamp: tuple) -> PreparedSource:
  return PreparedSource(path)


@functools.lru_cache(maxsize=16)
def _opened_megatron(path: str, unit: Unit, stamp: tuple) -> MegatronSource:
  return MegatronSource(path, unit)


def make_plan(
  source: TokenSource, layout: Layout, split: str, cache_dir: Path
) -> packing.RowPlan:
  """Plan the rows of one split of a data set, or take them from the cache.

  Args:
    source: the data set.
    layout: how documents become rows.
    split: "train", "validation" or "test".
    cache_dir: the folder of the cache.

  Raises:
    DataError: the packing is "rows" and a document has another length; or the
      data set consists of rows and the packing is another one.
    OSError: the cache cannot be written.
  """
  width = layout.length + 1
  ready = source.row_length
  if ready is not None and (layout.packing, ready) != ("rows", layout.length):
    raise DataError(
      f"{source.name}: it was cut into rows of {ready} + 1 tokens: expected "
      f"packing='rows' and length={ready}, not packing={layout.packing!r} and "
      f"length={layout.length}"
    )
  fractions = (layout.validation, layout.test)
  if layout.packing == "rows":
    _check_rows(source, width)
    rows = packing.FixedRows(width, len(source))
    return packing.split_rows(rows, split, *fractions)
  if layout.held_out == "end" and fractions != (0, 0):
    all_rows = Layout(layout.length, layout.packing, validation=0.0)
    stream = make_plan(source, all_rows, "train", cache_dir)
    return packing.split_rows(stream, split, *fractions)
  packed = layout.packing == "documents"
  make = packing.packed_plan if packed else packing.stream_plan

  def arrays() -> Arrays:
    # No variable holds the arguments, so that `make` can free them.
    return make(
      width,
      source.lengths,
      packing.split_documents(len(source), split, *fractions),
    ).arrays()

  key = {
    "plan": _VERSION,
    **dataclasses.asdict(layout),
    "split": split,
    **source.fingerprint,
  }
  kind = packing.PackedRows if packed else packing.StreamRows
  return kind(width, **cached(key, arrays, cache_dir))


def _check_rows(source: TokenSource, width: int) -> None:
  """Raise DataError if a document does not have `width` tokens."""
  length_n = source.lengths
  for first in range(0, len(source), _BLOCK):
    length_C = length_n[first : first + _BLOCK]
    bad = np.flatnonzero(length_C != width)
    if bad.size:
      raise DataError(
        f"{source.name}: sequence {first + bad[0]} has {length_C[bad[0]]} "
        f"tokens: expected length + 1 = {width} with packing='rows'"
      )


class FilledRows(NamedTuple):
  """Rows that were read, and the pieces that they were filled from.

  Attributes:
    tokens_RW: the tokens, int32; 0 in padding.
    pieces: the pieces of documents.
    row_P: the row of each piece, int64.
  """

  tokens_RW: np.ndarray
  pieces: Pieces
  row_P: np.ndarray

  def segments_RW(self) -> np.ndarray:
    """Return the number of the piece at each place of a row: int32 (R, W).

    Pieces are numbered from 1 in each row; padding is 0.
    """
    shape = self.tokens_RW.shape
    first_N = np.zeros(self.tokens_RW.size, np.int32)
    first_N[self.pieces.place_P] = 1
    number_RW = np.cumsum(first_N.reshape(shape), axis=1, dtype=np.int32)
    used_R = np.bincount(self.row_P, self.pieces.length_P, minlength=shape[0])
    number_RW[np.arange(shape[1]) >= used_R[:, None]] = 0
    return number_RW


def fill_rows(
  source: TokenSource, plan: packing.RowPlan, row_R: np.ndarray
) -> FilledRows:
  """Read rows of a plan.

  Args:
    source: the data set.
    plan: the plan of its rows.
    row_R: the numbers of the rows, int64.

  Raises:
    DataError: see `fill_pieces`.
  """
  return fill_pieces(source, *plan.pieces(row_R), (len(row_R), plan.width))


def fill_pieces(
  source: TokenSource,
  pieces: Pieces,
  row_P: np.ndarray,
  shape: tuple[int, int],
) -> FilledRows:
  """Read pieces of documents into rows.

  Args:
    source: the data set.
    pieces: the pieces, and their places in the rows.
    row_P: the row of each piece.
    shape: (R, W).

  Raises:
    DataError: a file cannot be read, or a token is outside the vocabulary.
  """
  tokens_N = np.zeros(shape[0] * shape[1], np.int32)
  source.fill(pieces, tokens_N)
  _check_tokens(source, pieces, tokens_N)
  return FilledRows(tokens_N.reshape(shape), pieces, row_P)


def _check_tokens(
  source: TokenSource, pieces: Pieces, tokens_N: np.ndarray
) -> None:
  """Raise DataError if a token is negative or outside the vocabulary."""
  limit = source.vocab_size or 2**31
  if tokens_N.min() >= 0 and tokens_N.max() < limit:
    return
  bad = int(np.flatnonzero((tokens_N < 0) | (tokens_N >= limit))[0])
  piece = int(np.argmax(np.where(pieces.place_P <= bad, pieces.place_P, -1)))
  place = int(pieces.start_P[piece] + bad - pieces.place_P[piece])
  raise DataError(
    f"{source.name}: document {pieces.document_P[piece]}, token {place}: "
    f"{tokens_N[bad]}: expected 0 to {limit - 1}"
  )
