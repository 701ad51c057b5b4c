"""Documents, one behind the other, cut into rows that share a token.

    stream = the tokens of all documents of a shard
    row r  = stream[r L : r L + L + 1]          as `plan.StreamRows` cuts them

Every token but the first is a target once; what is left behind the last row is
in none, and is counted.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np


@dataclasses.dataclass
class RowCutter:
  """Takes documents in their order and gives rows of `length` + 1 tokens.

  Attributes:
    length: L, the inputs of a row, 1 or more.
    rows: how many were given.
  """

  length: int
  rows: int = 0
  _held: np.ndarray | None = None  # what no row has ended with yet

  def cut(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The rows that one more document fills, of its dtype: (L + 1,)."""
    L = self.length
    if self._held is not None:
      tokens = np.concatenate([self._held, tokens])
    count = max(tokens.size - 1, 0) // L
    self._held = tokens[count * L :].copy()
    for row in range(count):
      yield tokens[row * L : row * L + L + 1]
    self.rows += count

  @property
  def left_over(self) -> int:
    """The tokens behind the last row: 0 to L."""
    held = 0 if self._held is None else self._held.size
    return held - (self.rows > 0)
