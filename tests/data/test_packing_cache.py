"""Test the cache of row plans."""

import json
import logging
import os
from pathlib import Path
import resource
import threading
import time

import numpy as np
import pytest

from train.data import one_maker
from train.data.text import packing_cache
from train.data.text.open_files import TooManyOpenFiles
from train.data.text.packing_cache import cached


def test_the_cache_makes_a_plan_once(tmp_path: Path, caplog) -> None:
  calls = []

  def make() -> dict[str, np.ndarray]:
    calls.append(1)
    return {"a": np.arange(5), "b": np.arange(3, dtype=np.int32)}

  for _ in range(2):
    found = cached({"lengths": "x"}, make, tmp_path)
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["b"].dtype == np.int32 and not found["a"].flags.writeable
  assert len(calls) == 1
  cached({"lengths": "y"}, make, tmp_path)
  assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 2
  cached({"lengths": "x"}, make, tmp_path / "new" / "folder")
  assert len(calls) == 3


def test_what_killed_makers_left_is_removed(tmp_path: Path) -> None:
  """Another host's plan, of a minute ago, stays: it may still be written."""
  names = "plan-old.1.tmp", "plan-new.2.tmp"
  for name in names:
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.npy").touch()
  a_day = 24 * 3600
  for name, age in zip(names, (a_day + 60, 60), strict=True):
    os.utime(tmp_path / name, (time.time() - age,) * 2)
  cached({"k": 1}, lambda: {"a": np.arange(5)}, tmp_path)
  found = {path.name for path in tmp_path.iterdir()}
  assert found & set(names) == {"plan-new.2.tmp"} and len(found) == 2


def test_a_full_disk_names_the_file_of_a_plan(tmp_path, monkeypatch) -> None:
  """NumPy itself says only how many numbers it has written."""

  def save(path, array, **_) -> None:
    with open("/dev/full", "wb", buffering=0) as file:
      array.tofile(file)

  monkeypatch.setattr(np, "save", save)
  with pytest.raises(OSError, match=r"plan-.*/a\.npy: .* is the disk full\?"):
    cached({"k": 1}, lambda: {"a": np.arange(5000)}, tmp_path)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["a.npy", "plan.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_plan_is_made_again(tmp_path, caplog, file, damage) -> None:
  make = lambda: {"a": np.arange(50)}
  cached({"k": 1}, make, tmp_path)
  (folder,) = tmp_path.iterdir()
  path = folder / file
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  if damage == "gone":
    path.unlink()
  else:
    path.write_bytes(content if damage == "flip" else content[:-9])
  with caplog.at_level(logging.WARNING):
    found = cached({"k": 1}, make, tmp_path)
  assert found["a"].tolist() == list(range(50))
  assert "is damaged and will be made again" in caplog.text
  assert [x.name for x in tmp_path.iterdir()] == [folder.name]


def test_a_failed_plan_leaves_nothing(tmp_path: Path) -> None:
  def make() -> dict[str, np.ndarray]:
    raise MemoryError("too long")

  with pytest.raises(MemoryError):
    cached({"k": 1}, make, tmp_path)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "other names", "no record"])
def test_a_changed_record_is_not_believed(tmp_path: Path, damage) -> None:
  make = lambda: {"a": np.arange(50)}
  cached({"k": 1}, make, tmp_path)
  (path,) = tmp_path.glob("*/plan.json")
  record = json.loads(path.read_text())
  if damage == "empty":
    record["sha256"] = {}
  elif damage == "other names":
    path.with_name("a.npy").rename(path.with_name("b.npy"))
    record["sha256"] = {"b": record["sha256"]["a"]}
  else:
    record = [record]
  path.write_text(json.dumps(record))
  assert cached({"k": 1}, make, tmp_path)["a"].tolist() == list(range(50))


def test_one_process_makes_a_plan_and_the_others_wait(tmp_path: Path) -> None:
  """Each thread opens the lock itself, as a process does."""
  made, found, start = [], [], threading.Barrier(6)

  def make() -> dict[str, np.ndarray]:
    made.append(1)
    time.sleep(0.2)
    return {"a": np.arange(7)}

  def work() -> None:
    start.wait()
    found.append(cached({"k": 1}, make, tmp_path)["a"].tolist())

  threads = [threading.Thread(target=work) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == [1] and found == [list(range(7))] * 6
  assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_locked_is_used(
  tmp_path, monkeypatch, caplog
) -> None:
  def flock(descriptor: int, operation: int) -> None:
    raise OSError(37, "No locks available")

  monkeypatch.setattr(one_maker.fcntl, "flock", flock)
  assert cached({"k": 1}, lambda: {"a": np.arange(3)}, tmp_path)["a"][2] == 2
  assert "cannot be locked: No locks available" in caplog.text


def test_only_large_arrays_keep_a_file_open(tmp_path, monkeypatch) -> None:
  make = lambda: {"a": np.arange(50), "b": np.arange(5000)}
  for small, count in ((1 << 20, 0), (4096, 1), (0, 2)):
    monkeypatch.setattr(packing_cache, "_SMALL", small)
    before = len(os.listdir("/proc/self/fd"))
    found = cached({"k": 1}, make, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before + count
    assert found["b"].tolist() == list(range(5000))
    assert not any(x.flags.writeable for x in found.values())
    del found


def test_a_plan_is_not_damaged_because_files_are_open(
  tmp_path, monkeypatch
) -> None:
  make = lambda: {"a": np.arange(3)}
  cached({"k": 1}, make, tmp_path)
  monkeypatch.setattr(packing_cache, "raise_limit", lambda: 0)
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  used = max(int(x) for x in os.listdir("/proc/self/fd"))
  held = [os.open("/dev/null", os.O_RDONLY)]
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(used, held[0]) + 1, hard))
    with pytest.raises(OSError, match="Too many open files"):
      while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
    with pytest.raises(TooManyOpenFiles, match="open files, its limit"):
      cached({"k": 1}, make, tmp_path)
  finally:
    for descriptor in held:
      os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  assert len(list(tmp_path.iterdir())) == 1
