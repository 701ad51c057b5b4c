"""What all of the data code checks alike: a field's value, a file's bytes."""

import hashlib
from pathlib import Path


def require(ok: bool, field: str, value: object, expected: str) -> None:
  """Raises a ValueError that names the field and its value unless `ok`."""
  if not ok:
    raise ValueError(f"{field}={value!r}: expected {expected}")


def file_hash(path: Path | str) -> str:
  """The SHA-256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
