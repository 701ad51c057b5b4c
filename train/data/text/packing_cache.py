"""Keep row plans on disk, under a hash of what they are made from.

A plan is a folder of .npy files and a plan.json with their SHA-256. The folder
appears whole or not at all, so that processes may share the cache. A damaged
plan is made again.

Making a plan takes memory. So one process of a host makes one, with a lock on
the cache, while the others wait. Then all map the same files into memory.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import logging
import os
from pathlib import Path
import shutil
import time
import uuid

import numpy as np

from rebased_jax.atomic import named_array_errors
from train.data.cache_folder import cache_folder
from train.data.file_hashes import file_hash
from train.data.one_maker import one_maker
from train.data.text.open_files import (
  TooManyOpenFiles,
  raise_limit,
  unreadable,
)

CACHE_DIR = cache_folder("plans")

_VERSION = 2
_ABANDONED = 24 * 3600  # seconds since the last change of a temporary folder
_SMALL = 1 << 20  # bytes of an array that is read instead of mapped
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
    The arrays by name, read-only. Large ones are memory-mapped.

  Raises:
    OSError: the folder cannot be written.
    TooManyOpenFiles: the process cannot open the files of the plan.
  """
  text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:32]
  folder = Path(cache_dir) / f"plan-{name}"
  arrays = _load(folder, text)
  if arrays is None:
    with one_maker(folder.parent):
      arrays = _load(folder, text)  # another process may have made it
      if arrays is None:
        _remove_abandoned(folder.parent)
        if folder.exists():
          _log.warning("%s is damaged and will be made again", folder)
        _save(folder, text, make())
        arrays = _load(folder, text)
  if arrays is None:
    raise OSError(f"{folder} is damaged right after it was written")
  return arrays


def _load(folder: Path, text: str) -> Arrays | None:
  """Return the arrays of a folder; None if it is not sound."""
  if not folder.exists():
    return None
  raise_limit()  # each large array keeps its file open
  try:
    record = json.loads((folder / "plan.json").read_text())
    seal = record.pop("seal")
    sound = (
      seal == _seal(record)
      and record["key"] == text
      and all(
        file_hash(folder / f"{name}.npy") == digest
        for name, digest in record["sha256"].items()
      )
    )
    if sound:
      return {
        name: _load_array(folder / f"{name}.npy") for name in record["sha256"]
      }
  except OSError as error:
    found = unreadable(folder, error)
    if isinstance(found, TooManyOpenFiles):
      raise found from error
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    pass
  return None


def _load_array(path: Path) -> np.ndarray:
  """Return the array of a file, read-only; a large one is memory-mapped.

  A map keeps its file open, of which a mixture of many data sets has many.
  """
  small = path.stat().st_size < _SMALL
  mode = None if small else "r"
  array = np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
  array.flags.writeable = False
  return array


def _seal(record: Mapping) -> str:
  """Return the SHA-256 of the record of a plan."""
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _remove_abandoned(cache_dir: Path) -> None:
  """Remove what killed processes have left of plans that they were writing.

  Another host may share the folder and not the lock, so only folders of the day
  before and older are removed.
  """
  for path in cache_dir.glob("plan-*.tmp"):
    try:
      if time.time() - path.stat().st_mtime > _ABANDONED:
        shutil.rmtree(path, ignore_errors=True)
    except FileNotFoundError:  # its writer has removed it
      continue


def _save(folder: Path, text: str, arrays: Arrays) -> None:
  """Write a folder under a temporary name, then rename it."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
  temporary.mkdir()
  try:
    digests = {}
    for name, array in arrays.items():
      path = temporary / f"{name}.npy"
      with named_array_errors(path):
        np.save(path, array, allow_pickle=False)
      digests[name] = file_hash(path)
    record = {"key": text, "sha256": digests}
    sealed = {**record, "seal": _seal(record)}
    (temporary / "plan.json").write_text(json.dumps(sealed))
    # Without a lock another process may have made it meanwhile.
    if _load(folder, text) is None:
      shutil.rmtree(folder, ignore_errors=True)
      try:
        os.rename(temporary, folder)
      except OSError:
        if not folder.exists():
          raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
