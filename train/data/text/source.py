"""Sources of tokens: numbered documents, of which any part can be read.

A source is a grain random-access source, `source[i]` is document i. Rows are
filled from pieces of documents, so a source reads no more than it must:

    place  = of the piece's first token in the buffer
    buffer[place : place + length] = document[start : start + length]
"""

import abc
from collections.abc import Sequence
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.batches import Fingerprint

_BLOCKS = 64
_BLOCK_BYTES = 4096


class DataError(ValueError):
  """A data set cannot be used; the message names the file and the place."""


class Pieces(NamedTuple):
  """Parts of documents and their places in a flat buffer, all int64 (P,)."""

  document_P: np.ndarray
  start_P: np.ndarray
  length_P: np.ndarray
  place_P: np.ndarray


class TokenSource(abc.ABC):
  """Documents of one data set, by number."""

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """What messages call it: its path."""

  @property
  @abc.abstractmethod
  def lengths(self) -> np.ndarray:
    """The tokens of each document: int64 (n,), read-only."""

  @property
  @abc.abstractmethod
  def vocab_size(self) -> int | None:
    """The size of the vocabulary, None where the files do not say."""

  @property
  def row_length(self) -> int | None:
    """L where the files say that documents are rows of L + 1, else None."""
    return None

  @property
  @abc.abstractmethod
  def fingerprint(self) -> Fingerprint:
    """Named fields: equal ones mean, but for what no sample can see, equal
    tokens."""

  @abc.abstractmethod
  def __len__(self) -> int:
    """The number of documents."""

  @abc.abstractmethod
  def fill(self, pieces: Pieces, out_N: np.ndarray) -> None:
    """Writes the tokens of pieces to their places.

    Args:
      pieces: none empty, all inside of their documents.
      out_N: int32 (N,), written where a piece lies.

    Raises:
      DataError: a file does not hold what its index says.
    """

  def __getitem__(self, document: int) -> np.ndarray:
    """All tokens of a document: int32 (length,); IndexError outside."""
    index = int(document)
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no document {index} of {len(self)}")
    length = int(self.lengths[index])
    out_N = np.empty(length, np.int32)
    if length:
      words = (np.array([x]) for x in (index, 0, length, 0))
      self.fill(Pieces(*words), out_N)
    return out_N


def array_hash(*arrays: np.ndarray) -> str:
  """The SHA-256 of the bytes of arrays, one after the other."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(np.ascontiguousarray(array).view(np.uint8))
  return digest.hexdigest()


def sampled_hash(paths: Sequence[Path]) -> str:
  """The SHA-256 of 64 blocks of 4 KiB, spread evenly over all the files.

  The first and the last block are among them; files of up to 256 KiB together
  are hashed whole. A change between the blocks is not seen.
  """
  sizes = [path.stat().st_size for path in paths]
  total = sum(sizes)
  if total <= _BLOCKS * _BLOCK_BYTES:
    places = list(range(0, total, _BLOCK_BYTES))
  else:
    last = total - _BLOCK_BYTES
    places = [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
  digest, first = hashlib.sha256(), 0
  for path, size in zip(paths, sizes, strict=True):
    with path.open("rb") as file:
      for place in places:
        begin, end = max(place, first), min(place + _BLOCK_BYTES, first + size)
        if begin < end:
          file.seek(begin - first)
          digest.update(file.read(end - begin))
    first += size
  return digest.hexdigest()


def sizes_hash(paths: Sequence[Path]) -> str:
  """The SHA-256 of the names and sizes of files, in their order."""
  text = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
  return hashlib.sha256(text.encode()).hexdigest()
