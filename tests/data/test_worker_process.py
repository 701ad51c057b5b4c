"""Worker processes end with the process that started them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import io
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from train.data import worker_process
from train.data.prefetch import iterate
from train.data.prepare import worker_pool
from train.data.prepare.shard import PrepareError
from train.presets import make_presets

_ROOT = Path(__file__).parents[2]

# Reads one batch by a worker process, and then does nothing.
_READ = """
import sys, time
if __name__ == "__main__":
  from train.data import mqar
  from train.data.prefetch import iterate
  from train.presets import make_presets
  config = make_presets()["mqar"]
  data = config.data.train_batches(config.batch, config.seed)
  with iterate(data, start=0, stop=1000, workers=1) as batches:
    next(batches)
    print("ready", flush=True)
    time.sleep({sleep})
"""
# Starts a worker of `prepare`, with work that does not end.
_PREPARE = """
import sys, time
if __name__ == "__main__":
  from train.data.prepare import worker_pool
  import concurrent.futures, multiprocessing
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    1, mp_context=context, initializer=worker_pool._start,
    initargs=(None, context.Value("q", 0), context.Value("b", 0)),
  ) as pool:
    pool.submit(int).result()
    print("ready", flush=True)
    pool.submit(time.sleep, 1000).result()
"""


def _descendants(pid: int) -> set[int]:
  found: set[int] = set()
  for file in Path(f"/proc/{pid}/task").glob("*/children"):
    for child in map(int, file.read_text().split()):
      found |= {child} | _descendants(child)
  return found


@pytest.mark.parametrize("code", [_READ.format(sleep=1000), _PREPARE])
def test_no_worker_survives_a_killed_parent(tmp_path: Path, code: str) -> None:
  script = tmp_path / "parent.py"  # a spawned process imports it again
  script.write_text(code)
  parent = subprocess.Popen(
    [sys.executable, str(script)],
    env=os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert parent.stdout.readline() == "ready\n"
  workers = _descendants(parent.pid)
  assert workers
  assert not any(map(_hears_ctrl_c, workers))  # which stops the parent
  parent.send_signal(signal.SIGKILL)
  parent.communicate()
  deadline = time.monotonic() + 20
  while any(map(_runs, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  left = [worker for worker in workers if _runs(worker)]
  for worker in left:
    os.kill(worker, signal.SIGKILL)
  assert not left


def _hears_ctrl_c(pid: int) -> bool:
  """Whether SIGINT is neither blocked nor ignored in a process."""
  rows = Path(f"/proc/{pid}/status").read_text().splitlines()
  masks = dict(row.split(":\t", 1) for row in rows if row.startswith("Sig"))
  deaf = int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)
  return not deaf >> (signal.SIGINT - 1) & 1


def _runs(pid: int) -> bool:
  """Whether a process exists and is no zombie that waits to be reaped."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.mark.slow
def test_the_death_of_a_worker_is_named() -> None:
  config = make_presets()["mqar"]
  data = config.data.train_batches(config.batch, config.seed)
  with iterate(data, start=0, stop=1000, workers=1) as batches:
    next(batches)
    for worker in multiprocessing.active_children():
      worker.kill()
    with pytest.raises(ChildProcessError, match="was ended by SIGKILL"):
      for _ in batches:
        pass


def test_the_main_process_needs_no_parent() -> None:
  before = threading.active_count()
  worker_process.end_with_parent()
  assert threading.active_count() == before


def test_workers_without_progress_are_a_hang() -> None:
  """Found even while a stopped worker holds the lock of the counter."""
  read = multiprocessing.get_context("spawn").Value("q", 0)
  never = {Future(): SimpleNamespace(source=SimpleNamespace(bytes=10))}
  with read.get_lock(), pytest.raises(PrepareError) as caught:
    _in_thread(
      lambda: worker_pool._watch(never, read, Console(quiet=True), 0.3)
    )
  assert "has read or finished anything for 0.3 s (--timeout)" in str(
    caught.value
  )


def test_lines_of_progress_are_seconds_apart(monkeypatch) -> None:
  now, text = [0.0], io.StringIO()
  monkeypatch.setattr(worker_pool.time, "monotonic", lambda: now[0])
  console = Console(file=text, width=200)
  with worker_pool._display(4_000_000, 8, console) as show:
    for second in range(1, 31):
      now[0] = float(second)
      show(second * 100_000, second // 4)
  assert text.getvalue().splitlines() == [
    "1.0/4.0 MB  0.10 MB/s  left 0:00:30  2/8 shards",
    "2.0/4.0 MB  0.10 MB/s  left 0:00:20  5/8 shards",
    "3.0/4.0 MB  0.10 MB/s  left 0:00:10  7/8 shards",
  ]


def test_progress_is_no_hang() -> None:
  read = multiprocessing.get_context("spawn").Value("q", 0)
  future: Future = Future()
  jobs = {future: SimpleNamespace(source=SimpleNamespace(bytes=10))}

  def work() -> None:
    for _ in range(8):
      time.sleep(0.1)
      read.value += 1
    future.set_result(None)

  threading.Thread(target=work).start()
  worker_pool._watch(jobs, read, Console(quiet=True), 0.5)


@pytest.mark.parametrize("error", [worker_pool._Hang("a hang"), None])
def test_workers_that_hang_are_killed(
  tmp_path: Path, monkeypatch, error: Exception | None
) -> None:
  """Also where all work is done, by the workers that did not hang."""
  stopped = []

  def stop_workers(*_: object) -> None:
    stopped.extend(multiprocessing.active_children())
    for worker in stopped:
      os.kill(worker.pid, signal.SIGSTOP)
    if error is not None:
      raise error

  monkeypatch.setattr(worker_pool, "_watch", stop_workers)
  # Workers that hang are not waited for.
  monkeypatch.setattr(worker_pool, "_LAST", 0.2 if error is None else 60.0)
  begin = time.monotonic()
  job = SimpleNamespace(source=SimpleNamespace(bytes=1))
  raises = pytest.raises(PrepareError, match="a hang")
  with raises if error is not None else contextlib.nullcontext():
    worker_pool.run_jobs([job], None, 1, Console(quiet=True))
  assert stopped and time.monotonic() - begin < 50
  for worker in stopped:
    worker.join(10)
  assert not any(worker.is_alive() for worker in stopped)


def _in_thread(call: Callable[[], None]) -> None:
  """Call a function in another thread, which does not own this one's locks."""
  with ThreadPoolExecutor(1) as pool:
    pool.submit(call).result(20)
