"""The handling of training steps that are not finite (NaN or infinity).

With `nan="abort"` the run keeps the state before the step and its batch, and
ends. With "skip" it keeps the batch, leaves the state as it was and continues,
unless too many steps in a row are not finite. The optimiser does not count
skipped steps, so its learning-rate schedule falls behind by their number.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rebased_jax.atomic import named_array_errors
from train import compiled_steps
from train.checkpoint.checkpoints import Checkpoints
from train.data.batches import Batches
from train.records.run_folder import RunFolder

IN_A_ROW = 20  # this many skipped steps in a row end the run
DUMPS = 10  # skipped batches that a run keeps


class TrainingFailed(RuntimeError):
  """The run cannot continue; the message says why and what was kept."""


class NonfiniteSteps:
  """Count the steps of a run that were not finite, and keep their batches.

  Args:
    skip: whether the run continues after one.
    folder: the run's folder.
    data: the training batches.
    meta: what the restored checkpoint says of skipped steps, as `state`
      returned it; {} for a new run.

  Attributes:
    skipped: steps that were skipped so far.
  """

  def __init__(
    self,
    *,
    skip: bool,
    folder: RunFolder,
    data: Batches,
    meta: Mapping[str, Any],
  ):
    self.skipped: int = meta.get("skipped", 0)
    self._last: int = meta.get("skipped_last", -1)
    self._in_a_row: int = meta.get("skipped_in_a_row", 0)
    self._skip, self._folder, self._data = skip, folder, data

  def state(self) -> dict[str, int]:
    """Return the counts of skipped steps, for a checkpoint."""
    return dict(
      skipped=self.skipped,
      skipped_last=self._last,
      skipped_in_a_row=self._in_a_row,
    )

  def handle(
    self, step: int, values: dict[str, float], state: Any, meta: dict[str, Any]
  ) -> str:
    """Keep what a step that is not finite leaves, and skip it or fail.

    Args:
      step: the step.
      values: its metrics.
      state: the state before it.
      meta: what a checkpoint of that state says of itself.

    Returns:
      A warning for the user, if the run continues.

    Raises:
      TrainingFailed: it does not.
    """
    shown = ", ".join(
      f"{name}={value:.4g}" for name, value in values.items() if "/" not in name
    )
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

  def _abort(
    self, step: int, message: str, state: Any, meta: dict[str, Any]
  ) -> str:
    """Keep the batch and the state before the step; return the message."""
    kept = RunFolder(self._folder.path / f"failed-step-{step}")
    self._dump(kept, step, message)
    run_id = self._folder.run_id()
    with Checkpoints(kept.checkpoints, run=run_id) as checkpoints:
      # There is one already if a resumed run failed at the same step again.
      if checkpoints.latest() is None:
        checkpoints.save(step, compiled_steps.to_dicts(state), meta)
    return f"{message}; the state before it and its batch are in {kept.path}"

  def _dump(self, kept: RunFolder, step: int, message: str) -> None:
    if jax.process_index() != 0:
      return
    kept.path.mkdir(parents=True, exist_ok=True)
    batch: dict[str, Any] = dict(self._data.read(step))
    path = kept.path / "batch.npz"
    with named_array_errors(path), path.open("wb") as file:
      np.savez(file, **batch)
    kept.write("reason.txt", message + "\n")
