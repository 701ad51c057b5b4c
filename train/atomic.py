"""Files of a data set that are there whole, or not at all.

What is being written stands in OUT/prepare under a name of its process alone:

    OUT/prepare/NAME.tmp-HOST-PID   →   OUT/NAME or OUT/prepare/NAME
"""

from collections.abc import Iterable, Iterator
import contextlib
import io
import json
import os
from pathlib import Path
import socket

import numpy as np

WORK = "prepare"  # the folder of what only `prepare` reads


@contextlib.contextmanager
def temporary(folder: Path, name: str) -> Iterator[Path]:
  """A path of this process alone, gone afterwards unless it was renamed."""
  path = folder / f"{name}.tmp-{socket.gethostname()}-{os.getpid()}"
  try:
    yield path
  finally:
    path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
  """Writes a file of OUT or OUT/prepare whole, or not at all."""
  write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
  """Writes a file of OUT or OUT/prepare whole, or not at all."""
  folder = path.parent
  if folder.name != WORK:
    folder = folder / WORK
  with temporary(folder, path.name) as temp:
    temp.write_bytes(data)
    sync(temp)
    temp.replace(path)


def write_array(path: Path, values: Iterable[int], dtype: type) -> None:
  """Writes an .npy file of OUT or OUT/prepare whole, or not at all."""
  data = io.BytesIO()
  np.save(data, np.array(values, dtype))
  write_bytes(path, data.getvalue())


def sync(path: Path) -> None:
  """Waits until a file or a folder is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
