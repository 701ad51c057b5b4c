"""Read batches ahead of training, by a thread or by processes, with a timeout.

grain does the reading ahead. `iterate` gives the batches of a range of steps in
their order, however many workers there are.
"""

from collections.abc import Callable, Iterator
import math
from multiprocessing import resource_tracker
import re
import signal
import threading
import time
from typing import Any, Self, TypeVar

from absl import flags
import grain

from rebased_jax.find_trainer import in_worker
from train.data.batches import Batch, Batches, row_bounds
from train.data.checks import require
from train.data.worker_process import end_with_parent

_T = TypeVar("_T")


_HURRIED = 5.0  # seconds that a hurried wait may still take


class DataTimeout(TimeoutError):
  """A batch did not come in time; its thread still waits for it.

  Attributes:
    exit_code: that of the process: 1, or 128 + N if signal N ended the wait.
  """

  exit_code = 1


class _Span:
  """Random access to the batches of the steps start..stop-1, for grain."""

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

  def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
    # A worker process may find a user's `train` before the trainer.
    args = (self._batches, self._start, self._stop, self._rows)
    return in_worker(_span_in_worker, *args), ()


def _span_in_worker(*args: Any) -> _Span:
  """Return the span that a worker process reads, and tie it to its parent."""
  end_with_parent()
  return _Span(*args)


def _next(source: Iterator[Batch]) -> Batch:
  """Return the next batch of grain's iterator, which may start its workers.

  A worker inherits the signals that this thread blocks. Ctrl-C, a lost terminal
  and SLURM send theirs to the workers as well, but it is the run that they
  stop: it needs its workers until it has saved.
  """
  blocked = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
  before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
  try:
    return next(source)
  except RuntimeError as error:
    found = re.match(
      r"Worker process was terminated .* code (-?\d+)", str(error)
    )
    if found is None:
      raise
    raise ChildProcessError(_dead_worker(int(found[1]))) from None
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _dead_worker(code: int) -> str:
  """Return what a user should know of a worker that ended with this code."""
  end = f"ended with code {code}"
  if code < 0:
    end = f"was ended by {signal.Signals(-code).name}"
  return (
    f"a worker process of the data {end}: expected it to read until the run "
    "ends; if memory was short, take fewer --data.workers"
  )


class BatchIterator(Iterator[Batch]):
  """Iterate over batches in the order of their steps, reading ahead.

  Close the iterator, or use it as a context manager, to stop the reading. If
  the data source fails, `next` raises its error and closes the iterator, so
  that no batch is ever skipped.

  Attributes:
    step: the global step of the batch that `next` returns next.
  """

  def __init__(
    self,
    span: _Span,
    start: int,
    workers: int = 0,
    timeout: float | None = None,
    hurried: Callable[[], bool] | None = None,
  ) -> None:
    self.step = start
    self._timeout, self._hurried = timeout, hurried
    self._closed = False
    self._source = None
    if len(span):
      options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
      data = grain.MapDataset.source(span).to_iter_dataset(options)
      if workers:
        # grain's worker processes read absl flags, which must be parsed.
        if not flags.FLAGS.is_parsed():
          flags.FLAGS.mark_as_parsed()
        # Send batches through pipes. Shared memory would stay allocated after
        # a run that is stopped early.
        pipes = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        data = grain.experimental.WithOptionsIterDataset(data, pipes)
        data = data.mp_prefetch(grain.MultiprocessingOptions(workers, 2))
        # It starts with the first worker, and then unblocks SIGINT in the
        # thread that starts it, so that the first worker would hear Ctrl-C.
        resource_tracker.ensure_running()
      self._source = iter(data)

  def __next__(self) -> Batch:
    """Return the next batch; ValueError if the iterator is closed."""
    if self._closed:
      raise ValueError(f"the batch iterator was closed at step {self.step}")
    if self._source is None:
      raise StopIteration
    source, what = self._source, f"the batch of step {self.step}"
    try:
      batch = within(self._timeout, what, lambda: _next(source), self._hurried)
    except StopIteration:
      raise
    except DataTimeout:
      # Closing the source would wait for the read that hangs.
      self._closed, self._source = True, None
      raise
    except BaseException:
      self.close()
      raise
    self.step += 1
    return batch

  def close(self) -> None:
    """Stop reading ahead; a second call does nothing."""
    if not self._closed and self._source is not None:
      self._source.close()
    self._closed, self._source = True, None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def iterate(
  batches: Batches,
  *,
  start: int,
  stop: int,
  rows: slice | None = None,
  workers: int = 0,
  timeout: float | None = None,
  hurried: Callable[[], bool] | None = None,
) -> BatchIterator:
  """Iterate over the batches of the global steps start..stop-1.

  Args:
    batches: the data source.
    start: the first step; a resumed run passes the step it continues from.
    stop: the step after the last; `stop == start` gives an empty iterator.
    rows: the rows of each batch that this process reads; None for all.
    workers: the number of processes that read ahead; 0 for one thread. The
      batches and their order do not depend on it. With worker processes,
      `batches` must pickle.
    timeout: seconds that `next` waits for a batch before it raises
      DataTimeout; None to wait without a limit.
    hurried: whether a signal asks for an end. A wait then ends after 5 s at
      most. None: never.

  Returns:
    An iterator to be closed, also a context manager.

  Raises:
    ValueError: `start`, `stop`, `rows` or `workers` is outside its range.
  """
  limit = batches.num_batches
  require(start >= 0, "start", start, "a step, 0 or more")
  require(stop >= start, "stop", stop, f"start={start} or more")
  require(workers >= 0, "workers", workers, "0 or more")
  if limit is not None:
    require(start <= limit, "start", start, f"at most the {limit} batches")
    require(stop <= limit, "stop", stop, f"at most the {limit} batches")
  bounds = slice(*row_bounds(rows, batches.rows))
  span = _Span(batches, start, stop, bounds)
  return BatchIterator(span, start, workers, timeout, hurried)


def within(
  seconds: float | None,
  what: str,
  function: Callable[[], _T],
  hurried: Callable[[], bool] | None = None,
) -> _T:
  """Call a function, and wait for it for a limited time.

  The function runs in a thread, which Python cannot stop. After a DataTimeout
  the process should save what it has and end by `os._exit`.

  Args:
    seconds: how long to wait; None waits for any time.
    what: names what is waited for, for the message.
    function: takes no arguments.
    hurried: shortens the wait to 5 s from the time that it returns True. It is
      called a few times a second. None: it is not shortened.

  Returns:
    What the function returns. An error that it raises is raised here.

  Raises:
    DataTimeout: the function has not returned in time.
  """
  if seconds is None and hurried is None:
    return function()  # in this thread
  result: list[tuple[_T | None, BaseException | None]] = []

  def run() -> None:
    try:
      result.append((function(), None))
    except BaseException as error:  # noqa: BLE001
      result.append((None, error))

  thread = threading.Thread(target=run, name="read", daemon=True)
  thread.start()
  limit = f"within {seconds or 0:g} s (data.timeout)"
  left = math.inf if seconds is None else seconds
  end, is_hurried = time.monotonic() + left, False
  while thread.is_alive() and left > 0:
    thread.join(min(left, 0.2))
    if not is_hurried and hurried is not None and hurried():
      end, is_hurried = min(end, time.monotonic() + _HURRIED), True
      limit = f"within {_HURRIED:g} s after a signal"
    left = end - time.monotonic()
  if not result:
    raise DataTimeout(f"{what} has not come {limit}: the data source hangs")
  value, error = result[0]
  if error is not None:
    raise error
  return value  # pyrefly: ignore[bad-return]  # a _T wherever error is None
