"""The record of a cell: what was run, where, and what came out.

Tables and figures are drawn from these files alone.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import numpy as np

from rebased_jax import atomic
from train import compiled_steps, stored_config
from train.experiments import attention_iou
from train.experiments.sweep import (
  ATTENTION_SHOWN,
  Cell,
  Epoch,
  affine_moments,
  attention_columns,
)

VERSION = 2  # 1 listed a run's epochs after its stop too


class RecordError(ValueError):
  """A record cannot be read, or is of another cell."""


@dataclasses.dataclass
class History:
  """Results of the epochs of a cell; NaN where a run was not trained."""

  accuracy_ER: np.ndarray  # held-out; all are float32
  loss_ER: np.ndarray  # held-out
  train_loss_ER: np.ndarray  # mean over the epoch's steps
  finite_ER: np.ndarray  # 1: no step so far had an Inf or NaN; else 0
  seconds_ER: np.ndarray  # of the whole epoch, in each run's entry
  runs_ER: np.ndarray  # how many runs the epoch's program had
  affine_ER2: dict[str, np.ndarray]  # mean and deviation, by `affine_moments`
  iou_ER: dict[str, np.ndarray]  # of attention, if the cell wants it
  # (R, X, N, 2 N): `Epoch.attention_R` at each run's best epoch so far. Empty
  # if the cell does not want it.
  attention_R: np.ndarray

  @classmethod
  def empty(cls, cell: Cell) -> "History":
    """Return the history before the first epoch."""
    shape = cell.epochs, len(cell.runs)
    *fields, _, _, _ = dataclasses.fields(cls)
    params = nnx.state(compiled_steps.abstract_lm(cell.run.model))
    names = jax.eval_shape(affine_moments, params)
    ious = attention_iou.NAMES if cell.attention_examples else ()
    weights = np.zeros(0, np.float32)
    if cell.attention_examples:
      pairs = cell.batches.config.pairs
      size = len(cell.runs), ATTENTION_SHOWN, pairs, 2 * pairs
      weights = np.full(size, np.nan, np.float32)
    return cls(
      *(np.full(shape, np.nan, np.float32) for _ in fields),
      {name: np.full((*shape, 2), np.nan, np.float32) for name in names},
      {name: np.full(shape, np.nan, np.float32) for name in ious},
      weights,
    )

  def add(self, epoch: Epoch) -> None:
    """Enter an epoch."""
    on_R = epoch.active_R
    runs = np.asarray(epoch.runs)[on_R]
    if epoch.attention_R is not None:
      best_R = np.nan_to_num(self.accuracy_ER[: epoch.number, runs], nan=-1.0)
      better_R = epoch.accuracy_R[on_R] > best_R.max(axis=0, initial=-1.0)
      weights_R = epoch.attention_R[on_R]
      self.attention_R[runs[better_R]] = weights_R[better_R]
    self.accuracy_ER[epoch.number, runs] = epoch.accuracy_R[on_R]
    self.loss_ER[epoch.number, runs] = epoch.loss_R[on_R]
    self.train_loss_ER[epoch.number, runs] = epoch.train_loss_R[on_R]
    self.finite_ER[epoch.number, runs] = epoch.finite_R[on_R]
    self.seconds_ER[epoch.number, runs] = epoch.seconds
    self.runs_ER[epoch.number, runs] = len(epoch.runs)
    for name, moments_R2 in epoch.affine_R2.items():
      self.affine_ER2[name][epoch.number, runs] = moments_R2[on_R]
    for name, iou_R in epoch.iou_R.items():
      self.iou_ER[name][epoch.number, runs] = iou_R[on_R]

  def arrays(self) -> dict[str, Any]:
    """Return the arrays by name, without groups that are empty."""
    return {name: x for name, x in vars(self).items() if len(x)}

  @classmethod
  def from_arrays(cls, arrays: dict[str, Any]) -> "History":
    """Return the history that has these `arrays`, which it may change.

    Args:
      arrays: as `arrays` returns them, with array-likes.
    """
    groups: dict[str, Any] = {
      "affine_ER2": {},
      "iou_ER": {},
      "attention_R": np.zeros(0, np.float32),
    }
    return cls(**(groups | jax.tree.map(np.array, arrays)))


def key(cell: Cell) -> str:
  """Return a hash of all that decides a cell's results, but the code."""
  return _key(stored_config.to_dict(cell.run), cell)


def make(
  cell: Cell,
  history: History,
  *,
  name: str,
  commit: str | None,
  seconds: float,
) -> dict[str, Any]:
  """Return the record of a cell as plain JSON data.

  Args:
    cell: the runs.
    history: the history of every epoch that was trained.
    name: the name of the cell.
    commit: the commit of the code. None: unknown.
    seconds: the time of training, evaluation, compilation and saving together.
  """
  trained_ER = np.isfinite(history.runs_ER)
  # Time of a step of one run, in each epoch.
  step_ER = history.seconds_ER / history.runs_ER / cell.epoch_steps
  record = {
    "version": VERSION,
    "name": name,
    "key": key(cell),
    "run": stored_config.to_dict(cell.run),
    "data": dict(cell.batches.fingerprint),
    "precision": cell.precision,
    "attention_examples": cell.attention_examples,
    "commit": commit,
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "devices": jax.local_device_count(),
    "epochs_planned": cell.epochs,
    "epochs_done": int(trained_ER.any(axis=1).sum()),
    "steps_per_epoch": cell.epoch_steps,
    "seconds": round(seconds, 1),
    "ms_per_run_step": round(1e3 * float(np.nanmedian(step_ER)), 4),
    "runs": [
      _run_record(history, index, rate, seed)
      for index, (rate, seed) in enumerate(cell.runs)
    ],
  }
  if cell.attention_examples:
    record["attention"] = _attention_record(record, cell, history)
  return record


def write(path: Path, record: dict[str, Any]) -> None:
  """Write a record whole, or not at all.

  Args:
    path: the file.
    record: as `make` returns it.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_json(path, record)


def read(path: Path) -> dict[str, Any]:
  """Return the record in a file.

  Args:
    path: the file.

  Raises:
    RecordError: the file holds no record of this version.
  """
  try:
    record = json.loads(path.read_text())
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise RecordError(f"{path}: no readable record ({error})") from error
  if isinstance(record, dict) and "kind" in record:
    raise RecordError(
      f"{path} is of a language model of Table 2: expected the record of an "
      "MQAR cell"
    )
  version = record.get("version") if isinstance(record, dict) else None
  if version != VERSION:
    raise RecordError(f"{path}: version={version!r}: expected {VERSION}")
  return record


def read_of(path: Path, cell: Cell) -> dict[str, Any]:
  """Return the record in a file, which must be of the given architecture.

  Its learning rates and seeds may differ from the cell's.

  Args:
    path: the file.
    cell: the cell.

  Raises:
    RecordError: the file holds no record, or that of another cell.
  """
  record = read(path)
  found = cell_of(record)
  grid = {"rates": cell.rates, "seeds": cell.seeds}
  if dataclasses.replace(found, **grid) != cell:
    raise RecordError(
      f"{path} is of another cell (its config differs): use another folder, or "
      "delete the file"
    )
  return record


def cell_of(record: dict[str, Any]) -> Cell:
  """Return the cell that a record is of.

  Args:
    record: as `read` returns it.

  Raises:
    ConfigError: the record's config cannot be read.
    RecordError: the record was made from another cell than it says.
  """
  runs = record["runs"]
  cell = Cell(
    stored_config.from_dict(record["run"], "run"),
    rates=tuple(dict.fromkeys(run["learning_rate"] for run in runs)),
    seeds=tuple(dict.fromkeys(run["seed"] for run in runs)),
    precision=record["precision"],
    # Earlier records do not have it.
    attention_examples=record.get("attention_examples", 0),
  )
  # The stored text counts. A field that the config has since got would change
  # the key of the same cell.
  expected = _key(record["run"], cell)
  if record["key"] != expected:
    raise RecordError(
      f"{record['name']}: key={record['key']!r}: expected {expected!r} for the "
      "config of the record"
    )
  return cell


def is_cut(record: dict[str, Any], run: dict[str, Any]) -> bool:
  """Whether a run ended before its last epoch, and not by itself.

  A run ends early above the stop accuracy, or where a number is not finite.
  Otherwise somebody ended its cell.

  Args:
    record: the record of the cell.
    run: one of its runs.
  """
  limit = record["run"]["stop_accuracy"]
  stopped = limit is not None and run["best_accuracy"] > limit
  whole = run["epochs"] == record["epochs_planned"]
  return run["finite"] and not stopped and not whole


def best_rate(record: dict[str, Any]) -> dict[str, float]:
  """Return the result that the paper's Figure 1 shows of a cell.

  The rate is the one with the highest mean over seeds of the best accuracy.

  Args:
    record: the record of the cell.

  Returns:
    learning_rate, mean, std (over seeds, n − 1; 0 of a single seed) and seeds.
  """
  rates = accuracy_by_rate(record)
  rate, found = max(rates.items(), key=lambda item: np.mean(item[1]))
  std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
  return {
    "learning_rate": rate,
    "mean": float(np.mean(found)),
    "std": std,
    "seeds": len(found),
  }


def shown_run(record: dict[str, Any]) -> dict[str, Any]:
  """Return the run of the best learning rate and the first seed.

  Args:
    record: the record of the cell.
  """
  rate = best_rate(record)["learning_rate"]
  return next(run for run in record["runs"] if run["learning_rate"] == rate)


def accuracy_by_rate(record: dict[str, Any]) -> dict[float, list[float]]:
  """Return the best epoch's accuracy of each seed, by learning rate.

  Args:
    record: the record of the cell.
  """
  rates: dict[float, list[float]] = {}
  for run in record["runs"]:
    rates.setdefault(run["learning_rate"], []).append(run["best_accuracy"])
  return rates


def _key(run: dict[str, Any], cell: Cell) -> str:
  """Return the key of a cell from its config as JSON data."""
  parts = {
    "run": run,
    "rates": cell.rates,
    "seeds": cell.seeds,
    "precision": cell.precision,
  }
  if cell.attention_examples:
    parts["attention_examples"] = cell.attention_examples
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run_record(
  history: History, index: int, rate: float, seed: int
) -> dict[str, Any]:
  trained_E = np.isfinite(history.runs_ER[:, index])
  # A run that left the finite has no accuracy; argmax takes the first NaN.
  accuracy_E = np.nan_to_num(history.accuracy_ER[trained_E, index], nan=0.0)
  affine = {
    name: {
      "mean": _numbers(moments_ER2[trained_E, index, 0]),
      "std": _numbers(moments_ER2[trained_E, index, 1]),
    }
    for name, moments_ER2 in history.affine_ER2.items()
  }
  iou = {
    name: _numbers(values_ER[trained_E, index])
    for name, values_ER in history.iou_ER.items()
  }
  return {
    "learning_rate": rate,
    "seed": seed,
    "best_accuracy": round(float(accuracy_E.max()), 6),
    "best_epoch": int(accuracy_E.argmax()),
    "epochs": int(trained_E.sum()),
    "finite": bool(history.finite_ER[trained_E, index].all()),
    "accuracy": _numbers(accuracy_E),
    "loss": _numbers(history.loss_ER[trained_E, index]),
    "train_loss": _numbers(history.train_loss_ER[trained_E, index]),
    # Records of models without γ and β have no such entry.
    **({"affine": affine} if affine else {}),
    **({"iou": iou} if iou else {}),
  }


def _attention_record(
  record: dict[str, Any], cell: Cell, history: History
) -> dict[str, Any]:
  """Return the attention weights of the run that figures show."""
  run = shown_run(record)
  index = cell.runs.index((run["learning_rate"], run["seed"]))
  return {
    "learning_rate": run["learning_rate"],
    "seed": run["seed"],
    "right_columns": attention_columns(cell).tolist(),
    "weights": [
      [_numbers(weights_S, 4) for weights_S in weights_NS]
      for weights_NS in history.attention_R[index]
    ],
  }


def _numbers(values: np.ndarray, digits: int = 6) -> list[float | None]:
  """Return numbers that JSON can hold; None where one is not finite."""
  return [
    round(float(value), digits) if np.isfinite(value) else None
    for value in values
  ]
