"""Sources of tokens: numbered documents, of which any part can be read.

A source is a grain random-access source, `source[i]` is document i. Rows are
filled from pieces of documents, so a source reads no more than it must:

    place  = of the piece's first token in the buffer
    buffer[place : place + length] = document[start : start + length]
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.data.batches import Fingerprint


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
