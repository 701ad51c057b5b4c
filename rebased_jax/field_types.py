"""The types of config fields: whether a value has one, and plain numbers.

Python does not check annotations, so a stored `"tensorboard": "false"` would
be taken, and would be true. A stored config is therefore compared with the
annotations of its classes. JSON's types decide: `true` is no number, 1.5 is no
integer, and an integer may stand for a float.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import typeguard


def hints(cls: type) -> dict[str, Any]:
  """Return the types of a dataclass's fields, by name.

  A field is left out if its annotation names something that does not exist
  when the module is imported, as names under `if TYPE_CHECKING` do.

  Args:
    cls: the dataclass.
  """
  try:
    found = typing.get_type_hints(cls)
  except (NameError, AttributeError):
    found = {
      field.name: field.type
      for field in dataclasses.fields(cls)
      if not isinstance(field.type, str)
    }
  names = {field.name for field in dataclasses.fields(cls)}
  return {name: hint for name, hint in found.items() if name in names}


def fits(value: object, hint: Any) -> bool:
  """Whether a value has the type that an annotation says.

  Args:
    value: None, a bool, a number, a string, a dataclass, or a tuple of these.
    hint: the annotation.
  """
  origin, args = get_origin(hint), get_args(hint)
  if origin in (Union, types.UnionType):
    return any(fits(value, arg) for arg in args)
  if origin is Literal:
    return any(type(value) is type(arg) and value == arg for arg in args)
  if origin is tuple and isinstance(value, tuple):
    if len(args) == 2 and args[1] is Ellipsis:
      return all(fits(item, args[0]) for item in value)
    pairs = zip(value, args, strict=False)
    return len(value) == len(args) and all(fits(x, arg) for x, arg in pairs)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if hint is float:
    return fits(value, int) and _is_float(value) or isinstance(value, float)
  try:
    typeguard.check_type(
      value,
      hint,
      forward_ref_policy=typeguard.ForwardRefPolicy.IGNORE,
      collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
    )
  except typeguard.TypeCheckError:
    return False
  return True


def name(hint: Any) -> str:
  """Return an annotation as a user would write it, as `int | None`."""
  if hint is type(None):
    return "None"
  if get_origin(hint) in (Union, types.UnionType):
    return " | ".join(name(arg) for arg in get_args(hint))
  if isinstance(hint, type) and not get_args(hint):
    return hint.__name__
  return str(hint).replace("typing.", "")


def _is_float(value: Any) -> bool:
  """Whether an integer is within float64's range."""
  try:
    return math.isfinite(float(value))
  except OverflowError:
    return False
