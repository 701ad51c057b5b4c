"""Tiny runs for the tests of the trainer, in this process and in others."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import io
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig
from train import cli, compiled_steps, start_run
from train.config import MQARStreamData, OptimizerConfig, RunConfig
from train.data.batches import Batches
from train.loop import Outcome
from train.presets import make_presets
from train.records.run_folder import RunFolder

ROOT = Path(__file__).parents[2]

# Sends a signal from inside a step, so that the run stops after a known one:
# the batch of the next step is put ahead.
_SIGNAL = """
import os, signal
from train.devices import batch_sharding
put, count = batch_sharding.put_batch, 0
def put_batch(*args):
  global count
  count += sys._getframe(2).f_code.co_name == "put_ahead"
  if count == {at} + 1:
    os.kill(os.getpid(), signal.{name})
  return put(*args)
batch_sharding.put_batch = put_batch
"""


@pytest.fixture(autouse=True, scope="module")
def trainer(tmp_path_factory):
  """Use what training needs: standard promotion, and short compilations.

  Yields:
    A folder of compiled programs for child processes. It lasts for this test
    run only, because a killed child may leave a program incomplete.
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  with jax.numpy_dtype_promotion("standard"):
    yield tmp_path_factory.getbasetemp() / "compiled"
  jax.config.update(name, before)


@pytest.fixture(scope="module")
def built_once(trainer):
  """Trace and compile each config once for all runs of a module's tests."""
  with pytest.MonkeyPatch.context() as patch:
    cached = functools.cache(compiled_steps.build)
    patch.setattr(compiled_steps, "build", cached)
    yield


def tiny(*, model=None, data=None, optimizer=None, **changes) -> RunConfig:
  """Return a run of 6 steps of 8 rows, which evaluates and saves every 2."""
  data_config = MQARStreamData(
    **{
      **dict(vocab_size=32, length=16, pairs=2, test_examples=20),
      **(data or {}),
    }
  )
  model_config = ModelConfig(
    first=BaseConvConfig(),
    second=ReBasedConfig(heads=2, features=4),
    **{**dict(vocab_size=32, width=16, positions=16), **(model or {})},
  )
  optimizer_config = OptimizerConfig(
    **{
      **dict(learning_rate=1e-2, warmup_steps=2, clip_norm=1.0),
      **(optimizer or {}),
    }
  )
  rest = dict(steps=6, batch=8, eval_every=2, save_every=2, log_every=1)
  return RunConfig(
    model_config, data_config, optimizer_config, **{**rest, **changes}
  )


def flags(config: RunConfig, preset: str = "mqar") -> list[str]:
  """Return the options that turn a preset into `config`."""

  def walk(old: Any, new: Any, path: str) -> list[str]:
    if dataclasses.is_dataclass(old):
      rows = (
        walk(getattr(old, x.name), getattr(new, x.name), f"{path}.{x.name}")
        for x in dataclasses.fields(old)
      )
      return [word for row in rows for word in row]
    name = f"--{path[1:].replace('_', '-')}"
    return [] if old == new else [name, str(new)]

  return walk(make_presets()[preset], config, "")


def run(config: RunConfig, path: Path) -> tuple[Outcome, str]:
  """Train in this process; return the outcome and what it printed."""
  text = io.StringIO()
  outcome = start_run.train(
    config, RunFolder(path), Console(file=text, width=200)
  )
  return outcome, text.getvalue()


def command(
  *args: str, cache: Path, before: str = "", devices: int = 1, cwd: Path = ROOT
) -> subprocess.Popen:
  """Start `rebased ARGS`, after the lines `before`."""
  code = f"{before}\nfrom train.cli import main\nmain()"
  return subprocess.Popen(
    [sys.executable, "-c", code, *args],
    cwd=cwd,
    env=environment(cache, devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def signal_at(at: int, name: str) -> str:
  """Return code with which a process sends itself a signal in step `at`."""
  return "import sys" + _SIGNAL.format(at=at, name=name)


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
    # The flags of this process, whose bits those of a child have to equal.
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
    f"--xla_force_host_platform_device_count={devices}",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Return (exit code, stdout, stderr) of a process of `command`."""
  with contextlib.closing(process.stdout), contextlib.ExitStack() as hung:
    hung.callback(process.kill)  # does nothing to one that has ended
    out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def metrics(path: Path, kind: str = "train") -> list[tuple[int, float]]:
  """Return (step, loss) of every record of a kind, in the file's order."""
  lines = (path / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [(x["step"], x["loss"]) for x in records if x["kind"] == kind]


def bits(tree: Any) -> dict[str, tuple]:
  """Return dtype, shape and bytes of every leaf, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      str(x.dtype),
      x.shape,
      np.asarray(x).tobytes(),
    )
    for path, x in leaves
  }


def saved_bits(path: Path, config: RunConfig) -> tuple[int, dict[str, tuple]]:
  """Return (step, bits of the arrays) of a run's newest checkpoint."""
  from train.checkpoint.checkpoints import Checkpoints
  from train.devices import mesh as mesh_lib

  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    abstract = compiled_steps.to_dicts(
      compiled_steps.build(config, mesh).abstract
    )
    with Checkpoints(path / "checkpoints", keep=config.keep) as checkpoints:
      found = checkpoints.restore(abstract)
  assert not found.broken
  return found.step, bits(found.state)


def files(path: Path) -> dict[str, tuple]:
  """Return contents and times of everything under a folder."""
  return {
    str(x.relative_to(path)): (
      x.stat().st_mtime_ns,
      x.read_bytes() if x.is_file() else None,
    )
    for x in sorted(path.rglob("*"))
  }


@dataclasses.dataclass(frozen=True)
class Spoiled(Batches):
  """Batches with one weight that is not finite."""

  source: Batches
  bad_step: int

  @property
  def rows(self) -> int:
    return self.source.rows

  @property
  def length(self) -> int:
    return self.source.length

  @property
  def num_batches(self) -> int | None:
    return self.source.num_batches

  @property
  def fingerprint(self) -> dict:
    return self.source.fingerprint

  def read_rows(self, step: int, start: int, stop: int) -> dict:
    batch = self.source.read(step, slice(start, stop))
    if step == self.bad_step:
      batch["weights"][0, 0] = np.nan
    return batch


@dataclasses.dataclass(frozen=True)
class Failing(Spoiled):
  """Batches of which one cannot be read, or calls a function that waits."""

  error: Callable[[str], Exception | None]

  def read_rows(self, step: int, start: int, stop: int) -> dict:
    if step == self.bad_step:
      failure = self.error(f"step {step} is damaged")
      if failure is not None:
        raise failure
    return self.source.read(step, slice(start, stop))


@pytest.fixture
def call(capsys, monkeypatch, tmp_path: Path):
  """Return a function that runs a command in an empty folder.

  It returns (exit code, stdout, stderr).
  """
  monkeypatch.setenv("COLUMNS", "200")
  (tmp_path / "cwd").mkdir()
  monkeypatch.chdir(tmp_path / "cwd")

  def call(*args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
      cli.main(args)
    out, err = capsys.readouterr()
    return exit.value.code, out, err

  return call
