"""Put faults into runs of several processes, and check how they end.

    python tools/fault_matrix.py --work FOLDER [--jobs 4] [--write]

A small MQAR run is trained undisturbed by several processes. Then each trial
trains it again, and one process, the first or the last, has one fault at one
moment: while it starts, compiles, steps, saves or evaluates. `prepare` has
faults in its main process and in a worker. Every process must end within a
limit and with an exit code that the documentation names; the faulty one may be
killed. The same command then runs again without a fault. It must end in the
same arrays and losses, or the same shards, as the undisturbed run.

FOLDER/faults.json is written anew after each trial, so that the same command
continues. Folders of trials that failed stay in FOLDER/trials. --write copies
the record to benchmarks/results/faults.json.
"""

import argparse
import atexit
from collections.abc import Callable, Iterator, Sequence
import ctypes
import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any, NoReturn

# jax reads these when it is imported.
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402

from benchmarks import environment  # noqa: E402
from train import cli  # noqa: E402
from train.checkpoint.checkpoints import Checkpoints  # noqa: E402
import train.commands.train  # noqa: E402, F401  # before the processes fork
from train.data.batches import Batches  # noqa: E402
from train.records.run_folder import RunFolder  # noqa: E402
from train.watchdog import Watchdog  # noqa: E402

STEPS = 8
STEP_TIMEOUT = 30
JOIN_TIMEOUT = 20
#: Seconds after the fault within which every other process must have ended.
LIMIT = 75
_LONGEST = 240  # seconds after which a trial without a fault counts as hung
_JOB_LIMIT = 600  # seconds after which a trial and its resume are killed
# Linux gives ports from 32768 on to connections. So these are free for us.
_PORTS, _PORTS_EACH = 20000, 100
#: Exit codes that the documentation names.
NAMED = (0, 1, 2, 3, 4)
#: The moments of a run, by what its watchdog is told at them.
MOMENTS = {
  "start": "initial state",
  "compile": "compilation and step 0",
  "step": "step 3",
  "save": "save of step 4",
  "evaluate": "evaluation",
}
PLACES = ("first", "last")
_RUN = (
  *("mqar", "--model.width", "16", "--model.second.heads", "2"),
  *("--model.second.features", "4", "--model.dropout", "0.1"),
  *("--data.vocab-size", "32", "--model.vocab-size", "32"),
  *("--data.length", "16", "--model.positions", "16", "--data.pairs", "2"),
  *("--data.test-examples", "16", "--stop-accuracy", "None", "--batch", "8"),
  *("--steps", str(STEPS), "--optimizer.warmup-steps", "2"),
  *("--log-every", "1", "--eval-every", "4", "--save-every", "2"),
  *("--join-timeout", str(JOIN_TIMEOUT)),
)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One fault."""

  fault: str
  moment: str
  place: str


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a trial ended."""

  #: Exit codes of the processes in order; −N if signal N ended one.
  codes: list[int]
  #: Whether the fault was put in: the run came to the trial's moment.
  reached: bool
  #: Seconds from the fault until the last process but a stopped one had ended.
  seconds: float
  #: The last line of each process that did not have the fault.
  lines: list[str]
  #: Whether the run, resumed where it had to be, ended bit-identical.
  same_bits: bool
  #: Whether all of it is as it must be.
  ok: bool


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
  os.kill(os.getpid(), signal.SIGSTOP)


def _crash() -> None:
  ctypes.string_at(0)


def _raise() -> None:
  raise RuntimeError("a fault of the test")


def _fill_disk() -> None:
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))


def _slow_disk() -> None:
  def slow(kind: type, name: str) -> None:
    fast = getattr(kind, name)

    def wait_first(*args: Any, **options: Any) -> Any:
      time.sleep(2)
      return fast(*args, **options)

    setattr(kind, name, wait_first)

  slow(Checkpoints, "save")
  slow(RunFolder, "write")


def _set_clock_back() -> None:
  now = time.time
  time.time = lambda: now() - 86400


def _hang_data() -> None:
  def hang(*_: object, **__: object) -> NoReturn:
    while True:
      time.sleep(1)

  Batches.read = hang  # pyrefly: ignore[bad-assignment]


def _use_up_memory() -> None:
  size = int(Path("/proc/self/statm").read_text().split()[0])
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  limit = size * resource.getpagesize() + (1 << 20)
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
  bytearray(1 << 30)


def _connect(port: int) -> Callable[[], None]:
  """Return a fault: a stranger uses the run's port."""

  def connect() -> None:
    with socket.create_connection(("127.0.0.1", port)) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))

  return connect


FAULTS: dict[str, Callable[[], None] | None] = {
  "kill -9": _kill,
  "SIGSTOP": _stop,
  "segfault": _crash,
  "exception": _raise,
  "full disk": _fill_disk,
  "slow disk": _slow_disk,
  "port in use": None,  # needs the port
  "clock set back": _set_clock_back,
  "hung data": _hang_data,
  "out of memory": _use_up_memory,
}
# Faults that a run survives: its exit code must be 0.
_HARMLESS = ("slow disk", "clock set back")
# Faults of `prepare` that can be put into a process from outside.
_PREPARE = ("kill -9", "SIGSTOP", "segfault", "full disk", "out of memory")


def all_trials() -> list[Trial]:
  """Return every trial, in an order that a part of them covers evenly."""
  trials = [Trial(*x) for x in itertools.product(FAULTS, MOMENTS, PLACES)] + [
    Trial(x, "prepare", place) for x in _PREPARE for place in PLACES
  ]
  random.Random(0).shuffle(trials)
  return trials


def _fork(
  words: Sequence[str], output: Path, prepare: Callable[[], None]
) -> int:
  """Run `rebased WORDS` in a forked process, which has imported jax already."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    prepare()
    cli.main(words)
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else 1
  except BaseException:  # noqa: BLE001  # printed
    traceback.print_exc()
  finally:
    atexit._run_exitfuncs()  # jax leaves the other processes there
    sys.stdout.flush()
    os._exit(code)


def _wait(
  pids: list[int], done: Callable[[list[int | None]], bool]
) -> list[int | None]:
  """Wait until `done` holds of the exit codes; None is a process that runs."""
  codes: list[int | None] = [None] * len(pids)
  while not done(codes):
    for i, pid in enumerate(pids):
      if codes[i] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
          codes[i] = os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
  return codes


class Runs:
  """Start the runs of one trial, in one folder and at some ports."""

  def __init__(self, work: Path, processes: int, ports: int):
    """Take `_PORTS_EACH` ports from `ports` on."""
    self._work, self._count = work, processes
    self._ports = iter(range(ports, ports + _PORTS_EACH))

  def _free_port(self) -> int:
    for port in self._ports:
      with socket.socket() as probe:
        try:
          probe.bind(("", port))
        except OSError:
          continue
      return port
    raise RuntimeError("expected a free port, but all of this trial are taken")

  def start(
    self, folder: Path, faulty: int = -1, trial: Trial | None = None
  ) -> tuple[list[int], int]:
    """Start the processes; return their ids and the port."""
    port = self._free_port()
    (self._work / "fault").unlink(missing_ok=True)
    pids = []
    for i in range(self._count):
      place = f"127.0.0.1:{port},{self._count},{i}"
      words = ("train", *_RUN, "--run-dir", str(folder), "--distributed", place)
      if trial is not None:
        words = (*words, "--step-timeout", str(STEP_TIMEOUT))
      put = _nothing
      if i == faulty and trial is not None:
        put = self._fault(trial, port)
      pids.append(_fork(words, self._work / f"output-{i}", put))
    return pids, port

  def _fault(self, trial: Trial, port: int) -> Callable[[], None]:
    """Return a function that lets this process have the fault later."""
    act = FAULTS[trial.fault] or _connect(port)
    at, mark = MOMENTS[trial.moment], self._work / "fault"

    def put() -> None:
      beat = Watchdog.beat

      def beat_or_fail(self, phase: str, *, training: bool = False) -> None:
        beat(self, phase, training=training)
        if phase == at and not mark.exists():
          mark.write_text(str(time.monotonic()))
          act()

      Watchdog.beat = beat_or_fail  # pyrefly: ignore[bad-assignment]

    return put

  def undisturbed(self, folder: Path) -> None:
    """Train a run to its end, from its start or from where it stopped."""
    pids, _ = self.start(folder)
    begin = time.monotonic()
    codes = _wait(
      pids,
      lambda codes: None not in codes or time.monotonic() - begin > _LONGEST,
    )
    _end(pids, codes)
    if codes != [0] * self._count:
      raise RuntimeError(f"{folder}: {codes}: {self.lines()}")

  def lines(self) -> list[str]:
    """Return the last line that each process printed."""
    texts = [
      (self._work / f"output-{i}").read_text(errors="replace").splitlines()
      for i in range(self._count)
    ]
    return [text[-1] if text else "" for text in texts]

  def run(self, trial: Trial, expected: Any) -> Ended:
    """Do one trial.

    Args:
      trial: the fault.
      expected: what `end` gives of the undisturbed run.
    """
    folder = self._work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    faulty = 0 if trial.place == "first" else self._count - 1
    mark = self._work / "fault"
    taken = None
    if trial.fault == "port in use" and trial.moment == "start":
      taken = faulty
    pids, since = self._start_at_taken_port(folder, taken, faulty, trial)
    begin = time.monotonic()
    known = trial.fault == "SIGSTOP"

    def done(codes: list[int | None]) -> bool:
      others = [x for i, x in enumerate(codes) if not (known and i == faulty)]
      now = time.monotonic()
      late = now - begin > _LONGEST
      if mark.exists():
        late = late or now - float(mark.read_text() or now) > LIMIT + 30
      return None not in others or late

    codes = _wait(pids, done)
    at = float(mark.read_text()) if mark.exists() else since
    seconds = time.monotonic() - at
    hung = [
      i
      for i, code in enumerate(codes)
      if code is None and not (known and i == faulty)
    ]
    _end(pids, codes)
    lines = [x for i, x in enumerate(self.lines()) if i != faulty]
    reached = mark.exists() or taken is not None
    others = [x for i, x in enumerate(codes) if i != faulty]
    ok = not hung and seconds < LIMIT and all(x in NAMED for x in others)
    if trial.fault in _HARMLESS:
      ok = ok and codes == [0] * self._count
    try:
      if codes != [0] * self._count:
        self.undisturbed(folder)
      same = end(folder) == expected
    except RuntimeError as error:
      lines.append(f"resume: {error}")
      same = False
    return Ended(
      [x if x is not None else -signal.SIGKILL for x in codes],
      reached,
      round(seconds, 1),
      lines,
      same,
      ok and same and reached,
    )

  def _start_at_taken_port(
    self, folder: Path, taken: int | None, faulty: int, trial: Trial
  ) -> tuple[list[int], float]:
    """Start a trial; `taken` says that another program has the port."""
    if taken is None:
      pids, _ = self.start(folder, faulty, trial)
      return pids, time.monotonic()
    port = self._free_port()
    with socket.socket() as other:
      other.bind(("", port))
      other.listen()
      pids = []
      for i in range(self._count):
        place = f"127.0.0.1:{port},{self._count},{i}"
        words = ("train", *_RUN, "--run-dir", str(folder))
        pids.append(
          _fork(
            (*words, "--distributed", place),
            self._work / f"output-{i}",
            _nothing,
          )
        )
      time.sleep(3)  # until process 0 has tried
    return pids, time.monotonic()


def _nothing() -> None:
  """Put no fault into a process."""


def _end(pids: list[int], codes: list[int | None]) -> None:
  """Kill what still runs, and reap it."""
  for pid, code in zip(pids, codes, strict=True):
    if code is None:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)


def end(folder: Path) -> tuple[Any, Any]:
  """Return the checksums of a run's last arrays, and all its losses."""
  record = folder / "checkpoints" / str(STEPS) / "record" / "data.json"
  if not record.exists():
    raise RuntimeError(f"{folder}: expected a checkpoint of step {STEPS}")
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  losses = [(x["kind"], x["step"], x["loss"]) for x in map(json.loads, lines)]
  return json.loads(record.read_text())["arrays"], losses


def prepare_trial(
  trial: Trial, texts: Path, work: Path, expected: Any
) -> Ended:
  """Put a fault into `rebased prepare`, or into one of its workers."""
  out = work / "tokens"
  process = _prepare(texts, out)
  child = process.pid
  while process.poll() is None and not (out / "prepare" / "plan.json").exists():
    time.sleep(0.005)
  while process.poll() is None and trial.place == "last":
    workers = [x for x in _children(process.pid) if b"spawn_main" in _words(x)]
    if workers:
      child = workers[-1]
      break
  time.sleep(1.0)  # a worker imports what it needs first
  at = time.monotonic()
  reached = process.poll() is None
  if reached:
    _put_from_outside(trial.fault, child)
  stopped = trial.fault == "SIGSTOP" and trial.place == "first"
  code: int | None = None
  with_limit = 5 if stopped else LIMIT + 30
  try:
    code = process.wait(with_limit)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  seconds = time.monotonic() - at
  line = _output_of(out).read_text(errors="replace").splitlines()
  ok = stopped or (code is not None and seconds < LIMIT)
  if trial.place == "last":
    ok = ok and code in NAMED
  left = _wait_for_end(process.pid, child)
  again = _prepare(texts, out).wait()
  same = again == 0 and shards(out) == expected
  return Ended(
    [-signal.SIGKILL if code is None else code],
    reached,
    round(seconds, 1),
    [*line[-1:], *(["a worker is left"] if left else [])],
    same,
    bool(ok and same and reached and not left),
  )


def _output_of(out: Path) -> Path:
  return out.with_name("output-prepare")


def _prepare(texts: Path, out: Path) -> subprocess.Popen:
  words = ("prepare", str(texts), "--out", str(out), "--workers", "2")
  words = (*words, "--timeout", str(STEP_TIMEOUT))
  with _output_of(out).open("w") as output:
    return subprocess.Popen(
      [sys.executable, "-m", "train", *words],
      env=os.environ | {"PYTHONPATH": environment.python_path()},
      stdout=output,
      stderr=subprocess.STDOUT,
    )


def _put_from_outside(fault: str, pid: int) -> None:
  if fault == "full disk":
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
  elif fault == "out of memory":
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = size * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
  else:
    number = {"kill -9": 9, "SIGSTOP": 19, "segfault": 11}[fault]
    os.kill(pid, number)


def _children(pid: int) -> list[int]:
  files = Path(f"/proc/{pid}/task").glob("*/children")
  return [int(x) for file in files for x in file.read_text().split()]


def _words(pid: int) -> bytes:
  try:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
  except OSError:
    return b""


def _wait_for_end(parent: int, child: int) -> bool:
  """Return whether a worker of a process that has ended is still there."""
  end_at = time.monotonic() + 15
  while time.monotonic() < end_at:
    if child == parent or not _words(child):
      return False
    time.sleep(0.1)
  os.kill(child, signal.SIGKILL)
  return True


def shards(out: Path) -> dict[str, str]:
  """Return a hash of every shard."""
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(out.glob("*.arrayrecord"))
  }


def _write_texts(texts: Path) -> None:
  """Write text that takes some seconds to tokenize."""
  texts.mkdir(exist_ok=True)
  rng = random.Random(0)
  for name in range(4):
    lines = (
      json.dumps({"text": " ".join(str(rng.random()) for _ in range(400))})
      for _ in range(2000)
    )
    (texts / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _at_once(
  todo: Sequence[Trial],
  jobs: int,
  folder: Path,
  do: Callable[[Trial, Path], Ended],
  go_on: Callable[[], bool],
) -> Iterator[tuple[Trial, Ended]]:
  """Do trials, `jobs` at once, each in a separate process and folder.

  Args:
    todo: the trials.
    jobs: how many run at the same time.
    folder: where each trial gets its folder; those of good trials are removed.
    do: does one trial in the given folder.
    go_on: whether another trial may be started.

  Yields:
    each trial that has ended, and how. What still runs is killed where the
    caller stops.
  """
  left = list(todo)
  running: dict[int, tuple[Trial, Path, float]] = {}
  try:
    while running or (left and go_on()):
      while left and len(running) < jobs and go_on():
        trial = left.pop(0)
        own = folder / "-".join(dataclasses.astuple(trial)).replace(" ", "-")
        running[_fork_job(trial, own, do)] = trial, own, time.monotonic()
      for pid, (trial, own, since) in list(running.items()):
        late = time.monotonic() - since > _JOB_LIMIT
        if late:
          os.killpg(pid, signal.SIGKILL)
        if not os.waitpid(pid, 0 if late else os.WNOHANG)[0]:
          continue
        del running[pid]
        file = own / "ended.json"
        if file.exists():
          ended = Ended(**json.loads(file.read_text()))
        else:
          why = f"the trial itself failed or took {_JOB_LIMIT} s"
          seconds = round(time.monotonic() - since, 1)
          ended = Ended([], False, seconds, [why], same_bits=False, ok=False)
        if ended.ok:
          shutil.rmtree(own)
        yield trial, ended
      time.sleep(0.05)
  finally:
    for pid in running:
      os.killpg(pid, signal.SIGKILL)
      os.waitpid(pid, 0)


def _fork_job(
  trial: Trial, own: Path, do: Callable[[Trial, Path], Ended]
) -> int:
  """Do a trial in a forked process that leads a process group."""
  shutil.rmtree(own, ignore_errors=True)
  own.mkdir(parents=True)
  pid = os.fork()
  if pid:
    return pid
  try:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ended = do(trial, own)
    (own / "ended.json").write_text(json.dumps(dataclasses.asdict(ended)))
  except BaseException:  # noqa: BLE001  # printed; the parent sees no file
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(0)


def _save(path: Path, record: dict[str, Any]) -> None:
  new = path.with_suffix(".new")
  new.write_text(json.dumps(record, indent=1) + "\n")
  new.replace(path)


def _open_record(file: Path, processes: int) -> dict[str, Any]:
  """Return the record of a work folder, or a new one."""
  if file.exists():
    record = json.loads(file.read_text())
    if record["processes"] != processes:
      raise SystemExit(
        f"{file}: has trials of {record['processes']} processes. Expected "
        f"{processes}. Give another --work or this --processes"
      )
    return record
  # In a child: this process must not start jax's devices, as it forks.
  described = environment.describe_in_child("train", "rebased_jax")
  return described | {
    "cores": len(os.sched_getaffinity(0)),
    "processes": processes,
    "limit_s": LIMIT,
    "trials": {},
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=Path, required=True)
  parser.add_argument("--processes", type=int, default=4)
  parser.add_argument(
    "--jobs", type=int, default=1, help="trials at once; each has --processes"
  )
  parser.add_argument(
    "--seconds", type=float, help="start no trial after this long"
  )
  parser.add_argument("--only", nargs="+", choices=[*FAULTS], default=[*FAULTS])
  parser.add_argument(
    "--commit", help="commit to record, where the copy has no git history"
  )
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args()
  if options.jobs < 1 or options.processes < 2:
    parser.error("expected --jobs of at least 1 and --processes of at least 2")
  begin = time.monotonic()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  work = options.work.resolve()
  work.mkdir(parents=True, exist_ok=True)
  file = work / "faults.json"
  record = _open_record(file, options.processes)
  if options.commit:
    record["commit"] = options.commit
  done = record["trials"]
  jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
  if not (work / "undisturbed" / "learning.png").exists():
    Runs(work, options.processes, _PORTS).undisturbed(work / "undisturbed")
  expected = end(work / "undisturbed")
  if not (work / "expected-tokens" / "dataset.json").exists():
    _write_texts(work / "texts")
    if _prepare(work / "texts", work / "expected-tokens").wait():
      raise SystemExit(_output_of(work / "expected-tokens").read_text())
  tokens = shards(work / "expected-tokens")
  places = all_trials()
  names = {trial: " / ".join(dataclasses.astuple(trial)) for trial in places}

  def do(trial: Trial, own: Path) -> Ended:
    if trial.moment == "prepare":
      return prepare_trial(trial, work / "texts", own, tokens)
    ports = _PORTS + _PORTS_EACH * (places.index(trial) + 1)
    return Runs(own, options.processes, ports).run(trial, expected)

  def go_on() -> bool:
    return options.seconds is None or time.monotonic() - begin < options.seconds

  todo = [
    trial
    for trial in places
    if trial.fault in options.only
    and not done.get(names[trial], {"reached": False})["reached"]
  ]
  for trial, ended in _at_once(todo, options.jobs, work / "trials", do, go_on):
    done[names[trial]] = dataclasses.asdict(ended)
    _save(file, record)
    print(
      f"{time.monotonic() - begin:.0f} s: {names[trial]}", ended, flush=True
    )
  failed = [name for name, x in done.items() if not x["ok"]]
  print(f"{len(done)} of {len(places)} trials, failed: {failed}")
  if options.write:
    shutil.copyfile(file, environment.RESULTS / "faults.json")
  if failed:
    raise SystemExit(1)


if __name__ == "__main__":
  main()
