"""Batches made of other batches."""

import dataclasses

from train.data.batches import Batches, Fingerprint


@dataclasses.dataclass(frozen=True)
class WrappedBatches(Batches):
  """Abstract: batches that differ from others in `read_rows`.

  A subclass that changes values overrides `fingerprint` too.

  Attributes:
    inner: the other batches.
  """

  inner: Batches

  @property
  def rows(self) -> int:
    """The number of rows of one global batch."""
    return self.inner.rows

  @property
  def length(self) -> int:
    """The number of input tokens of a row."""
    return self.inner.length

  @property
  def num_batches(self) -> int | None:
    """The number of batches; None if there is no end."""
    return self.inner.num_batches

  @property
  def fingerprint(self) -> Fingerprint:
    """The fingerprint of the other batches."""
    return self.inner.fingerprint

  def place(self, step: int, row: int, name: str, column: int) -> str:
    """Return where a value comes from; see `Batches.place`."""
    return self.inner.place(step, row, name, column)
