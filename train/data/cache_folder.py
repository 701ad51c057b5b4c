"""Choose the folder of what takes time to make and is kept for later."""

import os
from pathlib import Path
import tempfile


def cache_folder(name: str) -> Path:
  """Return the folder of one kind of cached data, which need not exist.

  It is `~/.cache/rebased_jax/NAME`. A user without a home that can be written,
  as in many containers, gets `/tmp/rebased_jax-UID/NAME`.

  Args:
    name: the kind of data.
  """
  shared = Path(tempfile.gettempdir(), f"rebased_jax-{os.getuid()}", name)
  return home_cache_folder(name) or shared


def home_cache_folder(name: str) -> Path | None:
  """Return `~/.cache/rebased_jax/NAME`, which need not exist.

  Args:
    name: the kind of data.

  Returns:
    None if the user has no home that can be written.
  """
  try:
    folder = Path.home() / ".cache" / "rebased_jax" / name
  except RuntimeError:  # neither HOME nor an entry in the list of users
    return None
  return folder if _can_be_written(folder) else None


def _can_be_written(folder: Path) -> bool:
  """Whether this user can write to a folder, or make it."""
  there = next(x for x in (folder, *folder.parents) if os.path.exists(x))
  return os.access(there, os.W_OK)
