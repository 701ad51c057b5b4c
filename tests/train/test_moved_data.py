"""Runs whose data has a relative path, or was moved."""

import contextlib
import os
from pathlib import Path
import shutil

from data_cases import write_prepared
import numpy as np
import pytest
from text_cases import DOCUMENTS, folder as folder, make_config
from train_cases import (
  built_once as built_once,
  call as call,
  files,
  run,
  tiny,
  trainer as trainer,
)

from train.commands import evaluate
from train.data.checks import absolute
from train.records import report
from train.records.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.usefixtures("built_once")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder: Path) -> Path:
  """Return a folder in which a run used the relative paths of its data."""
  start = tmp_path_factory.mktemp("start")
  for name in ("set", "held-out"):
    shutil.copytree(folder, start / name)
  data = dict(eval_path=("held-out",), validation=0.0, cache_dir="plans")
  config = make_config(Path("set"), data=data, steps=4, eval_every=4)
  with contextlib.chdir(start):
    run(config, Path("run"))
  return start


@pytest.fixture
def moved(tmp_path: Path, trained: Path) -> Path:
  """Return a copy, whose run has the data of the copy."""
  start = tmp_path / "start"
  shutil.copytree(trained, start)
  config = start / "run" / "config.json"
  config.write_text(config.read_text().replace(str(trained), str(start)))
  return start


def test_a_run_keeps_absolute_paths(
  moved: Path, tmp_path: Path, call, monkeypatch
) -> None:
  data = RunFolder(moved / "run").read_config().data
  assert data.path == (str(moved / "set"),)
  assert data.eval_path == (str(moved / "held-out"),)
  assert data.cache_dir == str(moved / "plans")
  shutil.rmtree(moved / "run" / "checkpoints" / "4")
  shutil.rmtree(moved / "plans")
  # evaluate writes where the user says: a stranger's config.json does not.
  before = files(moved)
  cache = tmp_path / "cache"
  there = ("--data.cache-dir", str(cache))
  code, out, err = call("evaluate", str(moved / "run"), *there)
  assert code == 0, err
  assert files(moved) == before and list(cache.iterdir())
  with monkeypatch.context() as patch:
    patch.setattr(report, "evaluate_run", lambda config, *_, **__: config.data)
    assert evaluate.run([str(moved / "run")]).cache_dir is None
  code, out, err = call("resume", str(moved / "run"))
  assert code == 0, err
  assert "resuming at step 2" in out and (moved / "plans").exists()
  assert list(Path().iterdir()) == []  # nothing is written where it is called


def test_a_command_can_be_pointed_at_moved_data(moved: Path, call) -> None:
  path = moved / "run"
  shutil.rmtree(path / "checkpoints" / "4")
  before = files(path)
  (moved / "set").rename(moved / "elsewhere")
  for verb in ("evaluate", "resume"):
    code, _, err = call(verb, str(path))
    assert code == 2
    assert f"data.path: {moved / 'set'} is not there" in err
    assert "--data.path names the place where it is now\n" in err
  (moved / "held-out").rename(moved / "held-out-too")
  there = ("--data.path", str(moved / "elsewhere"))
  code, _, err = call("resume", str(path), *there)
  assert code == 2 and "--data.eval-path names the place" in err
  assert files(path) == before
  there = (*there, "--data.eval-path", os.path.relpath(moved / "held-out-too"))
  code, _, err = call("evaluate", str(path), *there)
  assert code == 0, err
  assert files(path) == before
  code, out, err = call("resume", str(path), *there)
  assert code == 0, err
  assert "data.path: ['" in out and "resuming at step 2" in out
  data = RunFolder(path).read_config().data
  assert data.path == (str(moved / "elsewhere"),)
  assert data.eval_path == (str(moved / "held-out-too"),)
  code, _, err = call("evaluate", str(path))
  assert code == 0, err


def test_other_data_at_the_new_place_is_refused(moved: Path, call) -> None:
  path = moved / "run"
  shutil.rmtree(path / "checkpoints" / "4")
  other = [np.where(x == ord("d"), ord("b"), x) for x in DOCUMENTS]
  write_prepared(moved / "other", (other,))
  before = files(path)
  for verb, option, named in (
    ("resume", "--data.path", "the data has changed: "),
    ("resume", "--data.eval-path", "held out: the data has changed: "),
    ("evaluate", "--data.eval-path", "held out: the data has changed: "),
  ):
    code, _, err = call(verb, str(path), option, str(moved / "other"))
    assert code == 2 and f"{path}: {named}" in err
    assert "--allow-data-change" in err
  code, _, err = call("resume", str(path), "--data.path", "a", "b")
  assert code == 2 and "expected 1 paths, as the run has" in err
  assert files(path) == before


def test_a_run_without_text_has_no_data_to_move(tmp_path: Path, call) -> None:
  (tmp_path / "run").mkdir()
  RunFolder(tmp_path / "run").open(tiny())
  code, _, err = call("resume", str(tmp_path / "run"), "--data.path", "a")
  assert code == 2 and "data.path=('a',): expected none with MQAR" in err


def test_paths_differ_only_where_a_checkpoint_knows_the_data(
  tmp_path: Path, folder: Path
) -> None:
  config = make_config(folder)
  (tmp_path / "run").mkdir()
  RunFolder(tmp_path / "run").open(config)
  shutil.copytree(folder, tmp_path / "set")
  other = make_config(tmp_path / "set")
  with pytest.raises(RunFolderError, match="data.path: .*--allow-data-change"):
    RunFolder(tmp_path / "run").open(other)


def test_a_url_is_absolute(monkeypatch, tmp_path: Path) -> None:
  monkeypatch.chdir(tmp_path)
  assert absolute("gs://bucket/set") == "gs://bucket/set"
  assert absolute("a/../b") == str(tmp_path / "b")
  config = tiny(init_from="runs/old").with_absolute_paths()
  assert config.init_from == str(tmp_path / "runs" / "old")
  assert config.data == tiny().data
