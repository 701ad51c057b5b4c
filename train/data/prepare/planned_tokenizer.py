"""The tokenizer of each worker: loaded by its name, and the planned one."""

import dataclasses

from train.data.prepare import tokenizer
from train.data.prepare.shard import DataError
from train.data.prepare.tokenizer import Tokenizer, TokenizerSpec


@dataclasses.dataclass(frozen=True)
class Planned:
  """Which tokenizer the workers have to load.

  Attributes:
    name: for `tokenizer.load`.
    eos: as `tokenizer.load` takes it.
    spec: what it has to be.
  """

  name: str
  eos: str
  spec: TokenizerSpec

  def load(self) -> Tokenizer:
    """The tokenizer; DataError if it is not there, or is another one here."""
    try:
      found = tokenizer.load(self.name, self.eos)
    except ValueError as error:
      raise DataError(str(error)) from error
    if found.spec != self.spec:
      raise DataError(
        f"{self.name}: the tokenizer changed while it was used, or is another "
        "one on this worker"
      )
    return found
