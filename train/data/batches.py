"""Global batches as pure functions of the step, and their iteration.

The state of the data is one integer, the global step: `batches[step]` holds
the same rows in the same order on one host and on many, and after a resume.
A host reads only its own rows of it:

    step 3, 8 rows    host 0 of 2: slice(0, 4)    host 1 of 2: slice(4, 8)

A batch is a dict of arrays with the rows first. Recall batches hold

    tokens     int32    (B, T)
    positions  int32    (B, M)   the predicted positions of a row, ascending
    targets    int32    (B, M)   the targets at these positions
    weights    float32  (B, M)   1 for a real target, 0 in a padding row

and language-model batches `tokens`, `targets` and `weights`, all (B, T).
"""

import abc
from collections.abc import Iterator, Mapping
import types
from typing import Self

from absl import flags
import grain
import numpy as np

from train.data.checks import require as require
from train.data.timeout import DataTimeout, within

Batch = dict[str, np.ndarray]
Fingerprint = dict[str, int | str | float]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def hash64(*words: int | np.ndarray) -> np.ndarray:
  """One 64-bit hash per broadcast tuple of words: splitmix64, chained.

  Args:
    *words: integers in [0, 2**64), or integer arrays that broadcast.

  Returns:
    uint64, of the broadcast shape; (1,) if every word is a plain integer.
  """
  state = np.zeros(1, np.uint64)
  for word in words:
    state = state + np.asarray(word).astype(np.uint64) + _GOLDEN
    _finalize(state)
  return state


def hash64_slots(state_B: np.ndarray, slots: int) -> np.ndarray:
  """The first `slots` outputs of splitmix64 started at each state.

  Args:
    state_B: uint64 (B,).
    slots: the number of outputs S.

  Returns:
    uint64 (B, S).
  """
  hash_BS = state_B[:, None] + _GOLDEN * np.arange(1, slots + 1, dtype="uint64")
  _finalize(hash_BS)
  return hash_BS


def _finalize(x: np.ndarray) -> None:
  """The finalizer of splitmix64, in place."""
  scratch = np.empty_like(x)
  for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, None)):
    np.right_shift(x, np.uint64(shift), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    if factor is not None:
      np.multiply(x, factor, out=x)


class Batches(abc.ABC):
  """Global batches: `batches[step]` is a pure function of the step.

  Attributes:
    rows: the rows of one global batch.
  """

  rows: int

  @property
  @abc.abstractmethod
  def length(self) -> int:
    """The tokens of one row."""

  @property
  @abc.abstractmethod
  def num_batches(self) -> int | None:
    """The number of batches, None if unlimited."""

  @property
  @abc.abstractmethod
  def fingerprint(self) -> Fingerprint:
    """Flat named fields: equal fingerprints give equal batches.

    Whatever changes a batch changes a field, the version of the code that
    makes the rows included. The values survive a round trip through JSON.
    """

  @abc.abstractmethod
  def _read(self, step: int, start: int, stop: int) -> Batch:
    """Rows start..stop-1 of the batch at a step that was checked."""

  def read(self, step: int, rows: slice | None = None) -> Batch:
    """The given rows of the global batch at `step`.

    Args:
      step: the global step.
      rows: a slice inside [0, self.rows] without a stride; None for all.

    Returns:
      Arrays that the caller may change.

    Raises:
      IndexError: `step` is negative or past the last batch.
      ValueError: `rows` is empty, strided or reaches outside the batch.
    """
    limit = self.num_batches
    if step < 0 or (limit is not None and step >= limit):
      raise IndexError(f"step={step}: there are {limit} batches, from step 0")
    return self._read(step, *_bounds(rows, self.rows))

  def __getitem__(self, step: int) -> Batch:
    """The whole global batch at `step`; IndexError outside the range."""
    return self.read(step)


def check_fingerprint(saved: Mapping, current: Mapping) -> None:
  """Raises a ValueError that names every field in which the two differ."""
  fields = [*saved, *(field for field in current if field not in saved)]
  changes = [
    f"{field} was {saved.get(field)!r} and is {current.get(field)!r}"
    for field in fields
    if saved.get(field) != current.get(field)
  ]
  if changes:
    raise ValueError(f"the data has changed: {'; '.join(changes)}")


def _bounds(rows: slice | None, limit: int) -> tuple[int, int]:
  """First and past-the-last row of a slice of [0, limit)."""
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


class _Span:
  """Random access to the batches of the steps start..stop-1."""

  def __init__(
    self, batches: Batches, start: int, stop: int, rows: slice
  ) -> None:
    self._batches = batches
    self._start = start
    self._stop = stop
    self._rows = rows

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int) -> Batch:
    return self._batches.read(self._start + int(index), self._rows)


class BatchIterator(Iterator[Batch]):
  """Batches in the order of the steps, prefetched by a thread or by processes.

  Close it, or use it as a context manager: that stops them. An error in the
  source is raised by `next`, which then closes the iterator, so that no batch
  is ever skipped.

  Attributes:
    step: the global step of the batch that `next` returns next.
  """

  def __init__(
    self,
    span: _Span,
    start: int,
    workers: int = 0,
    timeout: float | None = None,
  ) -> None:
    self.step = start
    self._timeout = timeout
    self._closed = False
    self._source = None
    if len(span):
      options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
      data = grain.MapDataset.source(span).to_iter_dataset(options)
      if workers:
        if not flags.FLAGS.is_parsed():  # the processes take grain's flags
          flags.FLAGS.mark_as_parsed()
        # Through pipes: shared memory outlives a run that stops early.
        pipes = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        data = grain.experimental.WithOptionsIterDataset(data, pipes)
        data = data.mp_prefetch(grain.MultiprocessingOptions(workers, 2))
      self._source = iter(data)

  def __next__(self) -> Batch:
    """The next batch; ValueError if the iterator is closed."""
    if self._closed:
      raise ValueError(f"the batch iterator was closed at step {self.step}")
    if self._source is None:
      raise StopIteration
    source, what = self._source, f"the batch of step {self.step}"
    try:
      batch = within(self._timeout, what, lambda: next(source))
    except StopIteration:
      raise
    except DataTimeout:  # to close it would wait for it
      self._closed, self._source = True, None
      raise
    except BaseException:
      self.close()
      raise
    self.step += 1
    return batch

  def close(self) -> None:
    """Stops the prefetching; a second call does nothing."""
    if not self._closed and self._source is not None:
      self._source.close()
    self._closed, self._source = True, None

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    self.close()


def iterate(
  batches: Batches,
  *,
  start: int,
  stop: int,
  rows: slice | None = None,
  workers: int = 0,
  timeout: float | None = None,
) -> BatchIterator:
  """Iterates over the batches of the global steps start..stop-1.

  Args:
    batches: the batches.
    start: the first step; a resume passes the step that it continues from.
    stop: the step after the last; `start` gives an empty iterator.
    rows: the rows that this process takes of every batch; None for all.
    workers: processes that read ahead; 0 for one thread. The batches and their
      order do not depend on it. `batches` must pickle.
    timeout: seconds that `next` waits, before it raises DataTimeout and leaves
      the source alone; None: any time.

  Returns:
    A closeable iterator, also a context manager.

  Raises:
    ValueError: `start`, `stop`, `rows` or `workers` is outside of what there
      is.
  """
  limit = batches.num_batches
  require(start >= 0, "start", start, "a step, 0 or more")
  require(stop >= start, "stop", stop, f"start={start} or more")
  require(workers >= 0, "workers", workers, "0 or more")
  if limit is not None:
    require(start <= limit, "start", start, f"at most the {limit} batches")
    require(stop <= limit, "stop", stop, f"at most the {limit} batches")
  bounds = slice(*_bounds(rows, batches.rows))
  span = _Span(batches, start, stop, bounds)
  return BatchIterator(span, start, workers, timeout)
