"""Check that a model has an embedding for every token of each batch.

The embedding of a token outside the vocabulary is NaN, so the loss is too. The
message of a step that is not finite would not lead to the data, and a run with
`nan="skip"` would leave out such batches without a word.
"""

import dataclasses

import numpy as np

from train.data.batches import Batch, Batches
from train.data.text.token_source import DataError
from train.data.wrapped_batches import WrappedBatches


@dataclasses.dataclass(frozen=True)
class InVocabulary(WrappedBatches):
  """Batches whose tokens are checked when they are read.

  Attributes:
    inner: the batches.
    vocab_size: the vocabulary size V of the model.
  """

  vocab_size: int

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
