"""Make shards with a pool of processes, and show the progress."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import functools
import multiprocessing
from multiprocessing.connection import wait
import os
from pathlib import Path
import signal
import threading
import time
from types import FrameType
from typing import Any, NamedTuple

from rich import progress
from rich.console import Console

from rebased_jax.find_trainer import in_worker
from train.console import say
from train.data.prepare.output_folder import WORK
from train.data.prepare.shard import (
  Job,
  PlannedTokenizer,
  PrepareError,
  Stopped,
  write_shard,
)
from train.data.prepare.tokenizer import Tokenizer
from train.data.worker_process import end_with_parent

_POLL = 0.1  # seconds between two checks of the workers
_LAST = 30.0  # seconds that a worker has to end when it should
_LINE = 10.0  # seconds between two lines of progress without a terminal
# A terminal and SLURM send these to the workers as well, which the main process
# then stops.
_OF_THE_GROUP = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SIGNALS = (*_OF_THE_GROUP, signal.SIGTERM)


class _Worker(NamedTuple):
  """The arguments that a worker process got when it started."""

  planned: PlannedTokenizer
  read: Any  # shared counter of the bytes that all workers have read
  stop: Any  # shared flag: true tells the workers to give up


class _Hang(PrepareError):
  """The workers make no progress."""


_worker: _Worker | None = None  # of this process; set by `_start`


def run_jobs(
  jobs: Sequence[Job],
  planned: PlannedTokenizer,
  workers: int,
  console: Console,
  timeout: float | None = None,
) -> None:
  """Make every shard; the first failure stops the others.

  Args:
    jobs: the shards to make.
    planned: the tokenizer that each process loads.
    workers: the number of processes; 0 for one on each core.
    console: shows the progress.
    timeout: seconds in which no worker reads or finishes anything, after which
      all are killed. None: never.

  Raises:
    PrepareError: the text is malformed, or a worker process died or hangs.
    OSError: a file cannot be read or written.
  """
  # Spawn, because forking a process that has threads can deadlock.
  context = multiprocessing.get_context("spawn")
  # Without a lock where this process writes: a worker that hangs may hold it.
  read, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
  others = set(multiprocessing.active_children())
  largest = sorted(jobs, key=lambda job: -job.source.bytes)
  with concurrent.futures.ProcessPoolExecutor(
    min(workers or os.cpu_count() or 1, len(jobs)),
    mp_context=context,
    initializer=in_worker(_start, planned),
    initargs=(read, stop),
  ) as pool:
    try:
      # Submitting a job may start a worker process.
      with _signals_delayed():
        futures = {pool.submit(_work, job): job for job in largest}
      _watch(futures, read, console, timeout)
    except BaseException as error:
      stop.value = 1
      # A worker that is still starting needs `read` and `stop`, so wait for it.
      seconds = 0 if isinstance(error, _Hang) else _LAST
      pool.shutdown(wait=False, cancel_futures=True)
      _end_workers(others, seconds)
      raise
    pool.shutdown(wait=False)
    _end_workers(others, _LAST)


def _end_workers(others: set[Any], seconds: float) -> None:
  """Wait for the workers to end, and kill those that do not.

  Args:
    others: the child processes that are no workers.
    seconds: how long to wait; a worker that was stopped never ends by itself.
  """
  workers = set(multiprocessing.active_children()) - others
  left = {worker.sentinel: worker for worker in workers}
  end = time.monotonic() + seconds
  while left and time.monotonic() < end:
    for sentinel in wait(list(left), end - time.monotonic()):
      del left[sentinel]
  for worker in left.values():
    worker.kill()


@contextlib.contextmanager
def _signals_delayed() -> Iterator[None]:
  """Delay the signals that stop `prepare` until the block ends.

  A child process that starts inside the block inherits a mask that blocks all
  but SIGTERM. The mask alone does not protect this process: another thread may
  take the signal, and an interrupted start prints the child's traceback.
  Handlers therefore note the signals, and they are raised again at the end.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # only the main thread receives signals
    return
  came: list[int] = []

  def note(number: int, frame: FrameType | None) -> None:
    came.append(number)

  handlers = {x: signal.signal(x, note) for x in _SIGNALS}
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for number in came[:1]:
      signal.raise_signal(number)


def _watch(
  futures: dict[concurrent.futures.Future, Job],
  read: Any,
  console: Console,
  timeout: float | None,
) -> None:
  """Show the progress until all shards are made, or raise the first failure.

  Args:
    futures: the running jobs.
    read: shared counter of the bytes that all workers have read.
    console: shows the progress.
    timeout: seconds without any progress that are waited; None for ever.

  Raises:
    _Hang: there was no progress in this time.
  """
  total = sum(job.source.bytes for job in futures.values())
  left, idle, last, then = set(futures), 0.0, (0, 0), time.monotonic()
  with _display(total, len(futures), console) as show:
    while left:
      done, left = concurrent.futures.wait(
        left, _POLL, concurrent.futures.FIRST_COMPLETED
      )
      failed = [x for x in done if x.exception() is not None]
      # Report the failure with the lowest shard number, for a stable message.
      if failed:
        error = min(failed, key=lambda x: futures[x].index).exception()
        if isinstance(error, BrokenProcessPool):
          raise PrepareError(_died(list(futures.values()))) from error
        assert error is not None
        raise error
      now = read.get_obj().value, len(futures) - len(left)
      show(*now)
      # At most a second a poll: time in which this process is stopped does not
      # count.
      passed = min(time.monotonic() - then, 1.0)
      idle = idle + passed if now == last else 0.0
      last, then = now, time.monotonic()
      if timeout is not None and idle >= timeout:
        raise _Hang(
          f"no worker has read or finished anything for {timeout:g} s "
          "(--timeout): one hangs; repeat the command to continue"
        )


def _died(jobs: Sequence[Job]) -> str:
  """Return a message about a worker that died.

  The pool does not say which worker it was. The message names the shards that
  left temporary files.
  """
  names = {
    path.name.partition(".")[0]
    for path in Path(jobs[0].out, WORK).glob("*.tmp-*")
  }
  found = sorted((x.name, x.source.name) for x in jobs if x.name in names)
  at_work = ", ".join(f"{name} of {source}" for name, source in found)
  return (
    f"a worker process died, perhaps for lack of memory, while it made "
    f"{at_work or 'nothing yet'}; use fewer --workers"
  )


@contextlib.contextmanager
def _display(
  total: int, shards: int, console: Console
) -> Iterator[Callable[[int, int], None]]:
  """Show a progress bar on a terminal, else a line every ten seconds.

  Args:
    total: bytes of all sources.
    shards: the number of shards.
    console: shows the progress.

  Yields:
    A function to call with the bytes read and the shards made so far.
  """
  if console.is_terminal:
    with progress.Progress(
      progress.BarColumn(bar_width=16),
      progress.DownloadColumn(),
      progress.TransferSpeedColumn(),
      progress.TimeRemainingColumn(compact=True),
      progress.TextColumn("left  {task.fields[text]}"),
      console=console,
    ) as bar:
      task = bar.add_task("prepare", total=total, text="")

      def update(read: int, done: int) -> None:
        bar.update(task, completed=read, text=f"{done}/{shards} shards")

      yield update
    return
  begin = last = time.monotonic()

  def line(read: int, done: int) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last < _LINE or not read:
      return
    last, rate = now, read / (now - begin)
    seconds = int((total - read) / rate)
    say(
      console,
      f"{read / 1e6:,.1f}/{total / 1e6:,.1f} MB  {rate / 1e6:.2f} MB/s  left "
      f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}  "
      f"{done}/{shards} shards",
    )

  yield line


def _start(planned: PlannedTokenizer, read: Any, stop: Any) -> None:
  """Set up a worker process; runs once in each."""
  global _worker
  for number in _OF_THE_GROUP:
    signal.signal(number, signal.SIG_IGN)
  # A worker uses one core, so the tokenizer must not start threads.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  end_with_parent()
  _worker = _Worker(planned, read, stop)


@functools.cache
def _tokenizer(planned: PlannedTokenizer) -> Tokenizer:
  """Load the tokenizer once in each worker."""
  return planned.load()


def _work(job: Job) -> None:
  """Make one shard in a worker process."""
  assert _worker is not None, "`_start` ran before"
  planned, read, stop = _worker

  def on_bytes(count: int) -> None:
    with read.get_lock():
      read.value += count

  with contextlib.suppress(Stopped):
    write_shard(job, _tokenizer(planned), on_bytes, lambda: bool(stop.value))
