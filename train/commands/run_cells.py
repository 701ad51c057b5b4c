"""Run cells one after another and print their progress, for two verbs."""

from collections.abc import Mapping
from pathlib import Path
import time
from typing import Any

from rich.console import Console

from train import console as lines
from train.experiments import record as records
from train.experiments.run_cell import Progress, run_cell
from train.experiments.sweep import Cell
from train.stop_signals import StopSignals


def run_cells(
  cells: Mapping[str, Cell],
  recorded: Mapping[str, Any],
  folder: Path,
  minutes: float | None,
  console: Console,
) -> int:
  """Run cells that have no record yet; a cell that was stopped continues.

  Args:
    cells: the cells by name, in the order of running.
    recorded: the records that the folder has, by name.
    folder: the folder of the records.
    minutes: stop after this time, at the end of an epoch. None: no limit.
    console: where the progress is printed.

  Returns:
    The exit code: that of a stop signal, or 0.

  Raises:
    RecordError: the folder has files of other cells with these names.
    MemoryError: not even one run fits on a device.
  """
  end = None if minutes is None else time.monotonic() + 60 * minutes
  with StopSignals() as signals:

    def stop() -> bool:
      late = end is not None and time.monotonic() >= end
      return signals.requested or late

    for name, cell in cells.items():
      if stop():
        break
      if name in recorded and records.cell_of(recorded[name]) != cell:
        lines.say(
          console,
          f"{name}: left as it is: its record in {folder} has other learning "
          "rates or seeds",
        )
        continue
      found = run_cell(
        name,
        cell,
        folder,
        stop=stop,
        report=lambda progress, name=name: _report(console, name, progress),
      )
      if found is not None:
        lines.say(console, f"{name}: {_summary(found)}")
    return signals.exit_code


def _report(console: Console, name: str, progress: Progress) -> None:
  epoch = progress.epoch
  best, worst = epoch.accuracy_R.max(), epoch.accuracy_R.min()
  step_ms = 1e3 * epoch.seconds / epoch.metrics_SR["loss"].size
  lines.say(
    console,
    f"{name}: epoch {epoch.number + 1}, accuracy {worst:.3f} to {best:.3f}, "
    f"{progress.finished} of {progress.total} runs finished, "
    f"{epoch.seconds:.1f} s, {step_ms:.3g} ms a run-step",
  )


def _summary(record: dict[str, Any]) -> str:
  best = records.best_rate(record)
  return (
    f"{best['mean']:.4f} ± {best['std']:.4f} over {best['seeds']} seeds at "
    f"rate {best['learning_rate']:g}; {record['epochs_done']} of "
    f"{record['epochs_planned']} epochs, {record['seconds']:.0f} s, "
    f"{record['ms_per_run_step']:.3g} ms a run-step"
  )
