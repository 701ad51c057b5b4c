"""Write the files of a data set, each complete or not at all.

    OUT            the data set
    OUT/prepare    the plan, the shards' JSON records, and temporary files

A file is written under a temporary name in OUT/prepare, so that readers of OUT
never see it. It is synced to the disk before it is renamed, because a shard
that is recorded as made is not made again after a crash.
"""

from collections.abc import Iterable
import hashlib
import io
from pathlib import Path

import numpy as np

from rebased_jax import atomic

WORK = "prepare"
DATASET = "dataset.json"


def write_json(path: Path, value: object) -> None:
  """Write JSON to a file of OUT or OUT/prepare."""
  atomic.write_json(path, value, folder=_work(path), durable=True)


def write_bytes(path: Path, data: bytes) -> None:
  """Write bytes to a file of OUT or OUT/prepare."""
  atomic.write_bytes(path, data, folder=_work(path), durable=True)


def write_array(path: Path, values: Iterable[int], dtype: type) -> str:
  """Write an .npy file of OUT or OUT/prepare, and return its SHA-256.

  A file that has the same bytes already is left alone.

  Args:
    path: the file.
    values: the values of the array (n,).
    dtype: the dtype of the array.
  """
  data = io.BytesIO()
  np.save(data, np.array(values, dtype))
  if not path.exists() or path.read_bytes() != data.getvalue():
    write_bytes(path, data.getvalue())
  return hashlib.sha256(data.getvalue()).hexdigest()


def _work(path: Path) -> Path:
  """Return the folder OUT/prepare of a file of OUT or OUT/prepare."""
  folder = path.parent
  return folder if folder.name == WORK else folder / WORK
