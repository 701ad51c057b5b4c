"""What becomes of a run when a step is not finite.

"abort" keeps the state before the step and its batch, and ends the run. "skip"
keeps the batch, leaves the state as it was and goes on, unless too many steps
come to that in a row. The optimiser counts no skipped step: its schedule is as
many steps behind.
"""

from typing import Any

import jax
import numpy as np

from train import build
from train.checkpoint.checkpoints import Checkpoints
from train.data.batches import Batches
from train.records.run_folder import RunFolder

IN_A_ROW = 20  # skipped steps that a run survives
DUMPS = 10  # skipped batches that a run keeps


class TrainingFailed(RuntimeError):
  """The run cannot go on; the message says why and what was kept."""


class Faults:
  """Counts the steps of a run that were not finite.

  Args:
    skip: whether it goes on.
    folder: of the run.
    data: the batches of training.
    skipped: steps that were skipped before this process.
  """

  def __init__(
    self, *, skip: bool, folder: RunFolder, data: Batches, skipped: int = 0
  ):
    self.skipped = skipped
    self._skip, self._folder, self._data = skip, folder, data
    self._last = -1
    self._in_a_row = 0

  def handle(
    self, step: int, values: dict[str, float], state: Any, meta: dict[str, Any]
  ) -> str:
    """Dumps a step that is not finite; a line that says so if the run goes on.

    Raises:
      TrainingFailed: it does not.
    """
    names = ("loss", "grad_norm", "update_norm", "param_norm")
    shown = ", ".join(f"{x}={values[x]:.4g}" for x in names if x in values)
    message = f"step {step} is not finite: {shown}"
    if not self._skip:
      raise TrainingFailed(self._abort(step, message, state, meta))
    self.skipped += 1
    self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
    self._last = step
    if self.skipped <= DUMPS:
      kept = RunFolder(self._folder.path / f"skipped-step-{step}")
      self._dump(kept, step, message)
      message += f"; its batch is in {kept.path}"
    if self._in_a_row >= IN_A_ROW:
      raise TrainingFailed(f"{message}; {IN_A_ROW} in a row were not finite")
    return f"warning: {message}; skipped, {self.skipped} so far"

  def _abort(self, step: int, message: str, state: Any, meta) -> str:
    """Keeps the state before the step too."""
    kept = RunFolder(self._folder.path / f"failed-step-{step}")
    self._dump(kept, step, message)
    with Checkpoints(kept.checkpoints) as checkpoints:
      # There is one where a resume has come to the same step.
      if checkpoints.latest() is None:
        checkpoints.save(step, build.to_dicts(state), meta)
    return f"{message}; the state before it and its batch are in {kept.path}"

  def _dump(self, kept: RunFolder, step: int, message: str) -> None:
    if jax.process_index() != 0:
      return
    kept.path.mkdir(parents=True, exist_ok=True)
    with (kept.path / "batch.npz").open("wb") as file:
      np.savez(file, **self._data.read(step))
    kept.write("reason.txt", message + "\n")
