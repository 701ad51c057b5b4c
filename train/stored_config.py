"""A run's config as JSON: in config.json and in every checkpoint.

    {"version": 2, "id": "mine-0123456789ab", "run": {"class": …, …}}

`rebased_jax.config_json` says how each config inside is stored.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from typing import Any

from rebased_jax.config_json import (
  ConfigError as ConfigError,
  from_dict as from_dict,
  load_json,
  to_dict as to_dict,
)
from train.config import RunConfig

VERSION = 2  # of the JSON form

_WORK = (
  *("eval_every", "save_every", "log_every"),
  *("keep", "keep_every", "keep_best"),
  *("tensorboard", "wandb", "stop_accuracy", "nan"),
  *("loss_chunks", "model.remat", "model.scan_layers"),
  *("data.workers", "data.timeout"),
)


def to_json(config: RunConfig, run_id: str | None = None) -> str:
  """Return the text of config.json.

  Args:
    config: the run.
    run_id: the id of the run, which its checkpoints are marked with. None:
      the text has none.

  Raises:
    ConfigError: the config cannot be stored; see `to_dict`.
  """
  mark = {} if run_id is None else {"id": run_id}
  data = {"version": VERSION, **mark, "run": to_dict(config, "run")}
  return json.dumps(data, indent=2, allow_nan=False)


def from_json(text: str) -> RunConfig:
  """Return the run of a config.json.

  Raises:
    ConfigError: the text is not JSON, has another version, or names a class
      or field that does not fit.
  """
  data = load_json(text)
  if isinstance(data, dict) and "model" in data and "run" not in data:
    raise ConfigError(
      "it is of an exported model: expected that of a run. rebased_jax.load, "
      "`generate`, `inspect` and --init-from take exported models"
    )
  version = data.get("version") if isinstance(data, dict) else None
  if type(version) is int and version == 1:
    raise ConfigError(
      "version=1: expected 2. Version 1 is of a trainer before 0.1.0, whose "
      "parameters had other names, so that its checkpoints cannot be read "
      "either. Train the run again, or use the trainer that wrote it"
    )
  if type(version) is not int or version != VERSION:
    raise ConfigError(f"version={version!r}: expected {VERSION}")
  try:
    config = from_dict(data.get("run"), "run")
  except RecursionError as error:
    raise ConfigError("run is nested too deeply") from error
  if not isinstance(config, RunConfig):
    name = type(config).__name__
    raise ConfigError(f"run has type {name}: expected train:RunConfig")
  return config


def read_id(text: str) -> str | None:
  """Return the id of the run of a config.json; None if it has none.

  Raises:
    ConfigError: the text is not JSON, or the id is no string.
  """
  data = load_json(text)
  run_id = data.get("id") if isinstance(data, dict) else None
  if run_id is not None and not isinstance(run_id, str):
    raise ConfigError(f"id={run_id!r}: expected a string")
  return run_id


def check_storable(config: RunConfig) -> None:
  """Check that a config can be written to JSON and read back equal.

  Raises:
    ConfigError: it cannot; the message names the field.
  """
  data = to_dict(config, "run")
  again = from_dict(json.loads(json.dumps(data)), "run")
  if again != config:
    where = _unequal(config, again, "run")
    raise ConfigError(
      f"{where} is not the same after it is stored and read: expected a frozen "
      "dataclass that compares its fields and does not change them"
    )


def fingerprint(config: RunConfig) -> str:
  """Return 16 hexadecimal digits of the SHA-256 of the config's JSON."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
  """Return every field in which two runs differ, as `model.width: 64 → 32`."""

  def walk(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
      keys = [*a, *(key for key in b if key not in a)]
      rows = (
        walk(a.get(k), b.get(k), f"{path}.{k}" if path else k) for k in keys
      )
      return [row for found in rows for row in found]
    return [] if a == b else [f"{path}: {a!r} → {b!r}"]

  return walk(to_dict(old), to_dict(new), "")


def is_about_work(difference: str) -> bool:
  """Whether one of `differences` is about how a run works, not what it learns.

  These are records, saves and the end of a run, its processes, and choices of
  memory for time. Each resume may change them, as it may the mesh.
  """
  return difference.partition(":")[0] in _WORK or difference.startswith(
    ("mesh.", "profile.")
  )


def is_about_optimizer(difference: str) -> bool:
  """Whether one of `differences` is about the rest of the training alone.

  A resume may change it with `allow_optimizer_change`.
  """
  field = difference.partition(":")[0]
  return field in ("steps", "z_loss") or field.startswith("optimizer.")


def is_about_paths(difference: str) -> bool:
  """Whether one of `differences` is about the places of files, or their check.

  The content of the files does not count: the fingerprint compares it.
  """
  field = difference.partition(":")[0]
  places = ("data.path", "data.eval_path", "data.cache_dir")
  return field in (*places, "data.verify")


def is_about_data(difference: str) -> bool:
  """Whether one of `differences` is about the batches alone.

  The seed counts too: after step 0 only data and dropout depend on it.
  """
  field = difference.partition(":")[0]
  return field in ("batch", "accumulate", "seed") or field.startswith("data.")


def _unequal(a: Any, b: Any, where: str) -> str:
  """Return the innermost place where two configs differ."""
  if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
    parts: Mapping[str, tuple[Any, Any]] = {
      f"{where}[{i}]": pair for i, pair in enumerate(zip(a, b, strict=True))
    }
  elif dataclasses.is_dataclass(a) and type(a) is type(b):
    parts = {
      f"{where}.{x.name}": (getattr(a, x.name), getattr(b, x.name))
      for x in dataclasses.fields(a)
    }
  else:
    return where
  for place, (x, y) in parts.items():
    if x != y:
      return _unequal(x, y, place)
  return where
