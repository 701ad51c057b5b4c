"""The record of a cell: what was run, where, and what came out.

Tables and figures are drawn from these files alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import atomic, stored_config
from train.experiments.sweep import Cell, Epoch

VERSION = 1


def make(
  cell: Cell, epochs: list[Epoch], *, name: str, commit: str | None
) -> dict[str, Any]:
  """Return the record of a cell as plain JSON data.

  Args:
    cell: the runs.
    epochs: every epoch that was trained.
    name: the preset or system that the cell is of.
    commit: of the code. None: unknown.
  """
  run = stored_config.to_dict(cell.run)
  text = json.dumps(run, sort_keys=True)
  accuracy_ER = np.stack([epoch.accuracy_R for epoch in epochs])
  active_ER = np.stack([epoch.active_R for epoch in epochs])
  counted_ER = np.where(active_ER, accuracy_ER, -1)
  steps = cell.epoch_steps
  # The first epoch compiles; without a second one there is no time of a step.
  later = [epoch.seconds for epoch in epochs[1:]]
  return {
    "version": VERSION,
    "name": name,
    "run": run,
    "run_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
    "data": dict(cell.batches.fingerprint),
    "precision": cell.precision,
    "commit": commit,
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "epochs_planned": cell.epochs,
    "epochs_done": len(epochs),
    "steps_per_epoch": steps,
    "seconds": sum(epoch.seconds for epoch in epochs),
    "ms_per_run_step": (
      1e3 * float(np.median(later)) / steps / len(cell.runs) if later else None
    ),
    "runs": [
      {
        "learning_rate": rate,
        "seed": seed,
        "best_accuracy": float(counted_ER[:, index].max()),
        "best_epoch": int(counted_ER[:, index].argmax()),
        "epochs": int(active_ER[:, index].sum()),
        "accuracy": _numbers(accuracy_ER[:, index]),
        "loss": _numbers([epoch.loss_R[index] for epoch in epochs]),
        "train_loss": _numbers([epoch.train_loss_R[index] for epoch in epochs]),
      }
      for index, (rate, seed) in enumerate(cell.runs)
    ],
  }


def write(path: Path, record: dict[str, Any]) -> None:
  """Write a record whole, or not at all.

  Args:
    path: the file.
    record: as `make` returns it.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_json(path, record)


def best_rate(record: dict[str, Any]) -> dict[str, float]:
  """Return the result that the paper's Figure 1 shows of a cell.

  The rate is the one with the highest mean over seeds of the best accuracy.

  Args:
    record: of the cell.

  Returns:
    learning_rate, mean, std (over seeds, n − 1; 0 of a single seed) and seeds.
  """
  rates: dict[float, list[float]] = {}
  for run in record["runs"]:
    rates.setdefault(run["learning_rate"], []).append(run["best_accuracy"])
  rate, found = max(rates.items(), key=lambda item: np.mean(item[1]))
  std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
  return {
    "learning_rate": rate,
    "mean": float(np.mean(found)),
    "std": std,
    "seeds": len(found),
  }


def _numbers(values: Any) -> list[float]:
  return [round(float(value), 6) for value in values]
