"""Test errors of runs: bad values, bad folders and bad steps."""

import fcntl
import json
from pathlib import Path

import pytest
from train_cases import (
  built_once as built_once,
  files,
  flags,
  run,
  tiny,
  trainer as trainer,
)

from train import cli
from train.checkpoint.checkpoints import CheckpointError
from train.nonfinite_steps import TrainingFailed
from train.records.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.usefixtures("built_once")

_CONFIG = tiny(steps=4, eval_every=4, save_every=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trainer) -> Path:
  path = tmp_path_factory.mktemp("refusals") / "run"
  run(_CONFIG, path)
  return path


def _code(*words: str) -> int:
  with pytest.raises(SystemExit) as end:
    cli.main(words)
  return end.value.code


@pytest.mark.parametrize(
  "option, value, named",
  [
    ("stop-accuracy", "nan", "--stop-accuracy=nan"),
    ("stop-accuracy", "2", "--stop-accuracy=2"),
    ("optimizer.weight-decay", "inf", "--optimizer.weight-decay=inf"),
    ("model.second.eps", "inf", "eps=inf"),
    ("model.second.implementation", "foo", "implementation='foo'"),
  ],
)
def test_a_bad_value_is_named(
  option, value, named, tmp_path, monkeypatch, capsys
) -> None:
  monkeypatch.chdir(tmp_path)
  assert _code("train", "mqar", f"--{option}", value) == 2
  out, err = capsys.readouterr()
  assert named in (out + err).replace("\n", "")
  assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_made_leaves_no_folder(
  tmp_path, monkeypatch, capsys
) -> None:
  monkeypatch.chdir(tmp_path)
  config = tiny(
    model=dict(vocab_size=5, positions=4),
    data=dict(length=4, pairs=1, vocab_size=5),
  )
  assert _code("train", "mqar", *flags(config)) == 2
  assert "split='test'" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_a_run_folder(tmp_path, capsys) -> None:
  path = tmp_path / "file"
  path.write_text("mine")
  words = ("train", "mqar", *flags(_CONFIG), "--run-dir", str(path))
  assert _code(*words) == 2
  assert path.read_text() == "mine"
  assert "is a file" in capsys.readouterr().err


def test_only_one_process_trains_in_a_folder(finished) -> None:
  before = files(finished)
  with (finished / "config.json").open() as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(RunFolderError, match="another process"):
      run(_CONFIG, finished)
  assert files(finished).keys() == before.keys()


def test_a_missing_step_is_an_error(finished, capsys) -> None:
  assert _code("evaluate", str(finished), "--step", "3") == 2
  assert _code("inspect", str(finished / "checkpoints" / "99")) == 2
  assert "no step 99" in capsys.readouterr().err


def test_an_edited_config_is_noticed(finished) -> None:
  folder = RunFolder(finished)
  text = folder.config_file.read_text()
  data = json.loads(text)
  data["run"]["steps"] = 8
  folder.config_file.write_text(json.dumps(data))
  try:
    with pytest.raises(RunFolderError, match="another config: steps: 4 → 8"):
      run(folder.read_config(), finished)
  finally:
    folder.config_file.write_text(text)


def test_a_damaged_line_of_metrics_is_named(tmp_path) -> None:
  folder = RunFolder(tmp_path)
  folder.metrics_file.write_text('{}\n{"kind": "train", "step": 1}\n')
  with pytest.raises(RunFolderError, match="line 1: expected a record"):
    folder.read_metrics()


def test_an_update_that_overflows_is_not_applied(tmp_path) -> None:
  config = tiny(
    optimizer=dict(learning_rate=1e38, warmup_steps=0), steps=4, save_every=1
  )
  with pytest.raises((TrainingFailed, CheckpointError), match="not finite"):
    run(config, tmp_path / "run")
  for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
    raise AssertionError(f"a checkpoint of step {step.name}")
  (failed,) = (tmp_path / "run").glob("failed-step-*")
  assert "update_norm=inf" in (failed / "reason.txt").read_text()
