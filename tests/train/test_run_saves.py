"""Test saves that numbers, data, evaluations or signals could prevent."""

from collections.abc import Callable
import dataclasses
import errno
import math
import os
from pathlib import Path
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest
from train_cases import (
  Failing,
  Spoiled,
  built_once as built_once,
  flags,
  run,
  saved_bits,
  tiny,
  trainer as trainer,
)

from train import (
  cli,
  evaluate,
  failing_together,
  initial_state,
  metrics,
  start_run,
)
from train.checkpoint.checkpoints import Checkpoints, read_meta
from train.config import MQARStreamData, RunConfig
from train.data import prefetch
from train.data.prefetch import DataTimeout
from train.data.text.token_source import DataError
from train.devices import batch_sharding, mesh as mesh_lib, processes
from train.nonfinite_steps import TrainingFailed
from train.records.metrics_writer import MetricsWriter
from train.records.profile import Profile
from train.records.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.usefixtures("built_once")

# Records of training at steps 4 and 7, of evaluation at steps 3, 6 and 7. An
# evaluation has 3 batches.
_STEPS = tiny(steps=7, eval_every=3, save_every=100, log_every=4)


def _records(folder: Path) -> list[dict]:
  """Return the records of a run without those of time."""
  timed = ("tokens_per_second", "step_seconds", "data_wait_fraction", "goodput")
  timed += ("unix_time",)
  records = RunFolder(folder).read_metrics()
  return [{k: x[k] for k in x.keys() - set(timed)} for x in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("saves") / "undisturbed"
  run(_STEPS, folder)
  found = [(x["kind"], x["step"]) for x in _records(folder)]
  wanted = {"train": [4, 7], "eval": [3, 6, 7]}
  for kind, steps in wanted.items():
    assert [step for name, step in found if name == kind] == steps
  return folder


def _assert_same_end(folder: Path, undisturbed: Path) -> None:
  assert _records(folder) == _records(undisturbed)
  assert saved_bits(folder, _STEPS) == saved_bits(undisturbed, _STEPS)


def _train_batches(monkeypatch, change: Callable) -> None:
  make = MQARStreamData.train_batches
  monkeypatch.setattr(
    MQARStreamData, "train_batches", lambda *args: change(make(*args))
  )


def _at_batch(monkeypatch, kind: str, number: int, action: Callable) -> list:
  """Call `action` when a batch is put on the devices.

  Args:
    monkeypatch: the fixture.
    kind: "train" or "evaluate", for which the batch is.
    number: the batch, counted from 0 over the whole run.
    action: what is called.

  Returns:
    A list that gets the kind of every batch that is put.
  """
  put, seen = batch_sharding.put_batch, []

  def put_batch(*args):
    here = "train" if sys._getframe(1).f_code.co_name == "_put" else "evaluate"
    if here == kind and seen.count(here) == number:
      action()
    seen.append(here)
    return put(*args)

  monkeypatch.setattr(batch_sharding, "put_batch", put_batch)
  return seen


def _terminate() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_number_that_is_not_finite_stops_no_save(
  tmp_path: Path, monkeypatch, number: float
) -> None:
  folder, config = tmp_path / "run", tiny(steps=4, save_every=1, eval_every=1)
  found = dict(loss=number, accuracy=number, tokens=40.0)
  monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: found)
  with monkeypatch.context() as patch:
    _train_batches(patch, lambda data: Spoiled(data, 3))
    with pytest.raises(TrainingFailed, match="step 3 is not finite"):
      run(config, folder)
  for checkpoints, step in (
    (folder / "checkpoints", 3),
    (folder / "failed-step-3" / "checkpoints", 3),
  ):
    saved, meta = read_meta(checkpoints)
    assert saved == step and repr(meta["held_out"]) == repr(found)
  outcome, _ = run(config, folder)
  assert outcome.reason == "finished"
  assert repr(outcome.held_out) == repr(found)
  records = RunFolder(folder).read_metrics()
  losses = [x["loss"] for x in records if x["kind"] == "eval"]
  assert repr(losses) == repr(4 * [number])


def test_every_number_of_meta_is_saved(tmp_path: Path) -> None:
  meta = dict(numbers=[math.inf, -math.inf, math.nan, 1e308, 5e-324, 2**70])
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {"a": np.ones(1)}, meta)
  assert repr(read_meta(tmp_path)) == repr((0, meta))


def test_a_derived_metric_is_a_plain_number(monkeypatch) -> None:
  square = metrics.DerivedMetric("square", "loss", np.float32)
  monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, square))
  found = metrics.with_derived(dict(loss=2.0), text=False)
  assert type(found["square"]) is float and found["square"] == 2


@pytest.mark.parametrize(
  ("evaluation", "step"), [(0, 3), (2, 7)], ids=["first", "last"]
)
def test_a_signal_in_an_evaluation_saves_first(
  undisturbed: Path, tmp_path: Path, monkeypatch, evaluation: int, step: int
) -> None:
  folder = tmp_path / "run"
  with monkeypatch.context() as patch:
    seen = _at_batch(patch, "evaluate", 3 * evaluation + 1, _terminate)
    outcome, _ = run(_STEPS, folder)
  assert (outcome.step, outcome.reason, outcome.exit_code) == (
    step,
    "signal",
    143,
  )
  assert seen.count("evaluate") == 3 * evaluation + 2  # of 3 more
  saved, meta = read_meta(folder / "checkpoints")
  assert (saved, meta["finished"], meta["evaluation_due"]) == (step, None, True)
  assert (step, "eval") not in {
    (x["step"], x["kind"]) for x in _records(folder)
  }
  for _ in range(2):  # the second time there is nothing left to train
    outcome, _ = run(_STEPS, folder)
    assert (outcome.step, outcome.reason) == (7, "finished")
    _assert_same_end(folder, undisturbed)
  assert outcome.held_out == _held_out(undisturbed)


def _held_out(folder: Path) -> dict[str, float]:
  last = _records(folder)[-1 if _records(folder)[-1]["kind"] == "eval" else -2]
  return {k: v for k, v in last.items() if k not in ("kind", "step")}


@pytest.mark.parametrize("step", [3, 5, 7])  # due: evaluation, nothing, end
def test_a_signal_in_a_step_saves_before_any_evaluation(
  undisturbed: Path, tmp_path: Path, monkeypatch, step: int
) -> None:
  folder = tmp_path / "run"
  before = Profile.before

  def signalled(self, index, state):
    if index == step - 1:
      _terminate()
    before(self, index, state)

  with monkeypatch.context() as patch:
    patch.setattr(Profile, "before", signalled)
    outcome, _ = run(_STEPS, folder)
  assert (outcome.step, outcome.reason, outcome.exit_code) == (
    step,
    "signal",
    143,
  )
  assert read_meta(folder / "checkpoints")[0] == step
  evaluations = [x["step"] for x in _records(folder) if x["kind"] == "eval"]
  assert evaluations == [x for x in (3, 6) if x < step]
  assert run(_STEPS, folder)[0].reason == "finished"
  _assert_same_end(folder, undisturbed)


def test_a_signal_before_the_first_step_trains_nothing(
  undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
  """The step would be compiled first, which takes minutes for a large model."""
  folder = tmp_path / "run"
  create = initial_state.restore_or_create

  def signalled(*args, **kwargs):
    _terminate()
    return create(*args, **kwargs)

  for _ in range(2):
    with monkeypatch.context() as patch:
      patch.setattr(initial_state, "restore_or_create", signalled)
      outcome, _ = run(_STEPS, folder)
    assert (outcome.step, outcome.reason) == (0, "signal")
    assert read_meta(folder / "checkpoints")[0] == 0
  assert run(_STEPS, folder)[0].reason == "finished"
  _assert_same_end(folder, undisturbed)


def test_a_signal_in_a_save_stops_after_it(
  undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
  folder, save = tmp_path / "run", Checkpoints.save
  config = dataclasses.replace(_STEPS, save_every=2)

  def signalled(*args):
    save(*args)
    _terminate()

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", signalled)
    outcome, _ = run(config, folder)
  assert (outcome.step, outcome.reason, outcome.exit_code) == (2, "signal", 143)
  assert read_meta(folder / "checkpoints")[1]["finished"] is None
  assert run(config, folder)[0].reason == "finished"
  assert _records(folder) == _records(undisturbed)


def test_a_run_that_dies_in_a_log_window_makes_the_same_records(
  undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
  """It saves step 2 and dies in step 6, after the record of step 4."""
  _run_that_dies(_STEPS, tmp_path / "run", monkeypatch)
  assert _records(tmp_path / "run") == _records(undisturbed)


@pytest.mark.parametrize(
  "changes",
  [
    # The average's own tests resume it too; here its records are compared.
    pytest.param(dict(ema=0.9), id="average", marks=pytest.mark.slow),
    pytest.param(
      dict(model=dict(dtype="bfloat16", param_dtype="bfloat16")),
      id="16-bit parameters",
    ),
  ],
)
def test_averages_and_16_bit_parameters_survive_a_death(
  tmp_path: Path, monkeypatch, changes: dict
) -> None:
  config = tiny(steps=7, eval_every=3, save_every=100, log_every=4, **changes)
  run(config, tmp_path / "undisturbed")
  _run_that_dies(config, tmp_path / "run", monkeypatch)
  assert _records(tmp_path / "run") == _records(tmp_path / "undisturbed")
  step, found = saved_bits(tmp_path / "run", config)
  assert step == 7
  assert (step, found) == saved_bits(tmp_path / "undisturbed", config)
  dtypes = {dtype for dtype, *_ in found.values()}
  assert ("bfloat16" in dtypes) == ("model" in changes)


def _run_that_dies(config: RunConfig, folder: Path, monkeypatch) -> None:
  """Save step 2, die in step 6, and run again to the end."""

  class Killed(BaseException):
    pass

  def die() -> None:
    raise Killed

  config = dataclasses.replace(config, save_every=2)
  with monkeypatch.context() as patch:
    _at_batch(patch, "train", 6, die)
    patch.setattr(Checkpoints, "save", _only_step_2(Checkpoints.save))
    with pytest.raises(Killed):
      run(config, folder)
  assert _records(folder)[-1]["step"] > 2
  _, out = run(config, folder)
  assert "resuming at step 2" in out


def _only_step_2(save: Callable) -> Callable:
  def saved(self, step, *rest):
    if step == 2:
      save(self, step, *rest)

  return saved


@pytest.fixture
def as_one_of_several(monkeypatch) -> None:
  """Let this process vote, as one of several processes does."""
  monkeypatch.setattr(processes, "are_several", lambda: True)


def test_a_stand_in_spoils_the_step_of_all_processes() -> None:
  """Weights of 0 would let the step train on the rows of the others."""
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  fields = {
    "tokens": jax.ShapeDtypeStruct((4, 3), np.int32),
    "weights": jax.ShapeDtypeStruct((4, 2), np.float32),
  }
  found = failing_together.make_stand_in(fields, 4, mesh)
  np.testing.assert_array_equal(found["tokens"], np.zeros((4, 3), np.int32))
  np.testing.assert_array_equal(found["weights"], np.full((4, 2), np.nan))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.usefixtures("as_one_of_several")
def test_data_that_fails_in_one_of_several_processes_saves_the_run(
  undisturbed: Path, tmp_path: Path, monkeypatch, skip: bool
) -> None:
  """Steps without data run until the vote is read, and change nothing."""
  folder = tmp_path / "run"
  config = dataclasses.replace(_STEPS, nan="skip" if skip else "abort")
  with monkeypatch.context() as patch:
    _train_batches(patch, lambda data: Failing(data, 5, DataError))
    with pytest.raises(TrainingFailed, match="step 5 is damaged"):
      run(config, folder)
  saved, meta = read_meta(folder / "checkpoints")
  assert saved == 4 and meta["skipped"] == 0
  assert not list(folder.glob("*-step-*"))  # nothing was taken for a NaN
  assert run(config, folder)[0].reason == "finished"
  records = [
    {k: v for k, v in x.items() if k != "skipped_steps"}
    for x in _records(folder)
  ]
  assert records == _records(undisturbed)
  assert saved_bits(folder, config) == saved_bits(undisturbed, _STEPS)


@pytest.mark.usefixtures("as_one_of_several")
def test_a_record_that_fails_in_one_of_several_processes_saves_the_run(
  undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
  folder = tmp_path / "run"
  write = MetricsWriter.write

  def fail(self, kind: str, step: int, **values: float) -> None:
    if step == 4:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(self, kind, step, **values)

  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "write", fail)
    with pytest.raises(OSError, match="No space left"):
      run(_STEPS, folder)
  assert read_meta(folder / "checkpoints")[0] == 5  # step 4 was on its way
  assert run(_STEPS, folder)[0].reason == "finished"
  evaluations = [x for x in _records(folder) if x["kind"] == "eval"]
  assert evaluations == [
    x for x in _records(undisturbed) if x["kind"] == "eval"
  ]
  assert saved_bits(folder, _STEPS) == saved_bits(undisturbed, _STEPS)


@pytest.mark.parametrize("error", [DataError, OSError, ValueError])
def test_data_that_fails_saves_the_run(
  undisturbed: Path, tmp_path: Path, monkeypatch, capsys, error: type
) -> None:
  folder = tmp_path / "run"
  words = ("train", "mqar", *flags(_STEPS), "--run-dir", str(folder))
  with monkeypatch.context() as patch:
    _train_batches(patch, lambda data: Failing(data, 5, error))
    # A ValueError that the trainer does not know keeps its traceback.
    known = error is not ValueError
    with pytest.raises(SystemExit if known else RuntimeError) as end:
      cli.main(words)
  out, err = capsys.readouterr()
  if known:
    assert end.value.code == 1 and "step 5 is damaged" in err
    assert "Traceback" not in err
  else:
    assert str(end.value) == "the run failed: ValueError: step 5 is damaged"
    assert isinstance(end.value.__cause__, ValueError)
  assert "saved at step 4 after a failure" in out  # batch 4 was not used yet
  assert read_meta(folder / "checkpoints")[0] == 4
  assert run(_STEPS, folder)[0].reason == "finished"
  _assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_that_fails_saves_the_run(
  undisturbed: Path, tmp_path: Path, monkeypatch, several: bool
) -> None:
  folder = tmp_path / "run"
  monkeypatch.setattr(processes, "are_several", lambda: several)
  make = MQARStreamData.eval_batches
  with monkeypatch.context() as patch:
    patch.setattr(
      MQARStreamData,
      "eval_batches",
      lambda *args: Failing(make(*args), 1, DataError),
    )
    with pytest.raises(TrainingFailed, match="step 1 is damaged"):
      run(_STEPS, folder)
  saved, meta = read_meta(folder / "checkpoints")
  assert (saved, meta["evaluation_due"]) == (3, True)
  run(_STEPS, folder)
  _assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("kind", ["train_batches", "eval_batches"])
def test_a_signal_ends_a_long_wait_for_data(
  undisturbed: Path, tmp_path: Path, monkeypatch, kind: str
) -> None:
  folder, released = tmp_path / "run", threading.Event()
  make = getattr(MQARStreamData, kind)
  within, awaited = prefetch.within, [""]

  def wait(_: str) -> None:
    # The batch is read ahead: the run waits for it later.
    while awaited[-1] != f"the batch of step {at}":
      time.sleep(0.01)
    _terminate()
    released.wait()

  def noted(seconds, what, *rest):
    awaited.append(what)
    found = within(seconds, what, *rest)
    awaited.append("")
    return found

  monkeypatch.setattr(prefetch, "_HURRIED", 0.1)
  monkeypatch.setattr(prefetch, "within", noted)
  at, step = {"train_batches": (5, 4), "eval_batches": (1, 3)}[kind]
  with monkeypatch.context() as patch:
    patch.setattr(
      MQARStreamData, kind, lambda *args: Failing(make(*args), at, wait)
    )
    with pytest.raises(DataTimeout, match="0.1 s after a signal") as error:
      run(_STEPS, folder)
  released.set()
  assert error.value.exit_code == 143
  assert read_meta(folder / "checkpoints")[0] == step
  run(_STEPS, folder)
  _assert_same_end(folder, undisturbed)


def test_no_error_in_a_run_means_that_nothing_was_changed() -> None:
  """Which a ValueError would mean, with exit code 2."""
  for error, wanted in (
    (DataError("shard 3"), TrainingFailed),
    (RunFolderError("metrics.jsonl"), TrainingFailed),
    (ValueError("odd"), RuntimeError),
    (NotImplementedError("odd"), RuntimeError),
  ):
    with pytest.raises(wanted, match=str(error)), start_run._failing():
      raise error
  with pytest.raises(TypeError), start_run._failing():
    raise TypeError
