"""The command and `rebased_jax.load` beside a user's own module `train`."""

import os
from pathlib import Path
import subprocess
import sys

import chex
import jax
import pytest
from train_cases import ROOT, environment, run, tiny, trainer as trainer

import rebased_jax
import train
from train.records.run_folder import RunFolder

# What pip writes for the console script.
_SCRIPT = """\
import sys
from rebased_jax.find_trainer import main
if __name__ == "__main__":
  sys.exit(main())
"""
_WRONG = "raise SystemExit('this is the wrong train')\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trainer: Path) -> Path:
  folder = tmp_path_factory.mktemp("run") / "finished"
  run(tiny(steps=4, eval_every=4), folder)
  return folder


def _environment(cache: Path, *paths: str) -> dict[str, str]:
  return environment(cache) | {"PYTHONPATH": os.pathsep.join(paths)}


def _run(words: list[str], cwd: Path, env: dict[str, str]) -> str:
  """Return what a process printed; it must succeed."""
  done = subprocess.run(
    [sys.executable, *words],
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_the_command_and_its_workers(tmp_path: Path, trainer: Path) -> None:
  """With PYTHONPATH=. and a package `train/` in the working directory."""
  script = tmp_path / "bin" / "rebased"
  script.parent.mkdir()
  script.write_text(_SCRIPT)
  cwd = tmp_path / "cwd"
  (cwd / "train").mkdir(parents=True)
  (cwd / "train" / "__init__.py").write_text(_WRONG)
  (cwd / "train" / "config.py").write_text(_WRONG)
  for name in ("a", "b"):
    (cwd / f"{name}.txt").write_text(f"The letter {name}, again. " * 200)
  env = _environment(trainer, ".", str(ROOT))

  assert "versions" in _run([str(script), "doctor"], cwd, env)
  words = ["prepare", "a.txt", "b.txt", "--out", "tokens", "--workers", "2"]
  assert "2 documents" in _run([str(script), *words], cwd, env)
  words = [
    *("train", "lm-tiny", "--data.path", "tokens", "--data.workers", "1"),
    *("--data.length", "32", "--data.eval-rows", "4", "--steps", "4"),
    *("--batch", "4", "--optimizer.warmup-steps", "1", "--run-dir", "run"),
    *("--model.width", "16", "--model.mlp-width", "16", "--eval-every", "4"),
  ]
  assert "4 of 4" in _run([str(script), *words], cwd, env)
  assert RunFolder(cwd / "run").read_config().data.workers == 1


_LOADS = """
import sys
import rebased_jax
{before}
model = rebased_jax.load({folder!r})
assert type(model) is rebased_jax.LM
step_2 = rebased_jax.load({folder!r}, 2)
{after}
print("width", model.config.width)
"""
_IMPORT = """
import train
assert train.NAME == "mine" and sys.modules["train"] is train
"""
_GONE = """
import train.helper
assert "train.config" not in sys.modules
assert train.NAME == "mine" and train.helper.NAME == "helper"
"""


@pytest.mark.parametrize(
  ("kind", "imported_before"), [("file", False), ("package", True)]
)
def test_load(
  finished: Path,
  tmp_path: Path,
  trainer: Path,
  kind: str,
  imported_before: bool,
) -> None:
  """A user's `train` is what it was, whether it was imported or not."""
  name = "train.py" if kind == "file" else "train/__init__.py"
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text("NAME = 'mine'\n")
  after = _IMPORT
  if kind == "package":
    (tmp_path / "train" / "helper.py").write_text("NAME = 'helper'\n")
    after += _GONE
  code = _LOADS.format(
    folder=str(finished),
    before=_IMPORT if imported_before else "",
    after=after,
  )
  (tmp_path / "mine.py").write_text(code)
  out = _run(["mine.py"], tmp_path, _environment(trainer, str(ROOT)))
  assert out == "width 16\n"


def test_training_from_a_script_named_train(
  tmp_path: Path, trainer: Path
) -> None:
  code = """
import dataclasses
import rebased_jax
if __name__ == "__main__":
  with rebased_jax.import_trainer() as trainer:
    config = trainer.make_presets()["mqar"]
    config = dataclasses.replace(
      config,
      data=dataclasses.replace(config.data, test_examples=4),
      optimizer=trainer.OptimizerConfig(),
      steps=2,
      batch=4,
    )
    outcome = trainer.run(config, "run")
  print(outcome.reason, outcome.step)
"""
  (tmp_path / "train.py").write_text(code)
  out = _run(["train.py"], tmp_path, _environment(trainer, str(ROOT)))
  assert out.splitlines()[-1] == "finished 2"
  assert (tmp_path / "run" / "learning.png").exists()


def test_run_and_load_after_the_context(tmp_path: Path, trainer: Path) -> None:
  """They find the trainer themselves, and the user's `train` comes back."""
  code = f"""
import dataclasses
import sys
import rebased_jax
{_IMPORT}
with rebased_jax.import_trainer() as trainer:
  run, load = trainer.run, trainer.load
  config = trainer.make_presets()["mqar"]
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, test_examples=4),
    optimizer=trainer.OptimizerConfig(),
    steps=2,
    batch=4,
  )
outcome = run(config, "run")
assert load("run").config == config.model
{_IMPORT}
print(outcome.reason, outcome.step)
"""
  (tmp_path / "train.py").write_text("NAME = 'mine'\n")
  (tmp_path / "mine.py").write_text(code)
  out = _run(["mine.py"], tmp_path, _environment(trainer, str(ROOT)))
  assert out.splitlines()[-1] == "finished 2"


def test_load_is_that_of_the_trainer(finished: Path) -> None:
  model, same = rebased_jax.load(str(finished)), train.load(finished)
  assert sys.modules["train"] is train
  chex.assert_trees_all_equal(jax.tree.leaves(model), jax.tree.leaves(same))
  everywhere = jax.NamedSharding(jax.make_mesh((8,), "x"), jax.P())
  spread = rebased_jax.load(finished, sharding=everywhere)
  assert spread.norm.scale[...].sharding == everywhere
  chex.assert_trees_all_equal(jax.tree.leaves(model), jax.tree.leaves(spread))


def test_errors_are_those_of_the_trainer(tmp_path: Path) -> None:
  with pytest.raises(train.RunFolderError, match="is no run folder"):
    rebased_jax.load(str(tmp_path))
