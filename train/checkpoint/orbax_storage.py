"""Store checkpoints with Orbax; no other module knows Orbax.

Orbax reports the same failure in several ways. Here every read returns a value
or raises one of two errors: `DamagedError` if the files are at fault, and
`CheckpointError` if the machine is. Nothing is printed.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import gc
import logging
import os
import re
import sys
import threading
from typing import Any
import warnings

from etils import epath
import jax
from orbax.checkpoint import v1

from train.checkpoint.verify import CheckpointError, DamagedError
from train.devices.processes import all_processes

# A read that fails with one of these says nothing about the files.
_NOT_DAMAGE = (
  "RESOURCE_EXHAUSTED",
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
)

# Devices that hold copies of an array share the work of saving it: each cuts
# out and writes a slice. Slices under so many bytes cost more than they save.
_SLICE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Kept:
  """The steps that are not deleted after a save.

  Attributes:
    newest: how many of the newest.
    every: all multiples of this. None: none.
    best: returns one more of the steps that it is given, or None. None: no
      other.
  """

  newest: int
  every: int | None = None
  best: Callable[[Sequence[int]], int | None] | None = None

  def policy(self) -> v1.training.preservation_policies.PreservationPolicy:
    """Return Orbax's policy that keeps these steps."""
    policies = v1.training.preservation_policies
    kept: list[Any] = [policies.LatestN(self.newest)]
    if self.every is not None:
      kept.append(policies.EveryNSteps(self.every))
    if self.best is not None:
      kept.append(_Best(self.best))
    return policies.AnyPreservationPolicy(kept)


class _Best:
  """A policy that keeps one step by what our own sealed records say.

  Orbax's `BestN` ranks by metrics in a file beside them. It would not know
  those of steps from before, and nothing would notice damage to the file.
  """

  def __init__(self, best: Callable[[Sequence[int]], int | None]) -> None:
    self._best = best

  def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
    """Return whether each of the checkpoints is the best."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    best = self._best(steps)
    return [step == best for step in steps]


class Writer:
  """Save steps into one directory, one at a time, in the background.

  Makes the directory, and removes what killed saves left in it.

  Args:
    directory: where the steps are.
    kept: the steps that stay.
    on_saved: is called with a step when that is on the disk, by another thread.
      None: nothing is.

  Raises:
    CheckpointError: the directory cannot be made or listed.
  """

  def __init__(
    self,
    directory: epath.Path,
    kept: Kept,
    on_saved: Callable[[int], None] | None = None,
  ) -> None:
    self._directory = directory
    self._kept, self._on_saved = kept, on_saved
    self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
    self._names = contextlib.ExitStack()
    self._checkpointer: v1.training.Checkpointer | None = self._open()

  def start(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Start a save, and return when the arrays are copied.

    Args:
      step: the step.
      state: nested dicts of arrays.
      record: JSON data.

    Raises:
      CheckpointError: the save failed already.
    """
    items = {"state": state, "record": record}
    if self._checkpointer is None:
      self._checkpointer = self._open()
    try:
      response = self._checkpointer.save_checkpointables_async(
        step, items, force=True
      )
    except Exception as error:  # noqa: BLE001  # storage errors share no class
      raise self._failed(step, error) from error
    if response is None:
      raise CheckpointError(f"checkpoint step {step} was not saved")
    end = concurrent.futures.Future[None]()

    def finish() -> None:
      try:
        response.result()
        self._tell(step)
      except BaseException as error:  # noqa: BLE001  # raised by `wait`
        _set_failure(end, error)
      else:
        _set_success(end)

    _running.append(end)
    # A save is noted when it ends, not when the next one begins: the run may
    # be killed between the two.
    threading.Thread(target=finish, name="save", daemon=True).start()
    self._pending = (step, end)

  def _tell(self, step: int) -> None:
    if self._on_saved is None:
      return
    try:
      self._on_saved(step)
    except OSError as error:
      raise CheckpointError(
        f"checkpoint step {step} was saved, but not noted: {reason(error)}"
      ) from error

  def wait(self) -> None:
    """Wait for the running save, if there is one.

    Raises:
      CheckpointError: it failed; the message has the reason.
    """
    if self._pending is None:
      return
    step, end = self._pending
    try:
      end.result()
    except CheckpointError:
      self._pending = None
      raise
    except Exception as error:  # noqa: BLE001  # storage errors share no class
      self._pending = None
      raise self._failed(step, error) from error
    self._pending = None

  def reload(self) -> None:
    """List the directory again, after a step in it was renamed."""
    if self._checkpointer is not None:
      self._checkpointer.reload()

  def close(self) -> None:
    """Release what the writer holds; call `wait` first."""
    if self._checkpointer is not None:
      self._checkpointer.close()
    self._names.close()

  def _open(self) -> v1.training.Checkpointer:
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._names.close()
      return v1.training.Checkpointer(
        self._names.enter_context(_plain_name(self._directory)),
        context=_context(),
        preservation_policy=self._kept.policy(),
        cleanup_tmp_directories=True,
      )
    except OSError as error:
      raise CheckpointError(
        f"{self._directory}: cannot hold checkpoints: {reason(error)}"
      ) from error

  def _failed(self, step: int, error: Exception) -> CheckpointError:
    """Drop the checkpointer, which would report this failure ever after."""
    stale, self._checkpointer = self._checkpointer, None
    # Closing waits for the other processes, in which nothing may have failed.
    if stale is not None and jax.process_count() == 1:
      with contextlib.suppress(Exception):  # the failure that is reported here
        stale.close()
    return CheckpointError(
      f"checkpoint step {step} was not saved: {reason(error)}"
    )


@contextlib.contextmanager
def _plain_name(directory: epath.Path) -> Iterator[epath.Path]:
  """Yield a name of a local directory that Orbax does not misread.

  Orbax looks for what it has written with a pattern that begins with the whole
  path, so that it finds nothing in a folder such as `run[1]`, and its storage
  takes a backslash for a slash. Linux has another name for an open directory.
  """
  if "://" in str(directory) or not set(str(directory)) & set("[]\\*?"):
    yield directory
    return
  descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  try:
    yield epath.Path(f"/proc/self/fd/{descriptor}")
  finally:
    os.close(descriptor)


def load(
  path: epath.Path, name: str, target: Any, *, partial: bool = False
) -> Any:
  """Read one item of a step, onto the shardings of the target.

  Args:
    path: the directory of the step.
    name: the item, "state" or "record".
    target: arrays, or their shapes, dtypes and shardings. None for JSON.
    partial: whether the item may hold more than the target.

  Raises:
    DamagedError: the files are not as they were written.
    CheckpointError: the machine failed: memory, permission or network.
  """
  placed = jax.tree.map(_placed, target)
  context = _context()
  context.pytree.loading.partial_load = partial
  with _hushed():
    try:
      with context, _plain_name(path) as plain:
        return v1.load_checkpointables(plain, {name: placed})[name]
    except Exception as error:  # noqa: BLE001  # storage errors share no class
      why = reason(error)
      if _is_not_damage(error):
        raise CheckpointError(f"cannot be read: {why}") from error
    gc.collect()
  raise DamagedError(why)


def steps(directory: epath.Path) -> list[int]:
  """Return the finished steps, ascending.

  Raises:
    CheckpointError: the directory cannot be listed, or has damaged steps only.
  """
  try:
    names = [p.name for p in directory.iterdir()] if directory.exists() else []
  except OSError as error:
    raise CheckpointError(
      f"{directory}: cannot be listed: {reason(error)}"
    ) from error
  found = sorted(int(n) for n in names if re.fullmatch(r"0|[1-9]\d*", n))
  damaged = [n for n in names if re.fullmatch(r"\d+\.corrupt(\.\d+)?", n)]
  if damaged and not found:
    raise CheckpointError(
      f"{directory}: only damaged checkpoints: {', '.join(sorted(damaged))}"
    )
  return found


def rename(path: epath.Path, target: epath.Path) -> None:
  """Rename the directory of a step, once for all processes.

  Raises:
    CheckpointError: it cannot be renamed.
  """
  failure = None
  all_processes(True)  # each has chosen `target` by what exists now
  if jax.process_index() == 0:
    try:
      path.rename(target)
    except OSError as error:
      failure = f"{path}: cannot be renamed to {target.name}: {reason(error)}"
  if not all_processes(failure is None):
    raise CheckpointError(failure or f"{path}: cannot be renamed")


def delete(path: epath.Path) -> None:
  """Delete the directory of a step.

  It first gets a name of Orbax's unfinished saves. A kill in between therefore
  leaves no half step, and the next `Writer` removes the rest.

  Raises:
    CheckpointError: it cannot be deleted.
  """
  gone = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
  try:
    if gone.exists():
      gone.rmtree()
    path.rename(gone)
    gone.rmtree()
  except OSError as error:
    raise CheckpointError(
      f"{path}: cannot be deleted: {reason(error)}"
    ) from error


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _context() -> v1.Context:
  registry = v1.handlers.local_registry(include_global_registry=True)
  registry.add(v1.handlers.JsonHandler, checkpointable_name="record")
  context = v1.Context()
  context.checkpointables.registry = registry
  saving = context.array.saving
  saving.min_slice_bytes_for_replica_parallel = _SLICE_BYTES
  return context


def _chain(error: BaseException) -> list[BaseException]:
  chain = [error]
  while (cause := chain[-1].__cause__) is not None:
    chain.append(cause)
  return chain


def reason(error: BaseException) -> str:
  """Return the first cause of an error, as one short line."""
  root = _chain(error)[-1]
  lines = str(root).split(" [tensorstore_spec", 1)[0].splitlines() or [""]
  text = lines[0]
  if len(text) > 240:
    text = f"{text[:80]} ... {text[-150:]}"
  return f"{type(root).__name__}: {text}"


def _is_not_damage(error: BaseException) -> bool:
  return any(
    isinstance(cause, (MemoryError, PermissionError))
    or any(code in str(cause) for code in _NOT_DAMAGE)
    for cause in _chain(error)
  )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
  """Keep the tasks that a failed read abandons from printing tracebacks."""
  asyncio_log = logging.getLogger("asyncio")
  hook = sys.unraisablehook

  def drop(record: logging.LogRecord) -> bool:
    return False

  asyncio_log.addFilter(drop)
  sys.unraisablehook = lambda unraisable: None
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "coroutine .*never awaited")
      yield
  finally:
    sys.unraisablehook = hook
    asyncio_log.removeFilter(drop)


# The saves that run. A failed one stays until the next begins.
_running = collections.deque[concurrent.futures.Future[None]](maxlen=1)


def _set_failure(
  end: concurrent.futures.Future[None], error: BaseException
) -> None:
  with contextlib.suppress(concurrent.futures.InvalidStateError):
    end.set_exception(error)


def _set_success(end: concurrent.futures.Future[None]) -> None:
  with contextlib.suppress(concurrent.futures.InvalidStateError):
    end.set_result(None)


def _take_from_log(record: logging.LogRecord) -> bool:
  """Drop what Orbax logs, but end the running save where it logs a failure.

  Every failure is raised to the caller, so that the log says nothing new. But
  where one of several processes fails to write, Orbax first waits for the
  others, which wait for this one.
  """
  if "/orbax/checkpoint/" not in record.pathname:
    return True
  error = record.exc_info[1] if record.exc_info else None
  if error is not None and record.levelno >= logging.ERROR:
    for end in _running:
      _set_failure(end, error)
  return False


logging.getLogger("absl").addFilter(_take_from_log)
