"""Test data sets of more shards than a process may have open files."""

import os
from pathlib import Path
import resource
import subprocess
import sys

from data_cases import documents, write_megatron, write_prepared
import numpy as np
import pytest

from train.data.text import open_files
from train.data.text.megatron_source import MegatronSource
from train.data.text.prepared_source import PreparedSource
from train.data.text.token_source import DataError

_SHARDS = 40
_TEXTS = documents(_SHARDS, seed=5)

# Reads all documents three times, forwards and backwards. Each argument is a
# data set. Then fills the limit and reads again.
_READ = """
import os, resource, sys
import numpy as np
from train.data.text.rows import open_source
from train.data.text.token_source import DataError

resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
sources = [open_source(path) for path in sys.argv[1:]]
total = 0
for order in (1, -1, 1):
  for source in sources:
    for i in range(len(source))[::order]:
      total += int(source[i].sum())
print(total, len(os.listdir("/proc/self/fd")))
held = []
try:
  while True:
    held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
  pass
for source in sources:
  print(len(source[0]))  # the shards that are kept make room
held += [os.open("/dev/null", os.O_RDONLY) for _ in range(24 - len(
  os.listdir("/proc/self/fd")) + 1)]
try:
  sources[0][len(sources[0]) - 1]
except DataError as error:
  os.closerange(20, 24)
  print(error)
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
  folder = tmp_path_factory.mktemp("sets")
  ends = np.cumsum([2 * len(x) for x in _TEXTS])[:-1].tolist()
  return [
    write_prepared(folder / "set", [[x] for x in _TEXTS]),
    write_megatron(folder / "d", _TEXTS, cuts=ends),
  ]


def test_a_set_of_more_shards_than_open_files_is_read(paths) -> None:
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", _READ, *map(str, paths)],
    env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    capture_output=True,
    text=True,
    timeout=60,
  )
  lines = done.stdout.splitlines()
  assert done.returncode == 0, done.stderr
  total, files = map(int, lines[0].split())
  assert total == 6 * sum(int(x.sum()) for x in _TEXTS)
  assert files <= 24
  assert lines[1:3] == [str(len(_TEXTS[0]))] * 2
  assert "24 open files, its limit" in lines[3] and "ulimit -n" in lines[3]


def test_the_process_raises_its_own_limit(paths) -> None:
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    for path in (paths[0], paths[1]):
      source = (PreparedSource if path.is_dir() else MegatronSource)(path)
      assert [x.tolist() for x in source] == [x.tolist() for x in _TEXTS]
    expected = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, hard)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_latest_shards_of_all_sets_are_kept(paths, monkeypatch) -> None:
  monkeypatch.setattr(open_files, "raise_limit", lambda: 8)
  opened = []

  def open_shard(name: str):
    return lambda shard: opened.append((name, shard)) or object()

  one, other = open_files.OpenFiles(), open_files.OpenFiles()
  for shard in (0, 1, 2):
    one.get(shard, open_shard("one"))
  other.get(0, open_shard("other"))
  one.get(0, open_shard("one"))  # still open
  other.get(1, open_shard("other"))  # closes shard 1 of the first set
  assert len(opened) == 5
  one.get(0, open_shard("one"))
  one.get(2, open_shard("one"))
  assert len(opened) == 5
  one.get(1, open_shard("one"))
  assert opened[-1] == ("one", 1)
  held = len(open_files._recent)
  del one
  assert held == 4 and len(open_files._recent) == 1


def test_files_are_closed_with_their_data_set(paths) -> None:
  before = len(os.listdir("/proc/self/fd"))
  for path in paths:
    source = (PreparedSource if path.is_dir() else MegatronSource)(path)
    assert len(list(source)) == _SHARDS
    assert len(os.listdir("/proc/self/fd")) >= before + _SHARDS
    del source
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("what", ["shard-00003.arrayrecord", "dataset.json"])
def test_a_pipe_or_a_lost_link_is_named(tmp_path: Path, what: str) -> None:
  folder = write_prepared(tmp_path / "set", [[x] for x in _TEXTS[:5]])
  path = folder / what
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(DataError, match=f"{what}: it is a pipe: expected a reg"):
    PreparedSource(folder)
  path.unlink()
  path.symlink_to("/dev/zero")
  with pytest.raises(DataError, match=f"{what}: it is a device: expected"):
    PreparedSource(folder)
  path.unlink()
  path.mkdir()
  with pytest.raises(DataError, match=f"{what}: it is a folder: expected"):
    PreparedSource(folder)
  if what != "dataset.json":
    path.rmdir()
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=f"{what}: missing: its link leads"):
      PreparedSource(folder)


@pytest.mark.parametrize("what", ["d.idx", "d.bin"])
def test_a_pipe_in_place_of_megatron_data_is_named(tmp_path, what) -> None:
  path = write_megatron(tmp_path / "d", _TEXTS)
  (tmp_path / what).unlink()
  os.mkfifo(tmp_path / what)
  with pytest.raises(DataError, match=f"{what}: it is a pipe: expected a reg"):
    MegatronSource(path)
