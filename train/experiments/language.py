"""Table 2 of the paper, at a size that one GPU trains: perplexity on text.

    OUT/text/                    the text of the Python installation, as tokens
    OUT/cells/NAME.json          the record of a finished cell
    OUT/cells/NAME.partial/      the run folder of an unfinished one

A cell is one system with one seed. It is a run of `rebased train`, so that a
cell that was stopped or killed continues at its newest checkpoint. All cells
have the same rows, as many tokens and the hyper-parameters of the paper, except
batch, length and number of steps. Seeds differ in parameters, dropout and the
order of the rows.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import shutil
import signal
import statistics
import threading
from typing import Any

import jax
from rich.console import Console

from rebased_jax import atomic, parameter_count
from train import compiled_steps, presets, stored_config
from train.config import RunConfig, TextData
from train.data.prepare.prepare_dataset import PrepareConfig, prepare
from train.data.prepare.train_tokenizer import (
  TokenizerTraining,
  train_tokenizer,
)
from train.experiments import text_corpus
from train.experiments.record import RecordError
from train.experiments.run_cell import commit_of_checkout
from train.records.run_folder import RunFolder
from train.start_run import run as run_training
from train.stop_signals import StopSignals

SYSTEMS = ("attention", "conv-attention", "based", "rebased")
SEEDS = (0, 1)
METRICS = ("perplexity", "ar_perplexity", "non_ar_perplexity", "ar_share")
_KIND = "text, 1"  # of the record; the number changes with its fields
_PARTS = ("train", "held-out")


@dataclasses.dataclass(frozen=True)
class Size:
  """The text and the models of a table."""

  #: The preset; its system is replaced.
  preset: str = "pile-145m-rebased"
  #: Take the text of installed packages too, not of the standard library alone.
  packages: bool = True
  #: The most text, in MiB.
  corpus_mb: int = 320
  #: The part of it that trains the tokenizer, in MiB.
  sample_mb: int = 24
  vocab_size: int = 16_384
  #: Tokens of a row.
  length: int = 2048
  #: Rows of a step.
  batch: int = 32
  #: Updates of the parameters: 201 M tokens.
  steps: int = 3072
  #: Held-out rows.
  eval_rows: int = 256
  #: Evaluations of a run.
  evals: int = 8


FULL = Size()
QUICK = Size(
  preset="lm-tiny-rebased",
  packages=False,
  corpus_mb=2,
  sample_mb=1,
  vocab_size=512,
  length=64,
  batch=8,
  steps=24,
  eval_rows=32,
  evals=2,
)


@dataclasses.dataclass(frozen=True)
class TextCell:
  """One system with one seed."""

  system: str
  seed: int
  size: Size

  @property
  def name(self) -> str:
    """The name of its record."""
    return f"text-{self.system}-seed{self.seed}"


def make_cells(
  size: Size = FULL, seeds: tuple[int, ...] = SEEDS
) -> dict[str, TextCell]:
  """Return the cells by name, in the order of running."""
  # One seed of each system comes before another seed.
  cells = [TextCell(x, seed, size) for seed in seeds for x in SYSTEMS]
  return {cell.name: cell for cell in cells}


def make_config(cell: TextCell, text: Path) -> RunConfig:
  """Return the run of a cell.

  Args:
    cell: the cell.
    text: the folder of `make_text`.
  """
  size = cell.size
  if cell.system == "attention" and size.preset.startswith("pile"):
    run = presets.make_presets()["pile-127m-attention"]  # that of Table 9
  else:
    run = presets.with_system(size.preset, cell.system)
  assert isinstance(run.data, TextData)
  model = run.model
  placed = None if model.positions is None else size.length
  return dataclasses.replace(
    run,
    model=dataclasses.replace(
      model, vocab_size=size.vocab_size, positions=placed
    ),
    data=dataclasses.replace(
      run.data,
      path=(str(text / "tokens" / "train"),),
      eval_path=(str(text / "tokens" / "held-out"),),
      validation=0.0,
      length=size.length,
      eval_rows=size.eval_rows,
      cache_dir=str(text / "plans"),
    ),
    optimizer=dataclasses.replace(
      run.optimizer, warmup_steps=min(200, size.steps // 5)
    ),
    steps=size.steps,
    batch=size.batch,
    accumulate=1,
    eval_every=size.steps // size.evals,
    save_every=size.steps // 4,
    log_every=max(size.steps // 64, 1),
    keep=1,
    seed=cell.seed,
  )


def make_text(size: Size, folder: Path, console: Console) -> dict[str, Any]:
  """Collect the text, train the tokenizer and make tokens, unless it is done.

  Args:
    size: how much text.
    folder: gets `corpus.json`, `tokenizer.json`, `text/` and `tokens/`.
    console: shows the progress.

  Returns:
    The content of `corpus.json`: what the text is, and its hash.

  Raises:
    RecordError: the folder holds a text of another size.
    PrepareError: the text cannot be prepared.
  """
  path = folder / "corpus.json"
  names = ("packages", "corpus_mb", "sample_mb", "vocab_size")
  made_by = {name: getattr(size, name) for name in names}
  if path.exists():
    found = json.loads(path.read_text())
    if found["made_by"] != made_by:
      raise RecordError(
        f"{path} was made with {found['made_by']}: expected {made_by}: use "
        "another folder"
      )
    return found
  shutil.rmtree(folder, ignore_errors=True)  # left by a command that was killed
  documents = text_corpus.gather(size.packages, size.corpus_mb << 20)
  text_corpus.write(documents, folder / "text", 2 * (os.cpu_count() or 1))
  tokenizer = folder / "tokenizer.json"
  sample = TokenizerTraining(
    str(tokenizer), vocab_size=size.vocab_size, sample_mb=size.sample_mb
  )
  train_tokenizer(sample, [str(folder / "text" / "train")])
  found = {"made_by": made_by, **text_corpus.describe(documents)}
  for part in _PARTS:
    out = str(folder / "tokens" / part)
    config = PrepareConfig(out, tokenizer=str(tokenizer))
    made = prepare(config, [str(folder / "text" / part)], console)
    assert made is not None  # this process makes every shard
    counts = ("documents", "tokens", "text_bytes")
    found[part] = {name: made[name] for name in counts}
    found["tokenizer_sha256"] = made["tokenizer"]["sha256"]
  atomic.write_json(path, found)
  return found


def run_text_cell(
  cell: TextCell,
  folder: Path,
  corpus: dict[str, Any],
  *,
  seconds: float | None,
  console: Console,
) -> tuple[dict[str, Any] | None, int]:
  """Train a cell, or what is left of it, and write its record.

  Args:
    cell: the cell.
    folder: holds `text/`, and gets `cells/`.
    corpus: as `make_text` returned it.
    seconds: save and stop after this time. None: no limit.
    console: prints the progress of the run.

  Returns:
    The record, None if the cell is not finished; and the exit code of a signal,
    or 0.

  Raises:
    RecordError: the record is of another cell or another text.
    RunFolderError: the unfinished run is of another config.
    TrainingFailed: a step was not finite.
  """
  path = folder / "cells" / f"{cell.name}.json"
  if path.exists():
    found = read(path, cell)
    if found["corpus"]["sha256"] != corpus["sha256"]:
      raise RecordError(
        f"{path} is of another text: its sha256 begins with "
        f"{found['corpus']['sha256'][:12]}, and that of this installation with "
        f"{corpus['sha256'][:12]}: use another --out"
      )
    return found, 0
  config = make_config(cell, (folder / "text").absolute())
  partial = folder / "cells" / f"{cell.name}.partial"
  with _stopping_after(seconds) as late:
    outcome = run_training(config, partial, console=console)
  if outcome.reason == "signal":
    return None, 0 if late.is_set() else outcome.exit_code
  record = make_record(cell, config, RunFolder(partial).read_metrics(), corpus)
  atomic.write_json(path, record)
  shutil.rmtree(partial)
  return record, 0


@contextlib.contextmanager
def _stopping_after(seconds: float | None) -> Iterator[threading.Event]:
  """Stop a run inside the context after some time, as a signal does.

  Args:
    seconds: the time. None: never.

  Yields:
    An event that is set when the time is over.
  """
  late = threading.Event()

  def stop() -> None:
    late.set()
    os.kill(os.getpid(), signal.SIGTERM)

  timer = None if seconds is None else threading.Timer(max(seconds, 0), stop)
  # The handlers here outlive those of the run: a signal that comes just after
  # its end does nothing.
  with StopSignals():
    if timer is not None:
      timer.start()
    try:
      yield late
    finally:
      if timer is not None:
        timer.cancel()
        timer.join()


def make_record(
  cell: TextCell,
  config: RunConfig,
  metrics: list[dict[str, Any]],
  corpus: dict[str, Any],
) -> dict[str, Any]:
  """Return the record of a finished cell as plain JSON data.

  Args:
    cell: the cell.
    config: its run.
    metrics: the records of its run folder.
    corpus: as `make_text` returned it.
  """
  row = config.batch * config.data.length  # tokens of a step
  held_out = [x for x in metrics if x["kind"] == "eval"]
  train = [x for x in metrics if x["kind"] == "train"]
  pace = statistics.median(x["step_seconds"] for x in train)
  run = stored_config.to_dict(config)
  # Places on this machine are no part of a result.
  run["data"] |= {"path": [], "eval_path": [], "cache_dir": None}
  return {
    "kind": _KIND,
    "name": cell.name,
    "system": cell.system,
    "seed": cell.seed,
    "size": dataclasses.asdict(cell.size),
    "run": run,
    "corpus": corpus,
    "commit": commit_of_checkout(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "devices": jax.local_device_count(),
    "parameters": parameter_count(compiled_steps.abstract_model(config)),
    "tokens": config.steps * row,
    "tokens_per_second": round(row / pace),
    "seconds": round(config.steps * pace, 1),
    "train_loss": [[x["step"] * row, round(x["loss"], 4)] for x in train],
    "held_out": [
      {
        "tokens": x["step"] * row,
        **{name: round(x[name], 4) for name in ("loss", *METRICS)},
      }
      for x in held_out
    ],
  }


def read_cells(folder: Path, size: Size = FULL) -> dict[str, Any]:
  """Return the records of the finished cells, by name.

  Seeds beside those of `SEEDS` count too.

  Args:
    folder: holds `NAME.json` for each finished cell.
    size: of the cells.

  Raises:
    RecordError: a file cannot be read, or is of another cell or another text.
  """
  found = {}
  for system in SYSTEMS:
    start = f"text-{system}-seed"
    for path in sorted(folder.glob(f"{start}*.json")):
      seed = path.stem.removeprefix(start)
      if seed.isdecimal():
        found[path.stem] = read(path, TextCell(system, int(seed), size))
  texts = {x["corpus"]["sha256"]: name for name, x in found.items()}
  if len(texts) > 1:
    raise RecordError(
      f"{folder}: {' and '.join(texts.values())} are of different texts: "
      "expected one text for all; keep them in different folders"
    )
  return found


def read(path: Path, cell: TextCell) -> dict[str, Any]:
  """Return the record in a file, which must be of the given cell.

  Args:
    path: the file.
    cell: the cell.

  Raises:
    RecordError: the file holds no record, or that of another cell.
  """
  try:
    record = json.loads(path.read_text())
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise RecordError(f"{path}: no readable record ({error})") from error
  kind = record.get("kind") if isinstance(record, dict) else None
  if kind != _KIND:
    raise RecordError(f"{path}: kind={kind!r}: expected {_KIND!r}")
  found = TextCell(record["system"], record["seed"], Size(**record["size"]))
  if found != cell:
    raise RecordError(
      f"{path} is of another cell, {found}: use another folder, or delete it"
    )
  return record
