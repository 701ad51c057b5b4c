"""Batches: the interface between a data source and training.

A data source gives global batches by number. `batches[step]` depends on the
step alone, so a resumed run needs to know nothing but its step. It holds the
same rows in the same order on one host and on many, and each host reads its
own rows of it:

    step 3, 8 rows    host 0 of 2: slice(0, 4)    host 1 of 2: slice(4, 8)

A batch is a dict of NumPy arrays whose first axis is the row. Training reads
one of two forms. Recall tasks predict M positions of each row of T tokens:

    tokens       int32    (B, T)
    positions    int32    (B, M)   predicted positions of a row, ascending
    targets      int32    (B, M)   the target at each of these positions
    weights      float32  (B, M)   1 for a real target, 0 in a padding row

Language models predict every position:

    tokens       int32    (B, T)
    targets      int32    (B, T)
    weights      float32  (B, T)   1 for a real target, else 0
    segment_ids  int32    (B, T)   document of each token; optional
"""

import abc
from collections.abc import Mapping
import json

import numpy as np

Batch = dict[str, np.ndarray]
Fingerprint = dict[str, int | str | float]


class Batches(abc.ABC):
  """Abstract: global batches, each a pure function of its step.

  A subclass gives `rows`, `length`, `num_batches`, `fingerprint` and
  `read_rows`. Callers use `read` or `batches[step]`, which check their
  arguments and the arrays. To be read by worker processes it must pickle.

      @dataclasses.dataclass(frozen=True)
      class Counting(Batches):
        rows: int
        length: int = 16

        @property
        def num_batches(self):
          return None

        @property
        def fingerprint(self):
          return {"data": "counting", "version": 1, "rows": self.rows}

        def read_rows(self, step, start, stop):
          first_B = step * self.rows + np.arange(start, stop, dtype=np.int32)
          row_BW = (first_B[:, None] + np.arange(17, dtype=np.int32)) % 100
          return {
            "tokens": row_BW[:, :-1],
            "targets": row_BW[:, 1:],
            "weights": np.ones((stop - start, 16), np.float32),
          }

  Attributes:
    rows: the number of rows B of one global batch; a field or a property.
    length: the number of input tokens T of one row; a field or a property.
  """

  rows: int
  length: int

  @property
  @abc.abstractmethod
  def num_batches(self) -> int | None:
    """The number of batches; None if there is no end."""

  @property
  @abc.abstractmethod
  def fingerprint(self) -> Fingerprint:
    """Named values that identify the batches.

    Equal fingerprints must mean equal batches. Include everything that a batch
    depends on: the rows, the seed, hashes of files, and a version that you
    raise when you change the code. A run refuses to resume if a value changed,
    and names it. Values must survive a round trip through JSON.
    """

  @abc.abstractmethod
  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    """Return the rows start..stop-1 of the global batch at `step`.

    Args:
      step: the global step, in [0, num_batches).
      start: the first row.
      stop: the row after the last, above `start` and at most `rows`.

    Returns:
      New arrays, which the caller may change, with stop - start rows each.
    """

  def place(self, step: int, row: int, name: str, column: int) -> str:
    """Return where a value of a batch comes from, for messages.

    By default this is its place in the batch. A subclass may name a file.

    Args:
      step: the global step.
      row: the row of the global batch.
      name: the name of the array.
      column: the value's place in the row of that array.
    """
    return f"step {step}, row {row}, {name}[{column}]"

  def read(self, step: int, rows: slice | None = None) -> Batch:
    """Return the given rows of the global batch at `step`.

    Args:
      step: the global step.
      rows: a slice of the rows, without a stride; None for all rows.

    Returns:
      Arrays that the caller may change.

    Raises:
      IndexError: `step` is negative or past the last batch.
      ValueError: `rows` is empty, strided or outside the batch, or `read_rows`
        returned an array with another number of rows.
    """
    limit = self.num_batches
    if step < 0 or (limit is not None and step >= limit):
      raise IndexError(f"step={step}: there are {limit} batches, from step 0")
    start, stop = row_bounds(rows, self.rows)
    batch = self.read_rows(step, start, stop)
    for name, array in batch.items():
      if array.shape[:1] != (stop - start,):
        raise ValueError(
          f"{type(self).__name__}.read_rows: {name} has shape {array.shape}: "
          f"expected {stop - start} rows in the first axis"
        )
    return batch

  def __getitem__(self, step: int) -> Batch:
    """Return the whole global batch at `step`; IndexError outside the range."""
    return self.read(step)


def row_bounds(rows: slice | None, limit: int) -> tuple[int, int]:
  """Return the first row of a slice of [0, limit) and the row after its last.

  Raises:
    ValueError: the slice is empty, strided or not inside [0, limit).
  """
  if rows is None:
    return 0, limit
  start = 0 if rows.start is None else rows.start
  stop = limit if rows.stop is None else rows.stop
  if rows.step not in (None, 1) or not 0 <= start < stop <= limit:
    raise ValueError(
      f"rows={rows}: expected a non-empty slice without a stride"
      f" inside the {limit} rows of a batch"
    )
  return start, stop


def check_storable(batches: Batches) -> None:
  """Check that a checkpoint can hold the fingerprint of batches.

  Raises:
    ValueError: a value does not survive a round trip through JSON; the message
      names it.
  """
  for name, value in batches.fingerprint.items():
    try:
      same = bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
      same = False
    if not same:
      raise ValueError(
        f"{type(batches).__name__}.fingerprint[{name!r}] is a value of type "
        f"{type(value).__name__}: expected one that JSON keeps: a string or a "
        "finite number"
      )


def check_fingerprint(saved: Mapping, current: Mapping) -> None:
  """Check that data is what it was.

  Args:
    saved: the fingerprint of a checkpoint or a file.
    current: the fingerprint of the data as it is now.

  Raises:
    ValueError: the two differ; the message names every field that does.
  """
  fields = [*saved, *(field for field in current if field not in saved)]
  changes = [
    f"{field} was {saved.get(field)!r} and is {current.get(field)!r}"
    for field in fields
    if saved.get(field) != current.get(field)
  ]
  if changes:
    raise ValueError(f"the data has changed: {'; '.join(changes)}")
