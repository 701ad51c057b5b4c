"""A run's config as JSON: in config.json and in every checkpoint.

    {"class": "rebased_jax:ReBasedConfig", "heads": 12, "features": 16, …}

Each dataclass names its class as `module:Class`, so that a mixer or a data
source from anybody's module can be stored. Reading a config imports the
modules that it names: read only files that you trust. Every value is compared
with the type that its class annotates.
"""

from collections.abc import Mapping
import dataclasses
import enum
import hashlib
import importlib
import json
import math
from typing import Any

from train import field_types
from train.config import RunConfig

VERSION = 2  # of the JSON form

# Our own classes are stored by the package that exports them, so that a
# stored config outlives a move of the module inside the package.
_PUBLIC_PACKAGES = ("rebased_jax", "train")
_CLASS = "class"  # no field can have this name


class ConfigError(ValueError):
  """A config cannot be stored, or a stored one cannot be read."""


def to_dict(config: Any, where: str = "config") -> Any:
  """Return a config as JSON data: dicts, lists, strings, numbers and None.

  Args:
    config: a dataclass, a tuple, or a value that JSON has.
    where: the name of this value in messages.

  Raises:
    ConfigError: a class cannot be imported by its name, or a field holds what
      JSON cannot.
  """
  if isinstance(config, tuple):
    return [to_dict(x, f"{where}[{i}]") for i, x in enumerate(config)]
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    return _plain_value(config, where)
  name = class_name(type(config), where)
  fields = {
    field.name: to_dict(getattr(config, field.name), f"{where}.{field.name}")
    for field in dataclasses.fields(config)
  }
  return {_CLASS: name, **fields}


def from_dict(data: Any, where: str = "config") -> Any:
  """Return the config that `to_dict` made `data` of.

  Args:
    data: JSON data.
    where: the name of this value in messages.

  Raises:
    ConfigError: a class cannot be imported, is not a frozen dataclass, or
      does not take these fields. The message names the place.
  """
  if isinstance(data, list):
    return tuple(from_dict(x, f"{where}[{i}]") for i, x in enumerate(data))
  if not isinstance(data, dict):
    return data
  fields = dict(data)
  cls = _find_class(fields.pop(_CLASS, None), where)
  values = {key: from_dict(x, f"{where}.{key}") for key, x in fields.items()}
  for key, hint in field_types.hints(cls).items():
    if key in values and not field_types.fits(values[key], hint):
      raise ConfigError(
        f"{where}.{key}={_short(values[key])}: expected "
        f"{field_types.name(hint)}"
      )
  try:
    return cls(**values)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{where}: {error}") from error
  except Exception as error:  # noqa: BLE001  # a class may raise anything
    kind = type(error).__name__
    raise ConfigError(f"{where}: {kind}: {error}") from error


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
  data = _load(text)
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
  data = _load(text)
  run_id = data.get("id") if isinstance(data, dict) else None
  if run_id is not None and not isinstance(run_id, str):
    raise ConfigError(f"id={run_id!r}: expected a string")
  return run_id


def _load(text: str) -> Any:
  """Return the JSON data of a config.json."""
  try:
    return json.loads(
      text, parse_constant=_refuse, object_pairs_hook=_without_repeats
    )
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"not JSON: {error}") from error


def _refuse(constant: str) -> None:
  raise ValueError(f"{constant}: expected a finite number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  names = [name for name, _ in pairs]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{name!r} is there twice: expected it once")
  return dict(pairs)


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


def is_about_mesh(difference: str) -> bool:
  """Whether one of `differences` is about the devices, not about the run."""
  return difference.startswith("mesh.")


def is_about_paths(difference: str) -> bool:
  """Whether one of `differences` is about the places of files, or their check.

  What the files hold is another matter: their fingerprint must be the same.
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


def class_name(cls: type, where: str = "config") -> str:
  """Return `module:Class`, the name by which `cls` is imported.

  Args:
    cls: a frozen dataclass.
    where: the name of the value in messages.

  Raises:
    ConfigError: importing this name does not give `cls`, or `cls` is not a
      frozen dataclass.
  """
  module, name = cls.__module__, cls.__qualname__
  if module == "__main__":
    raise ConfigError(
      f"{where} is a {name} of the script that runs (__main__), which a resume "
      "cannot import: expected a class of a module; move it to a file that the "
      "script imports"
    )
  if "<locals>" in name:
    raise ConfigError(
      f"{where} is a {module}:{name}, a class inside a function: expected a "
      "class at the top of a module"
    )
  package = module.partition(".")[0]
  places = [package] if package in _PUBLIC_PACKAGES else []
  for place in [*places, module]:
    stored = f"{place}:{name}"
    try:
      found = _import_name(stored, where)
    except ConfigError:
      continue
    if found is cls:
      _check_class(cls, stored, where)
      return stored
  raise ConfigError(
    f"{where} is a {module}:{name}, but importing that name gives something "
    "else or nothing: expected a class that its module defines under its own "
    f"name{_shadow_hint(module)}"
  )


def _plain_value(value: Any, where: str) -> Any:
  is_plain = value is None or isinstance(value, bool | int | float | str)
  if not is_plain or isinstance(value, enum.Enum):
    raise ConfigError(
      f"{where} is a {type(value).__name__}: expected None, a bool, a number, "
      "a string, a tuple of these, or a frozen dataclass; JSON keeps no other "
      "type"
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{where}={value!r}: expected a finite number")
  return value


def _find_class(stored: Any, where: str) -> type:
  if not isinstance(stored, str) or stored.count(":") != 1:
    raise ConfigError(
      f"{where}.{_CLASS}={stored!r}: expected 'module:Class', as "
      "'rebased_jax:ReBasedConfig'"
    )
  cls = _import_name(stored, where)
  _check_class(cls, stored, where)
  return cls


def _import_name(stored: str, where: str) -> Any:
  """Return what `module:name` names."""
  module, _, name = stored.partition(":")
  try:
    found: Any = importlib.import_module(module)
  except (Exception, SystemExit) as error:  # a module may raise anything
    raise ConfigError(
      f"{where}.{_CLASS}={stored!r}: cannot import {module} "
      f"({type(error).__name__}: {error}): install its package, or add the "
      "folder that holds it to the environment variable PYTHONPATH"
      f"{_shadow_hint(module)}"
    ) from error
  for part in name.split("."):
    try:
      found = getattr(found, part)
    except Exception as error:  # noqa: BLE001  # as above
      raise ConfigError(
        f"{where}.{_CLASS}={stored!r}: {module} has no {name}: expected the "
        "class that was stored; was it renamed?"
      ) from error
  return found


def _short(value: Any) -> str:
  """Return a value for a message; of a config, its class."""
  if dataclasses.is_dataclass(value):
    return f"a {type(value).__name__}"
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _check_class(cls: Any, stored: str, where: str) -> None:
  # Looked up in the class itself: a subclass without the decorator inherits
  # the parameters of its base, but its own fields are not those of a dataclass.
  own = vars(cls) if isinstance(cls, type) else {}
  parameters = own.get("__dataclass_params__")
  if parameters is None or not parameters.frozen:
    raise ConfigError(
      f"{where}.{_CLASS}={stored!r}: expected a frozen dataclass "
      "(@dataclasses.dataclass(frozen=True))"
    )


def _shadow_hint(module: str) -> str:
  if module.partition(".")[0] != "train":
    return ""
  return (
    ". `train` is the trainer's own package here: give your module another name"
  )


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
