"""Checkpoints of a run: asynchronous saves and verified restores.

A step is saved as one directory, `DIRECTORY/STEP`. It holds the arrays and a
sealed record: the format version, the step, the id of the run, the caller's
`meta`, and for every array its shape, dtype and checksum. The directory gets
its name when it is complete.

A restore checks the record, compares it with the target, reads the arrays and
checks them too. Damage therefore ends in an older step or an error, never in
wrong values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
import os
from types import TracebackType
from typing import Any, Self

from etils import epath

from train.checkpoint import orbax_storage as storage, verify
from train.checkpoint.verify import FORMAT_VERSION, CheckpointError
from train.devices.processes import all_processes

__all__ = [
  "FORMAT_VERSION",
  "Broken",
  "CheckpointError",
  "Checkpoints",
  "NoCheckpointError",
  "Restored",
  "read_meta",
  "restore_params",
]

_log = logging.getLogger(__name__)


class NoCheckpointError(CheckpointError):
  """The directory does not hold a checkpoint yet."""


class MissingStepError(CheckpointError, ValueError):
  """The directory does not hold a checkpoint of the requested step."""


@dataclasses.dataclass(frozen=True)
class Broken:
  """A step that could not be read."""

  step: int
  #: Why it could not be read.
  reason: str
  #: The name that its directory has now.
  kept_as: str

  def __str__(self) -> str:
    return (
      f"checkpoint step {self.step} is unreadable ({self.reason}); "
      f"kept as {self.kept_as}"
    )


@dataclasses.dataclass(frozen=True)
class Restored:
  """A step that was read."""

  step: int
  #: Nested dicts of arrays.
  state: dict[str, Any]
  #: What was saved with the arrays.
  meta: dict[str, Any]
  #: Newer steps, which could not be read.
  broken: tuple[Broken, ...] = ()


class Checkpoints:
  """The checkpoints of one run; at most one process group may write them.

  Opening removes the temporary directory of a save that was killed. Leaving
  the context waits for the last save.

  Args:
    directory: where the steps are; made if it is missing.
    keep: how many of the newest steps stay. With 1 there is no older step to
      use when that one is damaged.
    keep_every: multiples of this stay, too. None: no others.
    score: returns the score of a checkpoint from its step and its `meta`, or
      None if it has none. The step of the lowest score stays, too. None: it
      does not.
    run: the id of the run, which saved steps are marked with. A restore
      refuses steps of other runs. None: steps have no mark, and those of any
      run are read.
    on_saved: is called with a step when that is on the disk, by another
      thread. None: nothing is.

  Raises:
    CheckpointError: the directory cannot be made or listed.
    ValueError: `keep` is below 1.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep: int = 3,
    keep_every: int | None = None,
    score: Callable[[int, Mapping[str, Any]], float | None] | None = None,
    run: str | None = None,
    on_saved: Callable[[int], None] | None = None,
  ) -> None:
    if keep < 1:
      raise ValueError(f"keep={keep}: expected at least 1")
    self._directory = _absolute(directory)
    self._run = run
    self._current: int | None = None
    self._score = score
    self._scores: dict[int, float | None] | None = None  # not read yet
    best = None if score is None else self._best
    kept = storage.Kept(keep, keep_every, best)
    self._writer = storage.Writer(self._directory, kept, on_saved)

  def save(
    self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]
  ) -> None:
    """Start to save, and return when the arrays may be donated or changed.

    Waits for the save before, if that is still running. Does nothing if this
    object has just saved or restored `step`.

    Args:
      step: a number above every saved step.
      state: nested dicts of arrays, with PRNG keys as their uint32 data.
      meta: JSON data, kept in the same checkpoint.

    Raises:
      CheckpointError: this save or the one before failed, or there is a newer
        or equal step that this object neither saved nor restored.
      TypeError: a leaf of `state` or `meta` cannot be saved.
      ValueError: a name in `state` cannot be saved.
    """
    self.wait()
    if step == self._current:
      return
    newest = self.latest()
    if newest is not None and step <= newest:
      raise CheckpointError(
        f"{self._directory}: cannot save step {step} over step {newest}"
      )
    self._current = None
    self._note_score(step, meta)
    record = verify.make_record(state, meta, step=step, run=self._run)
    self._writer.start(step, state, record)
    self._current = step

  def _note_score(self, step: int, meta: Mapping[str, Any]) -> None:
    """Remember the score of a step, and at the first save those of all."""
    if self._score is None:
      return
    if self._scores is None:
      self._scores = {}
      for saved in storage.steps(self._directory):
        try:
          found = _read(self._directory, saved, None, self._run, False)
        except (CheckpointError, verify.DamagedError):
          continue  # a damaged step is never the best
        self._scores[saved] = self._score(saved, found.meta)
    self._scores[step] = self._score(step, meta)

  def _best(self, steps: Sequence[int]) -> int | None:
    """Return the step with the lowest score; None if no step has one."""
    scores = self._scores or {}
    return best_of({step: scores.get(step) for step in steps})

  def wait(self) -> None:
    """Wait for the running save.

    Raises:
      CheckpointError: it failed; the message has the reason.
    """
    try:
      self._writer.wait()
    except CheckpointError:
      self._current = None
      raise

  def steps(self) -> list[int]:
    """Return the saved steps, ascending; waits for the running save.

    Raises:
      CheckpointError: the running save failed, the directory cannot be
        listed, or only damaged steps are left in it.
    """
    self.wait()
    return storage.steps(self._directory)

  def latest(self) -> int | None:
    """Return the newest saved step, or None if there is none yet.

    Raises:
      CheckpointError: as `steps` does.
    """
    return next(reversed(self.steps()), None)

  def restore(self, abstract_state: Mapping[str, Any]) -> Restored:
    """Read the newest readable step onto the shardings of the target.

    A damaged step is skipped with a warning. Once an older step has been read,
    the damaged one is renamed `STEP.corrupt`; it is never deleted. If no step
    is readable, nothing is renamed.

    Args:
      abstract_state: nested dicts of `jax.ShapeDtypeStruct` with shardings,
        for any mesh. An array without a sharding goes to one local device.

    Raises:
      NoCheckpointError: nothing has been saved yet.
      CheckpointError: no step is readable. Or the newest readable record has
        other arrays than the target, or is of another step or run: the message
        names them.
    """
    self.wait()
    found, passed = _read_newest(self._directory, abstract_state, run=self._run)
    broken = tuple(self._set_aside(step, why) for step, why in passed)
    self._current = found.step
    return dataclasses.replace(found, broken=broken)

  def _set_aside(self, step: int, reason: str) -> Broken:
    name, count = f"{step}.corrupt", 1
    while (self._directory / name).exists():
      count += 1
      name = f"{step}.corrupt.{count}"
    storage.rename(self._directory / str(step), self._directory / name)
    self._writer.reload()
    return Broken(step, reason, name)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      self.wait()
    except CheckpointError as failure:
      if error is None:
        raise
      _log.error("%s", failure)
    finally:
      self._writer.close()


def best_of(scores: Mapping[int, float | None]) -> int | None:
  """Return the step with the lowest score, the newest of equal ones.

  Args:
    scores: by step; None where a step has none.

  Returns:
    None if no step has a score.
  """
  known = {step: x for step, x in scores.items() if x is not None}
  return min(known, key=lambda step: (known[step], -step), default=None)


def saved_steps(directory: epath.PathLike) -> list[int]:
  """Return the steps that are saved in a directory, ascending.

  Args:
    directory: where the steps are; nothing in it is changed.

  Raises:
    CheckpointError: the directory cannot be listed, or only damaged steps are
      left in it.
  """
  return storage.steps(_absolute(directory))


def delete(directory: epath.PathLike, step: int) -> None:
  """Delete the checkpoint of a step; nobody may write in the directory.

  Raises:
    CheckpointError: it cannot be deleted.
  """
  storage.delete(_absolute(directory) / str(step))


def read_meta(
  directory: epath.PathLike, step: int | None = None, *, run: str | None = None
) -> tuple[int, dict[str, Any]]:
  """Return the step and `meta` of a checkpoint, without reading arrays.

  Args:
    directory: where the steps are; nothing in it is changed.
    step: the step. None takes the newest with a readable record.
    run: the id of the run. None reads the checkpoint of any run.

  Raises:
    NoCheckpointError: nothing has been saved yet.
    CheckpointError: the step is missing or unreadable, or of another run.
  """
  found, _ = _read_newest(_absolute(directory), None, step, run=run)
  return found.step, found.meta


def restore_params(
  directory: epath.PathLike,
  abstract_params: Mapping[str, Any],
  step: int | None = None,
  *,
  run: str | None = None,
  part: str = "params",
) -> tuple[int, dict[str, Any]]:
  """Read the parameters of a checkpoint, and nothing else of its state.

  Args:
    directory: where the steps are; nothing in it is changed.
    abstract_params: as `params` in the argument of `Checkpoints.restore`.
    step: the step. None takes the newest readable one.
    run: the id of the run. None reads the checkpoint of any run.
    part: which part of the state: "params", or "ema" for their average.

  Returns:
    (step, parameters).

  Raises:
    NoCheckpointError: nothing has been saved yet.
    CheckpointError: the step is missing or unreadable, has other arrays, or is
      of another run.
  """
  target = {part: abstract_params}
  found, _ = _read_newest(
    _absolute(directory), target, step, run=run, partial=True
  )
  return found.step, found.state[part]


def _absolute(directory: epath.PathLike) -> epath.Path:
  """Return an absolute path, as Orbax requires; a bucket's path is one."""
  path = epath.Path(directory)
  return path if "://" in str(path) else epath.Path(os.path.abspath(path))


def _read_newest(
  directory: epath.Path,
  target: Mapping[str, Any] | None,
  step: int | None = None,
  *,
  run: str | None,
  partial: bool = False,
) -> tuple[Restored, list[tuple[int, str]]]:
  """Return the newest readable step, and (step, reason) of damaged newer ones.

  Args:
    directory: where the steps are.
    target: what to read. None reads the record only.
    step: the only step to try. None tries all.
    run: the id of the run. None reads the checkpoint of any run.
    partial: whether the checkpoint may hold more than the target.
  """
  steps = storage.steps(directory)
  if not steps:
    raise NoCheckpointError(f"{directory}: no checkpoint yet")
  if step is not None and step not in steps:
    raise MissingStepError(f"{directory}: no step {step}, only {steps}")
  passed = []
  for candidate in reversed(steps if step is None else [step]):
    try:
      found = _read(directory, candidate, target, run, partial)
      reason = None
    except verify.DamagedError as error:
      reason = str(error)
    except CheckpointError as error:
      raise CheckpointError(f"{directory}/{candidate}: {error}") from error
    if all_processes(reason is None):
      return found, passed
    passed.append((candidate, reason or "unreadable in another process"))
    _log.warning("%s/%d is unreadable: %s", directory, *passed[-1])
  listed = "; ".join(f"step {step}: {reason}" for step, reason in passed)
  raise CheckpointError(f"{directory}: no readable checkpoint: {listed}")


def _read(
  directory: epath.Path,
  step: int,
  target: Mapping[str, Any] | None,
  run: str | None,
  partial: bool,
) -> Restored:
  path = directory / str(step)
  record = storage.load(path, "record", None)
  verify.check_record(record)
  verify.check_place(record, step, run)
  if target is None:
    return Restored(step, {}, record["meta"])
  stored = record["arrays"]
  if partial:
    stored = {p: x for p, x in stored.items() if p.split("/")[0] in target}
  verify.check_arrays(stored, verify.flatten(target))
  state = storage.load(path, "state", target, partial=partial)
  verify.check_checksums(stored, verify.flatten(state))
  return Restored(step, state, record["meta"])
