"""Test that a killed `prepare` continues, and makes identical bytes."""

import errno
import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

from prepare_cases import jsonl, records, run, tree, write_formats, zst
import pytest

from train.data.prepare import prepare_dataset, shard

_ROOT = Path(__file__).parents[2]
_CODE = "import sys; from train import cli; cli.main(sys.argv[1:])"


def _start(
  folder: Path, out: Path, *, start_new_session: bool = False
) -> subprocess.Popen:
  words = ["prepare", str(folder), "--out", str(out), "--workers", "2"]
  return subprocess.Popen(
    [sys.executable, "-c", _CODE, *words],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=start_new_session,
  )


def _inputs(folder: Path, files: int, documents: int) -> None:
  write_formats(folder)
  for i in range(files):
    data = jsonl(records(documents, 1000 * i))
    (folder / f"e{i:02}.jsonl.zst").write_bytes(zst(data, 4))


def _killed(folder: Path, out: Path, kills: int, longest: float) -> list[int]:
  """Kill runs at work; return how many shards each had made."""
  delays, seen = random.Random(kills), []
  while len(seen) < kills:
    process = _start(folder, out)
    while not (out / "prepare" / "plan.json").exists():
      assert process.poll() is None, process.stdout.read()
      time.sleep(0.001)
    time.sleep(delays.uniform(0, longest))
    if process.poll() is None:
      os.kill(process.pid, signal.SIGKILL)
      seen.append(len(list(out.glob("*.arrayrecord"))))
    process.communicate()
    if process.returncode == 0:  # it was faster: from the begin again
      for path in [*out.rglob("*.*")]:
        path.unlink()
      (out / "prepare").rmdir()
  return seen


def _check(tmp_path: Path, kills: int, files: int, longest: float) -> list[int]:
  folder, out = tmp_path / "in", tmp_path / "out"
  _inputs(folder, files, 400)
  run([folder], tmp_path / "whole")
  seen = _killed(folder, out, kills, longest)
  last = _start(folder, out)
  printed, _ = last.communicate(timeout=120)
  assert last.returncode == 0, printed
  assert tree(out) == tree(tmp_path / "whole")
  return seen


def test_three_kills_leave_no_trace(tmp_path):
  _check(tmp_path, kills=3, files=8, longest=1.2)


@pytest.mark.slow
def test_25_kills_leave_no_trace(tmp_path):
  seen = _check(tmp_path, kills=25, files=60, longest=1.6)
  assert len(set(seen)) >= 5  # they hit different moments


def test_a_kill_between_two_files_leaves_no_trace(tmp_path):
  """Kill a run at every third rename of a file."""
  folder = tmp_path / "in"
  write_formats(folder)
  run([folder], tmp_path / "whole")
  whole = tree(tmp_path / "whole")
  made = sorted(
    (tmp_path / "whole").rglob("*.*"), key=lambda x: x.stat().st_mtime_ns
  )
  names = [path.relative_to(tmp_path / "whole").as_posix() for path in made]
  names = [name for name in names if name in whole]
  assert names[-1] == "dataset.json"
  for kept in range(0, len(names), 3):
    out = tmp_path / f"out{kept}"
    (out / "prepare").mkdir(parents=True)
    for name in names[:kept]:
      (out / name).write_bytes(whole[name])
    (out / "prepare" / "shard-00001.arrayrecord.tmp-a-1").write_bytes(b"torn")
    run([folder], out)
    assert tree(out) == whole


def test_no_worker_outlives_its_parent(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  (folder / "a.jsonl").write_bytes(jsonl(records(200_000)))
  process = _start(folder, out)
  while not list((out / "prepare").glob("*.arrayrecord.tmp-*")):
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.01)
  (temporary,) = (out / "prepare").glob("*.arrayrecord.tmp-*")
  worker = int(temporary.name.rsplit("-", 2)[1])
  assert worker != process.pid
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  end = time.monotonic() + 20
  while time.monotonic() < end and _is_running(worker):
    time.sleep(0.02)
  assert not _is_running(worker)
  assert not (out / "shard-00000.arrayrecord").exists()


def test_a_dead_worker_is_an_error_and_not_a_hang(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  (folder / "a.jsonl").write_bytes(jsonl(records(200_000)))
  process = _start(folder, out)
  while not list((out / "prepare").glob("*.arrayrecord.tmp-*")):
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.01)
  (temporary,) = (out / "prepare").glob("*.arrayrecord.tmp-*")
  os.kill(int(temporary.name.rsplit("-", 2)[1]), signal.SIGKILL)
  printed, _ = process.communicate(timeout=120)
  assert process.returncode == 1
  assert "a worker process died" in printed
  assert "while it made shard-00000 of a.jsonl" in printed


def test_a_full_disk_is_an_error_and_leaves_nothing_torn(tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  texts = [dict(text=os.urandom(500).hex()) for _ in range(2000)]
  (folder / "a.jsonl").write_bytes(jsonl(texts))
  limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (300000,) * 2)\n"
  words = ["prepare", str(folder), "--out", str(out)]
  process = subprocess.run(
    [sys.executable, "-c", limit + _CODE, *words],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 1
  assert "Traceback" not in process.stderr
  assert "File too large" in process.stderr and "shard-00000" in process.stderr
  assert list(tree(out)) == ["prepare/plan.json"]
  run([folder], out)  # it continues when there is room
  assert json.loads((out / "dataset.json").read_text())["documents"] == 2000


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
  """Let each small file of a data set meet a full disk in turn."""
  folder, out = tmp_path / "in", tmp_path / "out"
  write_formats(folder, 4)
  written = []

  def full(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def record(path, data):
    with path.open("wb") as file:
      file.write(data)
    written.append(path.name.partition(".tmp-")[0])

  monkeypatch.setattr(Path, "write_bytes", record)
  monkeypatch.setattr(prepare_dataset, "run_jobs", _run_here)
  run([folder], tmp_path / "whole")
  assert {"dataset.json", "shard-00003.lengths.npy"} <= set(written)
  for name in dict.fromkeys(written):
    stopped = lambda path, data, name=name: (
      full if path.name.startswith(name) else record
    )(path, data)
    monkeypatch.setattr(Path, "write_bytes", stopped)
    with pytest.raises(OSError, match=f"No space left on device: .*{name}"):
      run([folder], out)
  monkeypatch.setattr(Path, "write_bytes", record)
  run([folder], out)
  assert tree(out) == tree(tmp_path / "whole")


def _run_here(jobs, planned, *_):
  for job in jobs:
    nothing = lambda _: None
    shard.write_shard(job, planned.load(), nothing, lambda: False)


def test_a_reader_that_goes_away_stops_nothing(tmp_path):
  """Close the pipe of standard output, as `| head` and a dead `tee` do."""
  folder, out = tmp_path / "in", tmp_path / "out"
  write_formats(folder)
  process = subprocess.Popen(
    [sys.executable, "-c", _CODE, "prepare", str(folder), "--out", str(out)],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.close()
  assert process.stderr.read() == ""
  process.stderr.close()
  assert process.wait() == 0
  run([folder], tmp_path / "whole")
  assert tree(out) == tree(tmp_path / "whole")


def _is_running(pid: int) -> bool:
  try:
    status = Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
  ("number", "group"),
  [
    (signal.SIGTERM, False),
    (signal.SIGTERM, True),
    (signal.SIGINT, False),
    (signal.SIGINT, True),
    (signal.SIGHUP, True),
    (signal.SIGUSR1, True),
  ],
)
def test_a_stop_says_so_and_nothing_else(tmp_path, number, group):
  """Stop a run right after its plan, while workers are starting."""
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  for i in range(4):
    (folder / f"{i}.jsonl").write_bytes(jsonl(records(20_000)))
  process = _start(folder, out, start_new_session=True)
  while not (out / "prepare" / "plan.json").exists():
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.001)
  (os.killpg if group else os.kill)(process.pid, number)
  printed, _ = process.communicate(timeout=120)
  assert printed == "rebased: stopped; repeat the same command to continue\n"
  assert process.returncode == 128 + number
