"""A config as JSON: in the config.json of runs and of exported models.

    {"class": "rebased_jax:ReBasedConfig", "heads": 12, "features": 16, …}

Each dataclass names its class as `module:Class`, so that a mixer or a data
source from anybody's module can be stored. Reading a config imports the
modules that it names: read only files that you trust. Every value is compared
with the type that its class annotates.
"""

import dataclasses
import enum
import importlib
import json
import math
from typing import Any

from rebased_jax import field_types

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


def load_json(text: str) -> Any:
  """Return the JSON data of a config.json.

  Raises:
    ConfigError: the text is not JSON, has a number that is not finite, or has
      a name twice.
  """
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
