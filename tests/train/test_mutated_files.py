"""Damaged files of runs and data sets: a named error, or the right values.

Each is read by a command, as users do, and by the functions that training uses.
Nothing may end in a traceback or hang. Where a checksum exists, what is read
must be what was written.
"""

from collections.abc import Callable, Iterator
import contextlib
import io
from pathlib import Path
import random
import shutil
import signal
import sys
import time

from checkpoint_cases import bits
from data_cases import write_megatron, write_prepared
import jax
from mutations import mutate
import numpy as np
import pytest
from text_cases import DOCUMENTS, make_config
from train_cases import run, trainer as trainer

from train import cli, compiled_steps
from train.checkpoint import CheckpointError, restore_params
from train.data.text.lm_batches import LMBatches
from train.data.text.rows import Layout
from train.records.run_folder import RunFolder

_LIMIT = 20.0  # seconds that one damaged file may take

# Threads of a failed read may still complain after it has returned.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
  """Return a folder with a run, and data in two formats."""
  folder = tmp_path_factory.mktemp("whole")
  some = DOCUMENTS[:60]
  write_prepared(folder / "set", (some[:30], some[30:]), domains=("a", "b"))
  write_megatron(folder / "tokens", some)
  config = make_config(
    folder / "set", data=dict(eval_rows=4), steps=4, eval_every=4
  )
  run(config, folder / "run")
  return folder


class Hang(BaseException):
  """A read that takes too long; no handler of errors catches it."""


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
  def stop(number, frame):
    raise Hang

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, _LIMIT)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _command(*args: str) -> str:
  """Run a command; return its errors, or fail with its traceback."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      cli.main(args)
    except SystemExit as exit:
      code = exit.code
  text = err.getvalue()
  assert code in (0, 1, 2), (code, text)
  assert (code == 0) == (text == ""), (code, text)
  assert text.count("\n") <= 1 and len(text) < 2000, text
  return text


def _read_run(folder: Path) -> str:
  return _command("inspect", str(folder / "run"))


def _read_metrics(folder: Path) -> str:
  try:
    run_folder = RunFolder(folder / "run")
    run_folder.last_save()
    run_folder.cut_metrics(2)
  except ValueError as error:
    assert str(folder / "run") in str(error)
  return _read_run(folder)


def _read_checkpoint(folder: Path, expected) -> str:
  config, params = expected
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  try:
    step, found = restore_params(folder / "run" / "checkpoints", target, 4)
    assert step == 4 and bits(found) == bits(params)
  except CheckpointError as error:
    assert str(folder / "run" / "checkpoints") in str(error)
  return _command("inspect", str(folder / "run" / "checkpoints" / "4"))


def _batches(path: Path, cache: Path) -> list[dict[str, np.ndarray]]:
  layout = Layout(16, "documents", 0.2, 0.0, "documents")
  data = LMBatches((str(path),), layout, 8, cache_dir=cache)
  return [data.read(step) for step in range(4)]


def _read_data(folder: Path, name: str, expected, checked: bool) -> str:
  text = _command("inspect", "data", str(folder / name))
  try:
    found = _batches(folder / name, folder / "plans")
  except (ValueError, OSError) as error:
    assert str(folder) in str(error), error
    return text
  if checked:
    for batch, other in zip(found, expected, strict=True):
      for key, array in batch.items():
        np.testing.assert_array_equal(array, other[key])
  return text


def _subjects(
  whole: Path, cache: Path
) -> dict[str, tuple[list[str], Callable]]:
  """Return, by kind, the files and the function that reads them."""
  config = RunFolder(whole / "run").read_config()
  model = compiled_steps.abstract_model(config)
  from flax import nnx

  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    nnx.to_pure_dict(nnx.state(model, nnx.Param)),
  )
  saved = (config, restore_params(whole / "run" / "checkpoints", abstract)[1])
  step = whole / "run" / "checkpoints" / "4"
  arrays = [
    str(x.relative_to(whole))
    for x in sorted(step.rglob("*"))
    if x.is_file() and "record" not in x.relative_to(step).parts
  ]
  prepared = _batches(whole / "set", cache)
  shards = sorted(x.name for x in (whole / "set").glob("shard*"))
  return {
    "config.json": (["run/config.json"], _read_run),
    "metrics": (["run/metrics.jsonl", "run/last_save.json"], _read_metrics),
    "record": (
      ["run/checkpoints/4/record/data.json"],
      lambda folder: _read_checkpoint(folder, saved),
    ),
    "arrays": (arrays, lambda folder: _read_checkpoint(folder, saved)),
    "dataset.json": (
      ["set/dataset.json"],
      lambda folder: _read_data(folder, "set", prepared, checked=False),
    ),
    "shards": (
      [f"set/{name}" for name in shards],
      lambda folder: _read_data(folder, "set", prepared, checked=True),
    ),
    "megatron": (
      ["tokens.idx", "tokens.bin"],
      lambda folder: _read_data(folder, "tokens.idx", None, checked=False),
    ),
  }


def _try(whole: Path, work: Path, each: dict[str, int], seed: int) -> None:
  """Damage files of each kind and read them; fail with a list of faults."""
  chance, faults, named, slowest = random.Random(seed), [], 0, 0.0
  subjects = _subjects(whole, work / "plans")
  for kind, count in each.items():
    names, read = subjects[kind]
    for number in range(count):
      folder = work / "copy"
      shutil.copytree(whole, folder)
      done = mutate(folder / chance.choice(names), chance)
      begin = time.monotonic()
      try:
        with _in_time():
          named += bool(read(folder))
      except BaseException as error:  # noqa: BLE001  # a fault, whatever it is
        what = str(error).splitlines() or [""]
        faults.append(
          f"{kind} {number}, {done}: {type(error).__name__}: {what[0]:.200}"
        )
      slowest = max(slowest, time.monotonic() - begin)
      shutil.rmtree(folder)
  total = sum(each.values())
  print(
    f"{total} files: {named} named, slowest {slowest:.1f} s", file=sys.stderr
  )
  assert not faults, "\n".join([f"{len(faults)} of {total}:", *faults])


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("COLUMNS", "200")
  return tmp_path


def test_some_damaged_files(whole: Path, work: Path) -> None:
  each = {
    "config.json": 14,
    "metrics": 10,
    "record": 6,
    "arrays": 6,
    "dataset.json": 10,
    "shards": 10,
    "megatron": 6,
  }
  _try(whole, work, each, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_damaged_files(whole: Path, work: Path, seed: int) -> None:
  each = {
    "config.json": 90,
    "metrics": 50,
    "record": 30,
    "arrays": 30,
    "dataset.json": 60,
    "shards": 60,
    "megatron": 30,
  }
  _try(whole, work, each, seed)
