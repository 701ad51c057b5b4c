"""Sources of tokens: numbered documents, of which any part can be read.

A source has random access: `source[i]` is document i. Rows are filled from
pieces of documents, so that a source reads no more than it must:

    place  = of the piece's first token in the buffer
    buffer[place : place + length] = document[start : start + length]
"""

import abc
from typing import NamedTuple

import numpy as np

from train.data.batches import Fingerprint


class DataError(ValueError):
  """A data set cannot be used; the message names the file and the place."""


class Pieces(NamedTuple):
  """Pieces of documents, and their places in a flat buffer.

  Attributes:
    document_P: the number of each piece's document, int64.
    start_P: its first token in the document, int64.
    length_P: the number of its tokens, int64.
    place_P: the place of its first token in the buffer, int64.
  """

  document_P: np.ndarray
  start_P: np.ndarray
  length_P: np.ndarray
  place_P: np.ndarray


class TokenSource(abc.ABC):
  """Abstract: the documents of one data set, by number."""

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """The data set's name in messages: its path."""

  @property
  @abc.abstractmethod
  def lengths(self) -> np.ndarray:
    """The number of tokens of each document: int (n,).

    It may be computed at each use, so that it takes no memory between them.
    """

  @property
  @abc.abstractmethod
  def vocab_size(self) -> int | None:
    """The vocabulary size; None if the files do not say."""

  @property
  def row_length(self) -> int | None:
    """L if the documents are rows of L + 1 tokens; None if they are not."""
    return None

  @property
  @abc.abstractmethod
  def fingerprint(self) -> Fingerprint:
    """Named values that identify the tokens.

    Equal fingerprints mean equal tokens, except for changes that a sample of
    the bytes misses.
    """

  @abc.abstractmethod
  def __len__(self) -> int:
    """Return the number of documents."""

  def check_tokens(self, vocab_size: int) -> None:
    """Look for tokens outside a model's vocabulary before training.

    The default is for a source that knows its `vocab_size`.

    Args:
      vocab_size: the vocabulary size V of the model.

    Raises:
      DataError: some token is not in [0, V).
    """
    if self.vocab_size is not None and self.vocab_size > vocab_size:
      raise DataError(
        f"{self.name}: its vocabulary has {self.vocab_size} tokens: expected "
        f"at most {vocab_size}, the model's vocabulary; set a larger "
        "--model.vocab-size"
      )

  @abc.abstractmethod
  def verify(self) -> None:
    """Read every byte and compare the checksums.

    Raises:
      DataError: a file changed since it was made, or there are no checksums.
    """

  @abc.abstractmethod
  def length_of(self, document: int) -> int:
    """Return the number of tokens of a document, which must exist."""

  @abc.abstractmethod
  def fill(self, pieces: Pieces, out_N: np.ndarray) -> None:
    """Write the tokens of pieces to their places in a buffer.

    Args:
      pieces: none is empty, and each lies inside its document.
      out_N: int32 (N,); places outside the pieces are not written.

    Raises:
      DataError: a file does not hold what its index says.
    """

  def __getitem__(self, document: int) -> np.ndarray:
    """Return all tokens of a document, int32 (length,); or IndexError."""
    index = int(document)
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no document {index} of {len(self)}")
    length = self.length_of(index)
    out_N = np.empty(length, np.int32)
    if length:
      zero, whole = np.array([0]), np.array([length])
      self.fill(Pieces(np.array([index]), zero, whole, zero), out_N)
    return out_N
