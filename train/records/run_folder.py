"""The folder of a run: config.json, metrics.jsonl, checkpoints/, pictures.

The folder may be a `gs://` path. A file appears under its name when all of it
is written.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
from typing import Any

from etils import epath

from train import config as config_lib
from train.config import RunConfig


class RunFolderError(ValueError):
  """The folder cannot be used for this run; nothing in it was changed."""


class RunFolder:
  """Where one run keeps what it makes."""

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path)
    self.config_file = self.path / "config.json"
    self.metrics_file = self.path / "metrics.jsonl"
    self.checkpoints = self.path / "checkpoints"
    self._locks = contextlib.ExitStack()

  def open(self, config: RunConfig, *, allow_data_change: bool = False) -> None:
    """Claims the folder for a new run, or checks that it is this run's.

    The mesh may be another one. With `allow_data_change` the config may differ
    in the data, the batch and the seed too; `update` writes it.

    Raises:
      RunFolderError: it holds another run, or other files.
    """
    if self.config_file.exists():
      changed = [
        x
        for x in config_lib.differences(self.read_config(), config)
        if not config_lib.of_mesh(x)
      ]
      data = all(config_lib.of_data(x) for x in changed)
      if changed and not (data and allow_data_change):
        hint = "; --allow-data-change goes on with the new data" * data
        raise RunFolderError(
          f"{self.path} holds a run of another config: {'; '.join(changed)}; "
          f"choose another --run-dir{hint}"
        )
      return
    if self.path.exists() and not self.path.is_dir():
      raise RunFolderError(f"{self.path} is a file: expected a folder")
    if self.path.exists() and any(self.path.iterdir()):
      raise RunFolderError(
        f"{self.path} is not empty and holds no config.json: expected a run "
        "folder or a new one"
      )
    text = config_lib.to_json(config) + "\n"
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise RunFolderError(f"{self.path} cannot be made: {error}") from error
    self.write("config.json", text)

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps other processes of this host from training in the folder.

    Raises:
      RunFolderError: one is training in it.
    """
    if "://" in str(self.path):  # a bucket has no locks
      yield
      return
    with self.config_file.open() as file, self._locks:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise RunFolderError(
          f"{self.path}: another process is training in it"
        ) from error
      yield

  def update(self, config: RunConfig) -> None:
    """Writes a config that has changed; for use while the folder is locked.

    The new file is locked before it gets its name.
    """
    if self.read_config() == config:
      return
    text = config_lib.to_json(config) + "\n"
    if "://" in str(self.path):
      self.write("config.json", text)
      return
    temporary = self.path / "config.json.tmp"
    temporary.write_text(text)
    fcntl.flock(self._locks.enter_context(temporary.open()), fcntl.LOCK_EX)
    temporary.replace(self.config_file)

  def read_config(self) -> RunConfig:
    """The run's config.

    Raises:
      RunFolderError: there is none, or it cannot be read.
    """
    if not self.config_file.exists():
      raise RunFolderError(f"{self.path} is no run folder: no config.json")
    try:
      return config_lib.from_json(self.config_file.read_text())
    except (config_lib.ConfigError, UnicodeDecodeError) as error:
      raise RunFolderError(f"{self.config_file}: {error}") from error

  def write(self, name: str, text: str) -> None:
    """Writes a file whole, or not at all."""
    temporary = self.path / f"{name}.tmp"
    temporary.write_text(text)
    temporary.replace(self.path / name)

  def read_metrics(self) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a torn last line is left out.

    Raises:
      RunFolderError: a line before the last is no record.
    """
    if not self.metrics_file.exists():
      return []
    lines = self.metrics_file.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
      try:
        record = json.loads(line)
        if not isinstance(record, dict) or not {"kind", "step"} <= set(record):
          raise ValueError("expected a record with a kind and a step")
        records.append(record)
      except ValueError as error:
        if number < len(lines):
          raise RunFolderError(
            f"{self.metrics_file}, line {number}: {error}"
          ) from error
    return records

  def cut_metrics(self, step: int) -> None:
    """Drops the records of steps beyond `step`: a resume makes them again."""
    if self.metrics_file.exists():
      kept = [x for x in self.read_metrics() if x["step"] <= step]
      lines = "".join(json.dumps(record) + "\n" for record in kept)
      self.write("metrics.jsonl", lines)
