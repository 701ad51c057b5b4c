"""Stopped, killed and damaged runs resume to bit-identical results."""

import dataclasses
import io
import json
from pathlib import Path
import random
import shlex
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console
from train_cases import (
  bits,
  built_once as built_once,
  command,
  files,
  finish,
  flags,
  metrics,
  run,
  saved_bits,
  signal_at,
  tiny,
  trainer as trainer,
)

from train import (
  compiled_steps,
  initial_state,
  load,
  loop,
  start_run,
  stored_config,
)
from train.checkpoint.checkpoints import (
  CheckpointError,
  Checkpoints,
  read_meta,
)
from train.commands import evaluate, inspect
from train.devices import mesh as mesh_lib
from train.records import report
from train.records.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.usefixtures("built_once")

_CONFIG = tiny(model=dict(dropout=0.1))

_SLOW = """
import time
from train.devices import batch_sharding
put = batch_sharding.put_batch
batch_sharding.put_batch = lambda *args: (time.sleep(0.1), put(*args))[1]
"""


def _train(folder: Path, cache: Path, before: str = "", config=_CONFIG):
  options = [*flags(config), "--run-dir", str(folder)]
  return command("train", "mqar", *options, cache=cache, before=before)


def _resume(folder: Path, cache: Path, before: str = ""):
  return command("resume", str(folder), cache=cache, before=before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, trainer: Path) -> Path:
  folder = tmp_path_factory.mktemp("run") / "undisturbed"
  code, out, err = finish(_train(folder, trainer))
  assert code == 0, err
  assert RunFolder(folder).read_config() == _CONFIG
  assert "6 of 6" in out
  return folder


def _assert_same_end(folder: Path, undisturbed: Path, config=_CONFIG) -> None:
  for kind in ("train", "eval"):
    assert metrics(folder, kind) == metrics(undisturbed, kind)
  step, found = saved_bits(folder, config)
  expected_step, expected = saved_bits(undisturbed, config)
  assert step == expected_step == config.steps
  assert found.keys() == expected.keys() and len(found) > 60
  assert found == expected


def test_a_run_stopped_by_sigterm_resumes(
  undisturbed: Path, tmp_path: Path, trainer: Path
) -> None:
  folder = tmp_path / "a run"
  code, out, err = finish(_train(folder, trainer, signal_at(3, "SIGTERM")))
  assert (code, err) == (143, "")
  assert "stopped at step 3 and saved; resume with" in out
  line = out.splitlines()[-1].strip()
  assert shlex.split(line) == ["rebased", "resume", str(folder)]
  assert [step for step, _ in metrics(folder)] == [1, 2, 3]
  assert read_meta(folder / "checkpoints")[0] == 3
  assert not (folder / "learning.png").exists()
  code, out, err = finish(_resume(folder, trainer))
  assert code == 0, err
  assert "resuming at step 3" in out
  _assert_same_end(folder, undisturbed)
  assert (folder / "learning.png").exists()


def test_a_run_stopped_by_sigint_and_kill_resumes(
  undisturbed: Path, tmp_path: Path, trainer: Path
) -> None:
  folder = tmp_path / "run"
  code, _, _ = finish(_train(folder, trainer, signal_at(5, "SIGKILL")))
  assert code == -signal.SIGKILL
  assert [step for step, _ in metrics(folder)][-1] > 2
  code, out, err = finish(_resume(folder, trainer, signal_at(1, "SIGINT")))
  assert (code, err) == (130, "")
  start = int(out.split("resuming at step ")[1].split()[0])
  assert start in (2, 4)  # the save of step 4 may not have been done
  assert f"stopped at step {start + 1} and saved" in out
  assert [step for step, _ in metrics(folder)] == [*range(1, start + 2)]
  code, out, err = finish(_resume(folder, trainer))
  assert code == 0, err
  assert f"resuming at step {start + 1}" in out
  _assert_same_end(folder, undisturbed)


def _newest(folder: Path) -> int:
  """Return the last recorded step; the last record may be half written."""
  records = RunFolder(folder).read_metrics()
  return max((x["step"] for x in records), default=-1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_moments(
  tmp_path: Path, trainer: Path, seed: int
) -> None:
  config = dataclasses.replace(_CONFIG, steps=60)
  undisturbed = tmp_path / "undisturbed"
  assert finish(_train(undisturbed, trainer, config=config))[0] == 0
  folder, rng = tmp_path / "killed", random.Random(seed)
  for after in (None, 0, 10, 20, 30, 40):  # None: while it starts
    process = _train(folder, trainer, _SLOW, config)
    while after is not None and process.poll() is None:
      if _newest(folder) > after:
        break
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 3 if after is None else 0.8))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
  code, _, err = finish(_train(folder, trainer, config=config))
  assert code == 0, err
  _assert_same_end(folder, undisturbed, config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  """Return a run on eight devices; tests change copies of it."""
  folder = tmp_path_factory.mktemp("run") / "finished"
  outcome, _ = run(_CONFIG, folder)
  assert (outcome.step, outcome.reason, outcome.exit_code) == (6, "finished", 0)
  return folder


def test_a_finished_run_is_left_alone(finished: Path, monkeypatch) -> None:
  held_out = [x for x in RunFolder(finished).read_metrics()][-1]
  before = files(finished / "checkpoints")
  lines = (finished / "metrics.jsonl").read_bytes()
  monkeypatch.setattr(loop.Loop, "run", lambda *_: pytest.fail("trained"))
  outcome, _ = run(_CONFIG, finished)
  assert (outcome.step, outcome.reason, outcome.exit_code) == (6, "finished", 0)
  assert outcome.held_out["loss"] == held_out["loss"]
  assert files(finished / "checkpoints") == before
  assert (finished / "metrics.jsonl").read_bytes() == lines


def test_a_finished_run_trains_on_with_another_optimiser(
  finished: Path, tmp_path: Path
) -> None:
  folder, text = tmp_path / "run", io.StringIO()
  shutil.copytree(finished, folder)
  longer = dataclasses.replace(
    _CONFIG,
    steps=8,
    log_every=2,
    keep=4,
    nan="skip",
    optimizer=dataclasses.replace(_CONFIG.optimizer, learning_rate=1e-3),
  )
  before = files(folder)
  with pytest.raises(RunFolderError) as error:
    run(longer, folder)
  assert "learning_rate: 0.01 → 0.001; steps: 6 → 8; choose" in str(error.value)
  assert "--allow-optimizer-change" in str(error.value)
  other = dataclasses.replace(longer.optimizer, clip_norm=None)
  with pytest.raises(RunFolderError, match="clip_norm.*expected a change that"):
    train_on(dataclasses.replace(longer, optimizer=other), folder)
  assert files(folder) == before
  outcome = train_on(longer, folder, text)
  assert (outcome.step, outcome.reason) == (8, "finished")
  assert "learning rate of step 6: 0 → 0.000" in text.getvalue()
  counts = [x for x in jax.tree.leaves(outcome.state.opt_state) if not x.shape]
  assert counts and all(int(x) == 8 for x in counts)  # none begins again
  assert [step for step, _ in metrics(folder)] == [1, 2, 3, 4, 5, 6, 8]
  (change,) = RunFolder(folder).read_history()
  assert change.step == 6
  assert set(change.changes) == {
    "optimizer.learning_rate: 0.01 → 0.001",
    *("steps: 6 → 8", "log_every: 1 → 2", "keep: 3 → 4"),
    "nan: 'abort' → 'skip'",
  }
  _, said = run(longer, folder)  # it needs no flag, now
  assert "from step 6: optimizer.learning_rate: 0.01 → 0.001, steps" in said
  assert "the run ended at step 8; `rebased resume RUN --steps N`" in said
  with pytest.raises(RunFolderError, match="steps=7: expected at least 8"):
    train_on(dataclasses.replace(longer, steps=7), folder)


def train_on(config, folder: Path, text: io.StringIO | None = None):
  """Train in a folder whose run had other steps and another optimiser."""
  console = Console(file=text or io.StringIO(), width=200)
  return start_run.train(
    config, RunFolder(folder), console, allow_optimizer_change=True
  )


def test_a_change_survives_a_kill_before_the_next_save(
  finished: Path, tmp_path: Path
) -> None:
  shutil.copytree(finished, tmp_path / "run")
  folder = RunFolder(tmp_path / "run")
  longer = dataclasses.replace(_CONFIG, steps=8)
  meta = read_meta(folder.checkpoints)[1]
  with pytest.raises(
    RunFolderError, match="another config: steps: 6 → 8; --al"
  ):
    initial_state.config_changes(meta, longer, folder, False)
  changes = initial_state.changes_since(meta, longer)
  folder.note_changes(6, changes)
  # Killed here, config.json has the old config: nothing was changed after all.
  run(_CONFIG, folder.path)
  assert folder.read_history() == []
  folder.note_changes(6, changes)
  with folder.locked():
    folder.update(longer)
  found = initial_state.config_changes(meta, longer, folder, False)
  assert found == ["steps: 6 → 8"]
  for steps in (7, 9):
    other = dataclasses.replace(_CONFIG, steps=steps)
    with pytest.raises(RunFolderError, match="another config"):
      initial_state.config_changes(meta, other, folder, False)
  folder.history_file.write_text('{"step": 6}\n')
  with pytest.raises(
    RunFolderError, match="history.jsonl: .*expected step, un"
  ):
    folder.read_history()


def test_a_run_that_met_its_goal_trains_on_beyond_it() -> None:
  meta = dict(finished="accuracy", held_out=dict(accuracy=0.9))
  for limit, steps, expected in (
    (0.8, 6, "accuracy"),
    (0.8, 8, "accuracy"),
    (0.95, 6, None),
    (None, 6, None),
  ):
    config = dataclasses.replace(_CONFIG, stop_accuracy=limit, steps=steps)
    assert loop.why_finished(meta, config, 4) == expected
  assert loop.why_finished(dict(finished=None), _CONFIG, 4) is None
  assert loop.why_finished(dict(finished="finished"), _CONFIG, 6) == "finished"


def test_a_damaged_checkpoint_resumes_from_the_one_before(
  finished: Path, tmp_path: Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  state = folder / "checkpoints" / "6" / "state"
  data = max(state.rglob("d/*"), key=lambda x: x.stat().st_size)
  data.unlink()
  outcome, out = run(_CONFIG, folder)
  assert "warning: checkpoint step 6 is unreadable" in out
  assert "kept as 6.corrupt" in out and "resuming at step 4" in out
  assert {x.name for x in (folder / "checkpoints").iterdir()} == {
    *("2", "4", "6", "6.corrupt")
  }
  assert outcome.step == 6
  _assert_same_end(folder, finished)


def test_init_from_takes_weights_and_a_fresh_optimiser(
  finished: Path, tmp_path: Path
) -> None:
  source, config = (
    saved_bits(finished, _CONFIG)[1],
    dataclasses.replace(_CONFIG, init_from=str(finished), seed=5),
  )
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    with Checkpoints(tmp_path / "none") as none:
      state, step, meta, notes = initial_state.restore_or_create(
        config, built, none, RunFolder(tmp_path), None
      )
  assert (step, meta) == (0, {}) and "step 6; fresh optimiser" in notes[0]
  found = bits(compiled_steps.to_dicts(state))
  params = {path for path in source if path.startswith("params/")}
  assert len(params) > 20
  assert {p: found[p] for p in params} == {p: source[p] for p in params}
  for path in found.keys() - params - {"ok"}:
    assert not np.frombuffer(found[path][2], np.uint8).any(), path
    assert "/mu/" not in path or found[path] != source[path]
  assert int(state.step) == 0 and bool(state.ok)


def test_changed_data_is_refused(
  finished: Path, tmp_path: Path, monkeypatch
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  before = files(folder)
  # As after a change of the code that makes the rows.
  monkeypatch.setattr("train.data.mqar._VERSION", 2)
  with pytest.raises(RunFolderError, match="version was 1 and is 2") as error:
    run(_CONFIG, folder)
  assert str(folder) in str(error.value)
  assert files(folder) == before


def test_a_renamed_checkpoint_is_refused(
  finished: Path, tmp_path: Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  (folder / "checkpoints" / "4").rename(folder / "checkpoints" / "55")
  before = files(folder)
  for use in (lambda: run(_CONFIG, folder), lambda: load(folder)):
    with pytest.raises(CheckpointError, match="step 4: expected step 55"):
      use()
  assert files(folder) == before


def test_another_runs_checkpoint_is_refused(
  finished: Path, tmp_path: Path
) -> None:
  """Even if its config is the same, so that only its folder differs."""
  other = tmp_path / "other"
  other.mkdir()
  RunFolder(other).open(_CONFIG)
  shutil.copytree(finished / "checkpoints", other / "checkpoints")
  before = files(other)
  for use in (
    lambda: run(_CONFIG, other),
    lambda: load(other),
    lambda: load(other, 4),
    lambda: inspect.show_folder(str(other / "checkpoints" / "4"), (), None),
    lambda: report.evaluate_run(_CONFIG, RunFolder(other), None, Console()),
  ):
    with pytest.raises(CheckpointError, match="the run 'finished-.*'other-"):
      use()
  warm = dataclasses.replace(_CONFIG, init_from=str(other))
  with pytest.raises(RunFolderError, match="init_from=.*the run 'finished-"):
    run(warm, tmp_path / "warm")
  assert not (tmp_path / "warm").exists()
  assert files(other) == before


@pytest.mark.parametrize(
  "left", ["no folder", "an empty folder", "a killed save", "an old run"]
)
def test_a_run_whose_checkpoints_are_gone_is_refused(
  finished: Path, tmp_path: Path, left: str
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  shutil.rmtree(folder / "checkpoints")
  lost = "step 6 was saved"
  if left == "an empty folder":
    (folder / "checkpoints").mkdir()
  elif left == "a killed save":
    (folder / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir(parents=True)
  elif left == "an old run":
    (folder / "last_save.json").unlink()
    lost = "steps are in metrics.jsonl"
  before = files(folder)
  message = f"checkpoints: no checkpoint is there, although {lost}.*bring"
  warm = dataclasses.replace(_CONFIG, init_from=str(folder))
  for use in (
    lambda: run(_CONFIG, folder),
    lambda: run(warm, tmp_path / "warm"),
    lambda: load(folder),
    lambda: evaluate.run([str(folder)]),
    lambda: inspect.run([str(folder)]),
  ):
    with pytest.raises(RunFolderError, match=message):
      use()
  assert files(folder) == before and not (tmp_path / "warm").exists()


def test_a_newest_checkpoint_that_is_gone_is_named(
  finished: Path, tmp_path: Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  _, text = run(_CONFIG, folder)
  assert "warning: step 6 was saved, and its checkpoint is gone" in text
  assert "resuming at step 4" in text
  _assert_same_end(folder, finished)


def test_a_run_that_was_killed_before_its_first_save_starts_again(
  finished: Path, tmp_path: Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  shutil.rmtree(folder / "checkpoints")
  (folder / "checkpoints").mkdir()
  (folder / "last_save.json").unlink()
  outcome, _ = run(_CONFIG, folder)
  assert (outcome.step, outcome.reason) == (6, "finished")
  _assert_same_end(folder, finished)


def test_a_checkpoint_holds_its_config_and_reason(finished: Path) -> None:
  step, meta = read_meta(finished / "checkpoints")
  assert (step, meta["finished"]) == (6, "finished")
  assert meta["config"] == json.loads(stored_config.to_json(_CONFIG))["run"]
  assert meta["config_hash"] == stored_config.fingerprint(_CONFIG)
  assert read_meta(finished / "checkpoints", 4)[1]["finished"] is None
