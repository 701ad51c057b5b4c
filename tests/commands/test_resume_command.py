"""Test `rebased resume`: what it changes, and what it refuses by name."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from train_cases import call as call, tiny, trainer as trainer

from train import start_run
from train.config import MeshConfig, ProfileConfig
from train.records.run_folder import RunFolder


@pytest.fixture
def resumed(call, tmp_path: Path, monkeypatch):
  """Return a function that resumes a new run.

  It returns what `train.run` is called with, or the message of the refusal.
  """
  folder = tmp_path / "run"
  RunFolder(folder).open(tiny(keep_every=4))
  calls = []

  def run(config, run_dir, **flags):
    calls.append((config, flags["allow_optimizer_change"]))
    return SimpleNamespace(exit_code=0)

  monkeypatch.setattr(start_run, "run", run)

  def resumed(*words: str):
    code, _, err = call(
      "resume", *[x.replace("RUN", str(folder)) for x in words]
    )
    assert code == (0 if calls else 2), err
    return calls.pop() if calls else err

  return resumed


def test_what_is_not_named_stays(resumed) -> None:
  assert resumed("RUN") == (tiny(keep_every=4), False)


def test_records_saves_and_devices_change_freely(resumed) -> None:
  config, allows = resumed(
    *("RUN", "--log-every", "3", "--eval-every", "4", "--save-every", "8"),
    *("--keep", "9", "--keep-every", "None", "--tensorboard", "--nan", "skip"),
    *("--stop-accuracy", "0.9", "--wandb", "project", "--mesh.fsdp", "2"),
    *("--profile.start", "1", "--profile.steps", "2", "--loss-chunks", "2"),
    *("--model.remat", "dots"),
  )
  changes = dict(log_every=3, eval_every=4, save_every=8, keep=9, nan="skip")
  expected = tiny(
    **changes,
    stop_accuracy=0.9,
    wandb="project",
    tensorboard=True,
    mesh=MeshConfig(fsdp=2),
    profile=ProfileConfig(1, 2),
    loss_chunks=2,
    model=dict(remat="dots"),
  )
  assert (config, allows) == (expected, False)


def test_steps_and_rate_are_changed_on_purpose(resumed) -> None:
  run = tiny(keep_every=4)
  assert resumed("RUN", "--steps", "9") == (
    dataclasses.replace(run, steps=9),
    True,
  )
  rate = ("--optimizer.learning-rate", "1e-3")
  said = resumed("RUN", *rate)
  assert "--optimizer.learning-rate: 0.01 → 0.001: expected --allow-o" in said
  assert "--allow-optimizer-change" in resumed("RUN", "--steps", "9", *rate)
  config, allows = resumed("RUN", *rate, "--allow-optimizer-change")
  optimizer = dataclasses.replace(run.optimizer, learning_rate=1e-3)
  assert config == dataclasses.replace(run, optimizer=optimizer) and allows


@pytest.mark.parametrize(
  "words, expected",
  [
    (
      ("RUN", "--model.width", "8"),
      "--model.width with resume: a run keeps it",
    ),
    (("RUN", "--model.width=8"), "config.json --model.width …` trains another"),
    (("RUN", "--lr", "1"), "no option --lr; did you mean --optimizer.learning"),
    (("RUN", "--steps", "1"), "warmup-steps=2: expected below --steps=1"),
    (("RUN", "--keep", "0"), "--keep=0: expected an integer ≥ 1"),
    (("RUN", "--data.workers", "2"), "--data.workers=2: expected none with MQ"),
    (("RUN", "more"), "'more' is one argument too many"),
    ((), "missing: RUN"),
    (("--steps", "9"), "missing: RUN"),
    (
      ("--steps", "9", "RUN-none"),
      "does not exist: expected the folder of a run",
    ),
  ],
)
def test_what_is_refused(
  resumed, words: tuple[str, ...], expected: str
) -> None:
  assert expected in resumed(*words)
