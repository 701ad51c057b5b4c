"""Checks of config values: a wrong one is named with what was expected."""

import os
import re


def require(ok: bool, field: str, value: object, expected: str) -> None:
  """Raise a ValueError that names the field and its value unless `ok`.

  Args:
    ok: whether the value is acceptable.
    field: the name of the field, as a user writes it.
    value: the value of the field.
    expected: what the value should have been, as the end of a sentence.

  Raises:
    ValueError: `ok` is false.
  """
  if not ok:
    raise ValueError(f"{field}={value!r}: expected {expected}")


def absolute(path: str) -> str:
  """Return a path that does not depend on the working directory.

  Args:
    path: a path, or a URL, which stays as it is.
  """
  return path if "://" in path else os.path.abspath(path)


def check_local(name: str, path: str) -> None:
  """Raise ValueError if a path is a URL, such as gs://bucket/folder.

  `pathlib` would take it for a folder named "gs:".

  Args:
    name: what the message calls the path.
    path: a path that is only read and written with the calls of the system.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):
    raise ValueError(
      f"{name}={path!r}: expected a path of this machine; mount the bucket, or "
      "copy the files with a tool such as `gcloud storage cp -r`"
    )
