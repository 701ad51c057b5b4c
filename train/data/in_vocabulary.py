"""Check that a model has an embedding for every token of each batch.

The embedding of a token outside the vocabulary is NaN, so the loss is too. The
message of a step that is not finite would not lead to the data, and a run with
`nan="skip"` would leave out such batches without a word.
"""

import dataclasses

import numpy as np

from train.data.batches import Batch, Batches, Fingerprint
from train.data.text.token_source import DataError


@dataclasses.dataclass(frozen=True)
class InVocabulary(Batches):
  """Batches whose tokens are checked when they are read.

  Attributes:
    inner: the batches.
    vocab_size: the vocabulary size V of the model.
  """

  inner: Batches
  vocab_size: int

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
    """The fingerprint of the batches, which the check does not change."""
    return self.inner.fingerprint

  def place(self, step: int, row: int, name: str, column: int) -> str:
    """Return where a value comes from; see `Batches.place`."""
    return self.inner.place(step, row, name, column)

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    """Return rows of a batch; DataError as `check_tokens` describes."""
    batch = self.inner.read(step, slice(start, stop))
    check_tokens(self.inner, step, start, batch, self.vocab_size)
    return batch


def check_tokens(
  batches: Batches, step: int, start: int, batch: Batch, vocab_size: int
) -> None:
  """Check the inputs of rows, and the targets that have a weight.

  Args:
    batches: where the rows come from.
    step: the step of the batch.
    start: the first row.
    batch: the rows.
    vocab_size: the vocabulary size V of the model.

  Raises:
    DataError: a token is not in [0, V). The message names its place.
  """
  for name in ("tokens", "targets"):
    token_BX = batch[name]
    if token_BX.min() >= 0 and token_BX.max() < vocab_size:
      continue
    bad_BX = (token_BX < 0) | (token_BX >= vocab_size)
    if name == "targets":
      bad_BX &= batch["weights"] != 0
    if not bad_BX.any():
      continue
    row, column = (int(x) for x in np.argwhere(bad_BX)[0])
    raise DataError(
      f"{batches.place(step, start + row, name, column)}: the token is "
      f"{token_BX[row, column]}: expected 0 to {vocab_size - 1}, the model's "
      "vocabulary; correct the data or set a larger --model.vocab-size"
    )
