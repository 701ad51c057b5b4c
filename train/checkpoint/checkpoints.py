"""Checkpoints of a run: asynchronous saves and verified restores.

One step is one directory, `DIRECTORY/STEP`, with the arrays and a sealed
record: format version, the caller's `meta`, and for every array its shape,
dtype and checksum. A step appears under its final name only when all of it is
written.

A restore checks the record, compares it with the target, reads the arrays and
checks them too, so that damage ends in an older step or an error, never in
wrong values.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import logging
import os
from types import TracebackType
from typing import Any, Self

from etils import epath

from train.checkpoint import record as records, storage
from train.checkpoint.record import FORMAT_VERSION, CheckpointError
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
  """The directory holds no checkpoint yet."""


class MissingStepError(CheckpointError, ValueError):
  """There is no checkpoint of the step that was asked for."""


@dataclasses.dataclass(frozen=True)
class Broken:
  """A step that could not be read, and the name it is kept under."""

  step: int
  reason: str
  kept_as: str

  def __str__(self) -> str:
    return (
      f"checkpoint step {self.step} is unreadable ({self.reason}); "
      f"kept as {self.kept_as}"
    )


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a restore gave: `broken` lists newer steps it had to pass over."""

  step: int
  state: dict[str, Any]
  meta: dict[str, Any]
  broken: tuple[Broken, ...] = ()


class Checkpoints:
  """The checkpoints of one run. One writer to a directory.

  Opening removes the temporary directory that a killed save left behind.
  Leaving the context waits for the last save.

  Args:
    directory: where the steps are; made if missing.
    keep: how many of the newest steps stay. With 1 there is nothing to fall
      back to when that one is damaged.

  Raises:
    CheckpointError: the directory cannot be made or listed.
    ValueError: `keep` is below 1.
  """

  def __init__(self, directory: epath.PathLike, *, keep: int = 3) -> None:
    if keep < 1:
      raise ValueError(f"keep must be at least 1, got {keep}")
    self._directory = _absolute(directory)
    self._current: int | None = None
    self._writer = storage.Writer(self._directory, keep)

  def save(
    self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]
  ) -> None:
    """Starts to save; returns when the arrays may be donated or changed.

    Waits for the save before, if that is still running. Does nothing if this
    object has just saved or restored `step`.

    Args:
      step: a number above every saved step.
      state: nested dicts of arrays, PRNG keys as their uint32 data.
      meta: what JSON can hold; kept in the same checkpoint.

    Raises:
      CheckpointError: this save or the one before failed, or there is a newer
        or equal step that this object neither saved nor restored.
      TypeError: a leaf of `state` or `meta` cannot be saved.
      ValueError: a name in `state` or a number in `meta` cannot be saved.
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
    self._writer.start(step, state, records.make(state, meta))
    self._current = step

  def wait(self) -> None:
    """Waits for the running save.

    Raises:
      CheckpointError: it failed; the message has the reason.
    """
    try:
      self._writer.wait()
    except CheckpointError:
      self._current = None
      raise

  def steps(self) -> list[int]:
    """The saved steps, ascending; waits for the running save.

    Raises:
      CheckpointError: the running save failed, the directory cannot be
        listed, or only damaged steps are left in it.
    """
    self.wait()
    return storage.steps(self._directory)

  def latest(self) -> int | None:
    """The newest saved step, None if there is none yet; raises like `steps`."""
    return next(reversed(self.steps()), None)

  def restore(self, abstract_state: Mapping[str, Any]) -> Restored:
    """Reads the newest readable step onto the shardings of the target.

    A damaged step is passed over with a warning and, once an older one has
    been read, renamed `STEP.corrupt`; it is never deleted. If no step is
    readable, nothing is renamed.

    Args:
      abstract_state: nested dicts of `jax.ShapeDtypeStruct` with shardings,
        for any mesh; without a sharding an array goes to one local device.

    Raises:
      NoCheckpointError: nothing has been saved yet.
      CheckpointError: no step is readable, or the newest readable record has
        other arrays than the target: the message names them.
    """
    self.wait()
    found, passed = _read_newest(self._directory, abstract_state)
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


def read_meta(
  directory: epath.PathLike, step: int | None = None
) -> tuple[int, dict[str, Any]]:
  """The step and `meta` of a checkpoint, without reading arrays.

  Args:
    directory: where the steps are; nothing in it is changed.
    step: which one; the newest with a readable record by default.

  Raises:
    NoCheckpointError: nothing has been saved yet.
    CheckpointError: the step is missing or unreadable.
  """
  found, _ = _read_newest(_absolute(directory), None, step)
  return found.step, found.meta


def restore_params(
  directory: epath.PathLike,
  abstract_params: Mapping[str, Any],
  step: int | None = None,
) -> tuple[int, dict[str, Any]]:
  """Reads `params` of a checkpoint and nothing else of its state.

  Args:
    directory: where the steps are; nothing in it is changed.
    abstract_params: like `params` of `Checkpoints.restore`.
    step: which one; the newest readable by default.

  Raises:
    NoCheckpointError: nothing has been saved yet.
    CheckpointError: the step is missing or unreadable, or has other arrays.
  """
  target = {"params": abstract_params}
  found, _ = _read_newest(_absolute(directory), target, step, partial=True)
  return found.step, found.state["params"]


def _absolute(directory: epath.PathLike) -> epath.Path:
  """Orbax takes nothing else; a path of a bucket is absolute as it is."""
  path = epath.Path(directory)
  return path if "://" in str(path) else epath.Path(os.path.abspath(path))


def _read_newest(
  directory: epath.Path,
  target: Mapping[str, Any] | None,
  step: int | None = None,
  *,
  partial: bool = False,
) -> tuple[Restored, list[tuple[int, str]]]:
  """The newest readable step, and the newer ones with what ails them."""
  steps = storage.steps(directory)
  if not steps:
    raise NoCheckpointError(f"{directory}: no checkpoint yet")
  if step is not None and step not in steps:
    raise MissingStepError(f"{directory}: no step {step}, only {steps}")
  passed = []
  for candidate in reversed(steps if step is None else [step]):
    try:
      found = _read(directory, candidate, target, partial)
      reason = None
    except records.DamagedError as error:
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
  partial: bool,
) -> Restored:
  path = directory / str(step)
  record = storage.load(path, "record", None)
  records.check(record)
  if target is None:
    return Restored(step, {}, record["meta"])
  stored = record["arrays"]
  if partial:
    stored = {p: x for p, x in stored.items() if p.split("/")[0] in target}
  records.compare(stored, records.flatten(target))
  state = storage.load(path, "state", target, partial=partial)
  records.verify(stored, records.flatten(state))
  return Restored(step, state, record["meta"])
