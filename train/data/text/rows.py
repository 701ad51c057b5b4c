"""From a path and a layout to rows of tokens."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from train.data.checks import require
from train.data.text import packing as plans
from train.data.text.prepared_source import PreparedSource
from train.data.text.megatron_source import MegatronSource, Unit
from train.data.text.packing_cache import Arrays, cached
from train.data.text.token_source import DataError, Pieces, TokenSource

Packing = Literal["stream", "documents", "rows"]
PACKINGS = ("stream", "documents", "rows")
HeldOut = Literal["documents", "end"]
HELD_OUT = ("documents", "end")

_VERSION = 1  # of the plans
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Layout:
  """How rows are made of documents; ValueError where there are none.

  Attributes:
    length: L, the inputs of a row, which has L + 1 tokens.
    packing: "stream", "documents" or "rows", see `plan.py`.
    validation: the fraction held out for validation.
    test: the fraction held out for tests.
    held_out: what of a stream is held out: "documents", some of all, or "end",
      its last rows, of whatever documents, a single one among them. Ready rows
      are held out from the end.
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
  """The data set at a path: a prepared folder, or a Megatron index.

  A set that has not changed since is opened once in a process. With the
  packing "rows" the documents of an index are its sequences.

  Raises:
    DataError: there is none, or it is not sound.
  """
  place = Path(path)
  if place.is_dir():
    stamp = _stamp(place, "dataset.json", "*.arrayrecord", "*.npy")
    return _opened_prepared(os.fspath(place), stamp)
  if place.suffix == ".idx" and place.exists():
    unit = "sequence" if packing == "rows" else "document"
    stamp = _stamp(place.parent, place.name, f"{place.stem}*.bin")
    return _opened_megatron(os.fspath(place), unit, stamp)
  raise DataError(f"{path}: expected a prepared folder or a Megatron .idx file")


def _stamp(folder: Path, *patterns: str) -> tuple:
  """Names, sizes, times and numbers of the files of a data set."""
  found = sorted({x for pattern in patterns for x in folder.glob(pattern)})
  stats = ((path.name, path.stat()) for path in found)
  return tuple((name, x.st_size, x.st_mtime_ns, x.st_ino) for name, x in stats)


@functools.lru_cache(maxsize=16)
def _opened_prepared(path: str, stamp: tuple) -> PreparedSource:
  return PreparedSource(path)


@functools.lru_cache(maxsize=16)
def _opened_megatron(path: str, unit: Unit, stamp: tuple) -> MegatronSource:
  return MegatronSource(path, unit)


def make_plan(
  source: TokenSource, layout: Layout, split: str, cache_dir: Path
) -> plans.Plan:
  """The plan of one split of a data set, from the cache where it can be.

  Raises:
    DataError: the packing is "rows" and a document has another length, or the
      data set is of rows and the packing is not.
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
    whole: plans.Plan = plans.FixedRows(width, len(source))
    return plans.split_rows(whole, split, *fractions)
  if layout.held_out == "end" and fractions != (0, 0):
    all_rows = Layout(layout.length, layout.packing, validation=0.0)
    whole = make_plan(source, all_rows, "train", cache_dir)
    return plans.split_rows(whole, split, *fractions)
  packed = layout.packing == "documents"
  make = plans.packed_plan if packed else plans.stream_plan

  def arrays() -> Arrays:
    chosen_n = plans.split_documents(len(source), split, *fractions)
    return make(width, source.lengths, chosen_n).arrays()

  key = {
    "plan": _VERSION,
    **dataclasses.asdict(layout),
    "split": split,
    **source.fingerprint,
  }
  kind = plans.PackedRows if packed else plans.StreamRows
  return kind(width, **cached(key, arrays, cache_dir))


def _check_rows(source: TokenSource, width: int) -> None:
  """Raises DataError where a document is no row."""
  for first in range(0, len(source), _CHUNK):
    length_C = source.lengths[first : first + _CHUNK]
    bad = np.flatnonzero(length_C != width)
    if bad.size:
      raise DataError(
        f"{source.name}: sequence {first + bad[0]} has {length_C[bad[0]]} "
        f"tokens: expected length + 1 = {width} with packing='rows'"
      )


class FilledRows(NamedTuple):
  """Rows of a plan: their tokens, and where they came from."""

  tokens_RW: np.ndarray  # int32, 0 in padding
  pieces: Pieces
  row_P: np.ndarray

  def segments_RW(self) -> np.ndarray:
    """The number of the piece at each place of a row, from 1; 0 in padding."""
    shape = self.tokens_RW.shape
    first_N = np.zeros(self.tokens_RW.size, np.int32)
    first_N[self.pieces.place_P] = 1
    number_RW = np.cumsum(first_N.reshape(shape), axis=1, dtype=np.int32)
    used_R = np.bincount(self.row_P, self.pieces.length_P, minlength=shape[0])
    number_RW[np.arange(shape[1]) >= used_R[:, None]] = 0
    return number_RW


def fill_rows(
  source: TokenSource, plan: plans.Plan, row_R: np.ndarray
) -> FilledRows:
  """Reads rows of a plan; raises like `fill_pieces`."""
  return fill_pieces(source, *plan.pieces(row_R), (len(row_R), plan.width))


def fill_pieces(
  source: TokenSource,
  pieces: Pieces,
  row_P: np.ndarray,
  shape: tuple[int, int],
) -> FilledRows:
  """Reads pieces into rows of this shape (R, W).

  Raises:
    DataError: a file cannot be read, or a token is outside of the vocabulary.
  """
  tokens_N = np.zeros(shape[0] * shape[1], np.int32)
  source.fill(pieces, tokens_N)
  _check_tokens(source, pieces, tokens_N)
  return FilledRows(tokens_N.reshape(shape), pieces, row_P)


def _check_tokens(
  source: TokenSource, pieces: Pieces, tokens_N: np.ndarray
) -> None:
  """Raises DataError where a token is negative or beyond the vocabulary."""
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
