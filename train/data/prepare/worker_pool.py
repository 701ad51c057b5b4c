"""A pool of processes that make shards, and its progress."""

from collections.abc import Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import multiprocessing
from multiprocessing.connection import wait
import os
from pathlib import Path
import signal
import threading
import time

from rich import progress
from rich.console import Console

from train.atomic import WORK
from train.data.prepare.planned_tokenizer import Planned
from train.data.prepare.shard import DataError, Job, Stopped, write_shard
from train.data.prepare.tokenizer import Tokenizer

_LOOK = 0.1  # seconds between two looks at the workers
_LINE = 10.0  # seconds between two lines where there is no terminal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_worker: dict[str, object] = {}  # what `_start` gave to this process


def run_jobs(
  jobs: Sequence[Job], planned: Planned, workers: int, console: Console
) -> None:
  """Makes every shard; after the first failure the others stop.

  Args:
    jobs: which.
    planned: the tokenizer, which each process loads.
    workers: processes; 0 is one a core.
    console: where the progress goes.

  Raises:
    DataError: malformed text, or a worker died.
    OSError: a file cannot be read or written.
  """
  # Not fork: the parent may have threads. No worker may outlive it.
  context = multiprocessing.get_context("spawn")
  read, stop = context.Value("q", 0), context.Value("b", 0)
  largest = sorted(jobs, key=lambda job: -job.source.bytes)
  with concurrent.futures.ProcessPoolExecutor(
    min(workers or os.cpu_count() or 1, len(jobs)),
    mp_context=context,
    initializer=_start,
    initargs=(planned, read, stop),
  ) as pool:
    try:
      with _undisturbed():  # a submission starts a worker
        futures = {pool.submit(_work, job): job for job in largest}
      _watch(futures, read, console)
    except BaseException:
      stop.value = 1
      # With a wait: a worker that still starts needs `read` and `stop`.
      pool.shutdown(cancel_futures=True)
      raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
  """SIGINT and SIGTERM wait; a process that starts meanwhile gets no SIGINT.

  The mask is for that process. It does not help this one, where another thread
  may take a signal, and half a start would be a traceback of the process.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # signals are the main thread's
    return
  came: list[int] = []
  note = lambda number, frame: came.append(number)
  handlers = {x: signal.signal(x, note) for x in _SIGNALS}
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for number in came[:1]:
      signal.raise_signal(number)


def _watch(futures: dict, read, console: Console) -> None:
  total = sum(job.source.bytes for job in futures.values())
  left = set(futures)
  with _display(total, len(futures), console) as show:
    while left:
      done, left = concurrent.futures.wait(
        left, _LOOK, concurrent.futures.FIRST_COMPLETED
      )
      failed = [x for x in done if x.exception() is not None]
      # The first by its shard, and not one that stopped for another.
      for future in sorted(failed, key=lambda x: futures[x].index):
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
          raise DataError(_died(list(futures.values()))) from error
        raise error
      show(read.value, len(futures) - len(left))


def _died(jobs: Sequence[Job]) -> str:
  """The pool does not say which worker it was: those that left something."""
  names = {
    path.name.partition(".")[0]
    for path in Path(jobs[0].out, WORK).glob("*.tmp-*")
  }
  found = sorted((x.name, x.source.name) for x in jobs if x.name in names)
  at_work = ", ".join(f"{name} of {source}" for name, source in found)
  return (
    f"a worker died; at work on {at_work or 'nothing yet'}: out of memory? "
    "Take fewer --workers"
  )


@contextlib.contextmanager
def _display(total: int, files: int, console: Console) -> Iterator:
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
      yield lambda read, done: bar.update(
        task, completed=read, text=f"{done}/{files} shards"
      )
    return
  begin = last = time.monotonic()

  def line(read: int, done: int) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last < _LINE or not read:
      return
    last, rate = now, read / (now - begin)
    seconds = int((total - read) / rate)
    console.print(
      f"{read / 1e6:,.1f}/{total / 1e6:,.1f} MB  {rate / 1e6:.2f} MB/s  left "
      f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}  "
      f"{done}/{files} shards",
      highlight=False,
      soft_wrap=True,
    )

  yield line


def _start(planned: Planned, read, stop) -> None:
  """Runs once in each worker."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
  threading.Thread(target=_die_with_parent, daemon=True).start()
  _worker.update(planned=planned, read=read, stop=stop)


def _die_with_parent() -> None:
  wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _tokenizer() -> Tokenizer:
  if "tokenizer" not in _worker:
    _worker["tokenizer"] = _worker["planned"].load()
  return _worker["tokenizer"]


def _work(job: Job) -> None:
  read, stop = _worker["read"], _worker["stop"]

  def on_bytes(count: int) -> None:
    with read.get_lock():
      read.value += count

  with contextlib.suppress(Stopped):
    write_shard(job, _tokenizer(), on_bytes, lambda: bool(stop.value))
