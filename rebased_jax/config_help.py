"""Let `help()` explain the fields of a config, and errors name wrong options.

The comment `#:` above a field is the only explanation of it. Documentation
pages and the command read it too. This module imports no jax.
"""

import dataclasses
import inspect
import linecache
import re
import sys
from typing import TypeVar

from rebased_jax.argument_names import explain_unknown_names

_Config = TypeVar("_Config")
_FIELD = re.compile(r"^  (\w+) *:")
_COMMENT = "  #:"


def with_help(cls: type[_Config]) -> type[_Config]:
  """Return a config's class, whose docstring explains every field.

  An unknown option raises a TypeError that says our name for it.

  Args:
    cls: a dataclass. The comments above its fields begin with `#:`.
  """
  cls.__init__ = explain_unknown_names(cls.__init__)
  explained = field_comments(cls)
  lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:"]
  for field in dataclasses.fields(cls):
    lines.append(f"  {field.name}: {explained.get(field.name, '')}".rstrip())
  cls.__doc__ = "\n".join(lines)
  return cls


def field_comments(cls: type) -> dict[str, str]:
  """Return the comment `#:` above each field of a dataclass, by field.

  Fields without a comment are left out, and so are all fields of a class whose
  source is not there.

  Args:
    cls: a dataclass at the top of its module.
  """
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    comment: list[str] = []
    for line in _body(base):
      field = _FIELD.match(line)
      if line.startswith(_COMMENT):
        comment.append(line.removeprefix(_COMMENT).strip())
        continue
      if field and comment:
        found[field[1]] = " ".join(comment)
      comment = []
  return found


def _body(cls: type) -> list[str]:
  """Return the lines of a class below its first one, if its source is there.

  `inspect.getsource` parses the whole module, which takes too long at start-up.
  """
  module = sys.modules[cls.__module__]
  lines = linecache.getlines(getattr(module, "__file__", None) or "")
  starts = [
    i for i, x in enumerate(lines) if re.match(rf"class {cls.__name__}\b", x)
  ]
  if len(starts) != 1:
    return []
  body = []
  for line in lines[starts[0] + 1 :]:
    if line[0] not in " \n":
      break
    body.append(line)
  return body
