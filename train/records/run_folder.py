"""The folder of a run: config.json, metrics.jsonl, checkpoints/, pictures.

The folder may be a `gs://` path, with the extra `gcs`. Each file is written
whole, or not at all.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import contextlib
import dataclasses
import datetime
import fcntl
import importlib.util
import itertools
import json
import os
from pathlib import Path
import re
import time
from typing import IO, Any, Self, TypeVar
import uuid

from etils import epath

from rebased_jax import atomic
from train import stored_config
from train.config import RunConfig

#: Names that metrics had in earlier records, and what they are called now.
_RENAMED = {"step_time": "step_seconds"}

_T = TypeVar("_T")


class RunFolderError(ValueError):
  """The folder cannot be used for this run; nothing in it was changed."""


@dataclasses.dataclass(frozen=True)
class Change:
  """One resume that changed the config of a run: a line of history.jsonl.

  Attributes:
    step: the step that it resumed at.
    unix_time: when.
    changes: the fields that changed, as `optimizer.beta1: 0.9 → 0.8`.
  """

  step: int
  unix_time: float
  changes: tuple[str, ...]

  def to_json(self) -> str:
    """Return the line of the file."""
    return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

  @classmethod
  def from_json(cls, line: str) -> Self:
    """Return the change of a line; ValueError if it is none."""
    record = json.loads(line)
    expected = {"step": int, "unix_time": float, "changes": list}
    if not isinstance(record, dict) or expected != {
      name: type(x) for name, x in record.items()
    }:
      raise ValueError(f"{line[:80]}: expected step, unix_time and changes")
    return cls(**record | {"changes": tuple(map(str, record["changes"]))})


@contextlib.contextmanager
def default_folder(name: str = "") -> Iterator[Path]:
  """Make an empty folder that no other run has, `runs/NAME-TIME`.

  A run that starts in the same second gets a number: `runs/NAME-TIME-2`. The
  folder is removed again if an error comes before anything is in it.

  Args:
    name: what the run is, as the name of a preset. Empty: `runs/TIME`.

  Yields:
    The folder, relative to the working directory.

  Raises:
    RunFolderError: it cannot be made.
  """
  root, now = Path("runs"), f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
  first = path = root / (f"{name}-{now}" if name else now)
  is_new = not root.exists()
  for number in itertools.count(2):
    try:
      path.mkdir(parents=True)
      break
    except FileExistsError:
      path = first.with_name(f"{first.name}-{number}")
    except OSError as error:
      raise RunFolderError(f"{path} cannot be made: {error}") from error
  folders = tuple(x.absolute() for x in ((path, root) if is_new else (path,)))
  _default_folders.add(folders)
  try:
    yield path
  except BaseException:
    _remove_if_empty(folders)
    raise
  finally:
    _default_folders.discard(folders)


# The folders that open contexts of `default_folder` have made.
_default_folders: set[tuple[Path, ...]] = set()


def remove_default_folders() -> None:
  """Remove default folders that are empty; call it before `os._exit`."""
  for folders in list(_default_folders):
    _remove_if_empty(folders)


def _remove_if_empty(folders: Sequence[Path]) -> None:
  for folder in folders:
    with contextlib.suppress(OSError):  # it is not empty
      folder.rmdir()


class RunFolder:
  """The folder in which a run keeps its files.

  Args:
    path: the folder, which need not exist yet.

  Attributes:
    path: the folder.
    config_file: config.json in it.
    metrics_file: metrics.jsonl in it, one record a line.
    checkpoints: the folder of the checkpoints.
    last_save_file: last_save.json in it, the step of the newest checkpoint.
    history_file: history.jsonl in it, the changes of the config, one resume a
      line.
  """

  def __init__(self, path: epath.PathLike):
    self.path = _checked_path(path)
    self.config_file = self.path / "config.json"
    self.metrics_file = self.path / "metrics.jsonl"
    self.checkpoints = self.path / "checkpoints"
    self.last_save_file = self.path / "last_save.json"
    self.history_file = self.path / "history.jsonl"
    self._locks = contextlib.ExitStack()

  def open(
    self,
    config: RunConfig,
    *,
    allow_data_change: bool = False,
    allow_optimizer_change: bool = False,
  ) -> None:
    """Make the folder for a new run, or check that it is this run's.

    What `stored_config.is_about_work` names may differ from the stored config,
    and so may the paths of data that a checkpoint knows. `update` stores the
    new config.

    Args:
      config: the run, with absolute paths.
      allow_data_change: whether data, batch and seed may differ too.
      allow_optimizer_change: whether steps and optimiser may differ too.

    Raises:
      RunFolderError: the folder holds another run, or other files.
      ConfigError: the config cannot be stored.
    """
    if self.config_file.exists():
      self._check_same_run(config, allow_data_change, allow_optimizer_change)
      self.check_checkpoints()
      return
    if self.path.exists() and not self.path.is_dir():
      raise RunFolderError(f"{self.path} is a file: expected a folder")
    if self.path.exists() and self._has_other_files():
      raise RunFolderError(
        f"{self.path} is not empty and holds no config.json: expected a run "
        "folder or a new one"
      )
    # The name is for people; the number makes it this run's alone.
    run_id = f"{self.path.name or 'run'}-{uuid.uuid4().hex[:12]}"
    text = stored_config.to_json(config, run_id) + "\n"
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise RunFolderError(f"{self.path} cannot be made: {error}") from error
    if self._is_remote:
      self.write("config.json", text)
      return
    try:
      atomic.create_text(Path(self.config_file), text)
    except FileExistsError:  # another process was faster
      self._check_same_run(config, allow_data_change, allow_optimizer_change)

  def _has_other_files(self) -> bool:
    """Whether the folder holds more than what `open` itself begins with."""
    ours = (
      f"{self.config_file.name}.tmp-"  # of another process, or a killed one
    )
    return any(not x.name.startswith(ours) for x in self.path.iterdir())

  def _check_same_run(
    self, config: RunConfig, allow_data: bool, allow_optimizer: bool
  ) -> None:
    # A checkpoint knows what moved data must hold.
    may_move = self._has_checkpoints()
    stored = self.read_config().with_absolute_paths()
    changed = [
      change
      for change in stored_config.differences(stored, config)
      if not stored_config.is_about_work(change)
      and not (may_move and stored_config.is_about_paths(change))
    ]
    data = [x for x in changed if stored_config.is_about_data(x)]
    optimizer = [x for x in changed if stored_config.is_about_optimizer(x)]
    refused = [
      x
      for x in changed
      if not (allow_data and x in data)
      and not (allow_optimizer and x in optimizer)
    ]
    if not refused:
      return
    hint = ""
    if all(x in data or x in optimizer for x in refused):
      if any(x in data for x in refused):
        hint += "; --allow-data-change uses the new data"
      if any(x in optimizer for x in refused):
        hint += "; --allow-optimizer-change trains on with the new values"
    raise RunFolderError(
      f"{self.path} holds a run of another config: {'; '.join(refused)}; "
      f"choose another --run-dir{hint}"
    )

  def _has_checkpoints(self) -> bool:
    """Whether there are steps, readable or not."""
    # Others are temporary: saves that were killed.
    return self.checkpoints.exists() and any(
      re.fullmatch(r"\d+(\.corrupt.*)?", x.name)
      for x in self.checkpoints.iterdir()
    )

  def check_checkpoints(self) -> None:
    """Check that there is a checkpoint, unless none was ever saved.

    Raises:
      RunFolderError: checkpoints were saved and are gone.
    """
    if self._has_checkpoints():
      return
    there = self.checkpoints.exists()
    saved = self.last_save()
    if saved is not None:
      lost = f"step {saved} was saved"
    elif self.metrics_file.exists() and not there and not self._is_remote:
      lost = "steps are in metrics.jsonl"
    else:
      return  # the run was stopped before its first save
    raise RunFolderError(
      f"{self.checkpoints}: no checkpoint is there, although {lost}: expected "
      "the run's checkpoints; bring them back, or start again in another "
      "--run-dir"
    )

  @property
  def _is_remote(self) -> bool:
    return "://" in str(self.path)

  def last_save(self) -> int | None:
    """Return the step of the newest checkpoint ever saved; None before it.

    Raises:
      RunFolderError: last_save.json cannot be read.
    """
    if not self.last_save_file.exists():
      return None
    try:
      step = json.loads(self.last_save_file.read_text())["step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise RunFolderError(f"{self.last_save_file}: {error!r}") from error
    if type(step) is not int or step < 0:
      raise RunFolderError(
        f"{self.last_save_file}: step={step!r}: expected a step of the run"
      )
    return step

  def note_save(self, step: int) -> None:
    """Remember that a step is saved, so that its loss would be noticed."""
    self.write(self.last_save_file.name, json.dumps({"step": step}) + "\n")

  def forget_saves_after(self, step: int | None) -> None:
    """Note that the saves after a step were deleted on purpose.

    Args:
      step: the newest step that stays. None: none does.
    """
    saved = self.last_save()
    if saved is None or (step is not None and saved <= step):
      return
    if step is None:
      self.last_save_file.unlink()
    else:
      self.note_save(step)

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keep other processes of this host from training in the folder.

    Raises:
      RunFolderError: another process trains in it.
    """
    if self._is_remote:  # a bucket has no locks
      yield
      return
    with self._locks:
      while not self._lock_config():
        pass  # `update` of another process has just replaced the file
      yield

  def _lock_config(self) -> bool:
    """Lock config.json; return whether it is still the file of that name."""
    with contextlib.ExitStack() as opened:
      # Network file systems lock only files that are open for writing.
      file = opened.enter_context(open(self.config_file, "r+"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise RunFolderError(
          f"{self.path}: another process is training in it"
        ) from error
      if os.path.samestat(os.fstat(file.fileno()), os.stat(self.config_file)):
        self._locks.push(opened.pop_all())
        return True
    return False

  def update(self, config: RunConfig) -> None:
    """Store a config that has changed; call it while the folder is locked."""
    if self.read_config() == config:
      return
    text = stored_config.to_json(config, self.run_id()) + "\n"
    if self._is_remote:
      self.write("config.json", text)
      return
    with atomic.replacing(self.config_file) as temporary:
      temporary.write_text(text)
      # The lock is on the file, so the new one is locked before it is in place.
      file = open(temporary, "r+")  # noqa: SIM115  # open as long as the lock
      locked = self._locks.enter_context(file)
      fcntl.flock(locked, fcntl.LOCK_EX)

  def read_config(self) -> RunConfig:
    """Return the run's config.

    Raises:
      RunFolderError: there is none, or it cannot be read.
    """
    return self._read_config_file(stored_config.from_json)

  def run_id(self) -> str | None:
    """Return the id of the run; None if it began before runs had one.

    Raises:
      RunFolderError: as `read_config` does.
    """
    return self._read_config_file(stored_config.read_id)

  def _read_config_file(self, read: Callable[[str], _T]) -> _T:
    if not self.config_file.exists():
      if not self.path.exists():
        raise RunFolderError(
          f"{self.path} does not exist: expected the folder of a run"
        )
      raise RunFolderError(
        f"{self.path} is no run folder: no config.json: expected the folder of "
        "a run"
      )
    try:
      return read(self.config_file.read_text())
    except (stored_config.ConfigError, UnicodeDecodeError) as error:
      raise RunFolderError(f"{self.config_file}: {error}") from error

  def read_history(self) -> list[Change]:
    """Return how the config was changed by resumes, oldest first.

    Raises:
      RunFolderError: history.jsonl cannot be read.
    """
    if not self.history_file.exists():
      return []
    try:
      lines = self.history_file.read_text().splitlines()
      return [Change.from_json(line) for line in lines]
    except (ValueError, RecursionError) as error:
      raise RunFolderError(f"{self.history_file}: {error}") from error

  def note_changes(self, step: int, changes: Sequence[str]) -> None:
    """Write to the history what a resume changes.

    Earlier changes at this step or later are dropped, because the steps that
    they were for are done again.

    Args:
      step: the step that it resumes at.
      changes: how the config differs from that of the checkpoint; see
        `stored_config.differences`.
    """
    before = self.read_history()
    now = [x for x in before if x.step < step]
    if changes:
      now.append(Change(step, time.time(), tuple(changes)))
    if now != before:
      lines = "".join(x.to_json() + "\n" for x in now)
      self.write(self.history_file.name, lines)

  def write(self, name: str, text: str) -> None:
    """Write a text file of the folder, whole or not at all."""
    atomic.write_text(self.path / name, text)

  def append_to_metrics(self) -> "IO[str] | _BucketText":
    """Return metrics.jsonl to write further lines to, then flush and close."""
    if self._is_remote:
      return _BucketText(self.metrics_file)
    return self.metrics_file.open("a")

  def read_metrics(self) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without a half-written last line.

    Raises:
      RunFolderError: a line before the last is not a record.
    """
    if not self.metrics_file.exists():
      return []
    lines = self.metrics_file.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
      try:
        records.append(_metrics_record(line))
      except (ValueError, RecursionError) as error:
        if number < len(lines):
          raise RunFolderError(
            f"{self.metrics_file}, line {number}: {error}"
          ) from error
    return records

  def cut_metrics(self, step: int, *, again: Collection[str] = ()) -> None:
    """Drop the records that the resumed run makes again.

    Args:
      step: the step that it resumes at; records after it are dropped.
      again: the kinds of records that it makes of this step too.
    """
    if self.metrics_file.exists():
      kept = [
        x
        for x in self.read_metrics()
        if x["step"] < step or (x["step"] == step and x["kind"] not in again)
      ]
      lines = "".join(json.dumps(record) + "\n" for record in kept)
      self.write("metrics.jsonl", lines)


class _BucketText:
  """Lines that are appended to a file of a bucket.

  A bucket takes whole files alone: gcsfs would replace what was there before.
  So each flush writes the file again.

  Args:
    path: the file, which need not exist.
  """

  def __init__(self, path: epath.Path):
    self._path = path
    self._text = path.read_text() if path.exists() else ""

  def write(self, text: str) -> None:
    """Append text; `flush` writes it."""
    self._text += text

  def flush(self) -> None:
    """Write the file."""
    self._path.write_text(self._text)

  def close(self) -> None:
    """Do nothing: each flush has written all."""


def _checked_path(path: epath.PathLike) -> epath.Path:
  """Return the path of a run folder.

  Raises:
    RunFolderError: it is a URL of a store that is not supported, or whose
      package is not installed.
  """
  text = str(path)
  # `gs:/` with one slash would be a local folder of that name.
  scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
  if scheme is None:
    return epath.Path(path)
  if not text.startswith("gs://"):
    raise RunFolderError(
      f"{text}: {scheme[1]}: is not a store of run folders: expected a local "
      "folder or gs://BUCKET/FOLDER"
    )
  if not any(importlib.util.find_spec(x) for x in ("gcsfs", "tensorflow")):
    raise RunFolderError(
      f"{text}: run folders in Google Cloud Storage need the package gcsfs: "
      "pip install 'rebased-jax[gcs]'"
    )
  return epath.Path(path)


def _metrics_record(line: bytes) -> dict[str, Any]:
  """Return the record of a line; ValueError if it is none."""
  record = json.loads(line.decode())
  if not isinstance(record, dict) or not {"kind", "step"} <= set(record):
    raise ValueError("expected a record with a kind and a step")
  values = dict(record)
  kind, step = values.pop("kind"), values.pop("step")
  if not isinstance(kind, str):
    raise ValueError(f"kind={kind!r}: expected a string")
  if type(step) is not int or step < 0:
    raise ValueError(f"step={step!r}: expected an integer ≥ 0")
  for name, value in values.items():
    if type(value) not in (int, float):
      raise ValueError(f"{name}={value!r}: expected a number")
  return {_RENAMED.get(name, name): value for name, value in record.items()}
