"""Keep row plans on disk, under a hash of what they are made from.

A plan is a folder of .npy files and a plan.json with their SHA-256. The folder
appears whole or not at all, so that processes may share the cache. A damaged
plan is made again.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import logging
import os
from pathlib import Path
import shutil
import uuid

import numpy as np

from train.data.file_hashes import file_hash

CACHE_DIR = Path.home() / ".cache" / "rebased_jax" / "plans"

_VERSION = 1
_log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def cached(
  key: Mapping[str, int | str | float],
  make: Callable[[], Arrays],
  cache_dir: Path = CACHE_DIR,
) -> Arrays:
  """Return arrays from the cache, or make them and keep them there.

  Args:
    key: everything that the arrays depend on.
    make: makes the arrays; it is called if the cache does not have them.
    cache_dir: the folder of the cache.

  Returns:
    The arrays by name, read-only, memory-mapped from their files.

  Raises:
    OSError: the folder cannot be written.
  """
  text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:32]
  folder = Path(cache_dir) / f"plan-{name}"
  arrays = _load(folder, text)
  if arrays is None:
    _save(folder, text, make())
    arrays = _load(folder, text)
  if arrays is None:
    raise OSError(f"{folder} is damaged right after it was written")
  return arrays


def _load(folder: Path, text: str) -> Arrays | None:
  """Return the memory-mapped arrays of a folder; None if it is not sound."""
  if not folder.exists():
    return None
  try:
    record = json.loads((folder / "plan.json").read_text())
    sound = record["key"] == text and all(
      file_hash(folder / f"{name}.npy") == digest
      for name, digest in record["sha256"].items()
    )
    if sound:
      return {
        name: np.asarray(
          np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        )
        for name in record["sha256"]
      }
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    pass
  _log.warning("%s is damaged and will be made again", folder)
  return None


def _save(folder: Path, text: str, arrays: Arrays) -> None:
  """Write a folder under a temporary name, then rename it."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
  temporary.mkdir()
  try:
    digests = {}
    for name, array in arrays.items():
      path = temporary / f"{name}.npy"
      np.save(path, array, allow_pickle=False)
      digests[name] = file_hash(path)
    record = {"key": text, "sha256": digests}
    (temporary / "plan.json").write_text(json.dumps(record))
    # Another process may have made it meanwhile.
    if _load(folder, text) is None:
      shutil.rmtree(folder, ignore_errors=True)
      try:
        os.rename(temporary, folder)
      except OSError:
        if not folder.exists():
          raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
