"""Run a cell to its end, in pieces: it is saved, stopped and resumed.

    FOLDER/NAME.json       the record of a finished cell
    FOLDER/NAME.partial/   checkpoints of an unfinished one, removed at the end

A cell that has its record is not run again. An unfinished one continues at the
epoch after its newest checkpoint, and ends in the same record as one that was
never stopped, except for the times.
"""

from collections.abc import Callable, Iterator
import dataclasses
from pathlib import Path
import shutil
import subprocess
import time
from typing import Any

import jax
import numpy as np

from train.checkpoint.checkpoints import (
  Checkpoints,
  NoCheckpointError,
  read_meta,
)
from train.experiments import record as records
from train.experiments.record import History, RecordError
from train.experiments.sweep import Cell, Epoch, Sweep

_SAVE_SECONDS = 60.0  # between checkpoints


@dataclasses.dataclass(frozen=True)
class Progress:
  """The progress of a cell after an epoch."""

  epoch: Epoch
  #: Runs that are finished: stopped, or trained for all epochs.
  finished: int
  #: Runs of the cell.
  total: int


def run_cell(
  name: str,
  cell: Cell,
  folder: Path,
  *,
  stop: Callable[[], bool] = lambda: False,
  report: Callable[[Progress], None] | None = None,
  devices: list[jax.Device] | None = None,
) -> dict[str, Any] | None:
  """Train a cell, or what is left of it, and write its record.

  Where memory does not hold all runs in one program, halves follow each other.

  Args:
    name: of the cell, and of its files.
    cell: the runs.
    folder: where the record and the checkpoints are.
    stop: asked after every epoch; when it returns True the cell is saved and
      left unfinished.
    report: called after every epoch. None: nothing is called.
    devices: the devices to share the runs. None: all of this process.

  Returns:
    The record; None if `stop` ended the cell before its end.

  Raises:
    RecordError: the folder has files of this name from another cell.
    CheckpointError: the checkpoints cannot be read or written.
    MemoryError: not even one run fits on a device.
  """
  path = folder / f"{name}.json"
  if path.exists():
    record = records.read(path)
    if records.cell_of(record) != cell:
      raise RecordError(
        f"{path} is of another cell (its config, rates or seeds differ): use "
        "another folder, or delete the file"
      )
    return record
  partial = folder / f"{name}.partial"
  work = _Work(cell, partial, devices)
  for group in work.groups():
    for epoch in group.epochs():
      work.add(epoch)
      if report is not None:
        report(work.progress(epoch))
      stopped = stop()
      work.save(group, always=stopped)
      if stopped:
        return None
    work.finish()
  result = records.make(
    cell,
    work.history,
    name=name,
    commit=commit_of_checkout(),
    seconds=work.seconds(),
  )
  records.write(path, result)
  shutil.rmtree(partial, ignore_errors=True)
  return result


class _Work:
  """The unfinished part of a cell, in memory and in its checkpoints."""

  def __init__(
    self, cell: Cell, partial: Path, devices: list[jax.Device] | None
  ):
    self.cell = cell
    self.history = History.empty(cell)
    self._partial = partial
    self._devices = devices
    self._begin = time.perf_counter()
    self._before = 0.0  # seconds of earlier calls
    self._saved_at = self._begin
    self._count = 0  # epochs so far, over all groups: the checkpoint's step
    self._done: list[int] = []  # runs of groups that are finished
    self._meta = self._read_meta()

  def groups(self) -> Iterator[Sweep]:
    """Yield one sweep after the other, until each run is finished."""
    if self._meta is not None:
      yield self._restore(self._meta)
    while True:
      left = [
        run for run in range(len(self.cell.runs)) if run not in self._done
      ]
      if not left:
        return
      yield self._largest(left)

  def add(self, epoch: Epoch) -> None:
    self.history.add(epoch)
    self._count += 1

  def finish(self) -> None:
    """Note that all runs of the sweep that was yielded last are finished."""
    self._done = self._started()

  def progress(self, epoch: Epoch) -> Progress:
    running = int(epoch.active_R.sum())
    finished = len(self._started()) - running
    return Progress(epoch, finished, len(self.cell.runs))

  def seconds(self) -> float:
    return self._before + time.perf_counter() - self._begin

  def save(self, group: Sweep, *, always: bool) -> None:
    """Save the state, if enough time has passed since the last save."""
    now = time.perf_counter()
    if not always and now - self._saved_at < _SAVE_SECONDS:
      return
    self._saved_at = now
    meta = {
      "key": records.key(self.cell),
      "epoch": group.epoch,
      "runs": list(group.runs),
      "done": self._done,
      "seconds": self.seconds(),
    }
    state = {"sweep": group.arrays(), "history": self.history.arrays()}
    with Checkpoints(self._partial, keep=1) as checkpoints:
      checkpoints.save(self._count, state, meta)

  def _started(self) -> list[int]:
    """Return the runs that have had an epoch."""
    started_R = np.isfinite(self.history.runs_ER).any(axis=0)
    return [int(run) for run in np.flatnonzero(started_R)]

  def _read_meta(self) -> dict[str, Any] | None:
    if not self._partial.exists():
      return None
    try:
      _, meta = read_meta(self._partial)
    except NoCheckpointError:
      return None
    if meta["key"] != records.key(self.cell):
      raise RecordError(
        f"{self._partial} is of another cell (its config, rates or seeds "
        "differ): use another folder, or delete it"
      )
    return meta

  def _restore(self, meta: dict[str, Any]) -> Sweep:
    group = Sweep(self.cell, meta["runs"], self._devices)
    state = {"sweep": group.arrays(), "history": self.history.arrays()}
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=getattr(x, "sharding", None)
      ),
      state,
    )
    with Checkpoints(self._partial, keep=1) as checkpoints:
      found = checkpoints.restore(target)
    group.load(found.state["sweep"], meta["epoch"])
    self.history = History.from_arrays(found.state["history"])
    self._done = list(meta["done"])
    self._before, self._count = meta["seconds"], found.step
    return group

  def _largest(self, runs: list[int]) -> Sweep:
    """Return a sweep of as many of the runs as memory holds."""
    group = Sweep(self.cell, runs, self._devices)
    while True:
      try:
        group.compile()
        return group
      except MemoryError:
        count = len(group.runs)
        if count == 1:
          raise
        group.keep(group.runs[: (count + 1) // 2])


def commit_of_checkout() -> str | None:
  """Return the commit of this checkout; None if there is none."""
  try:
    found = subprocess.run(
      ["git", "rev-parse", "--short", "HEAD"],
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()
