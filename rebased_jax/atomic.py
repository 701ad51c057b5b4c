"""Write files and folders so that each is there whole, or not at all.

The content is written under a temporary name in the same folder, which then
gets the final name in one step. A killed process leaves the temporary file:

    FOLDER/NAME.tmp-HOST-PID-THREAD   →   FOLDER/NAME

Functions of files take `pathlib.Path`, and `epath.Path` for folders in a
bucket.
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import shutil
import socket
import threading
from typing import Any, TypeVar

_Path = TypeVar("_Path", bound=Any)  # pathlib's or etils' Path


@contextlib.contextmanager
def temporary(folder: _Path, name: str) -> Iterator[_Path]:
  """Yield a path that no other process or thread uses; remove it afterwards.

  Args:
    folder: where the path is.
    name: the name that the file will get. The caller renames the file when it
      is complete; a renamed file stays.
  """
  path = folder / _temporary_name(name)
  try:
    yield path
  finally:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: _Path, folder: _Path | None = None) -> Iterator[_Path]:
  """Yield a temporary path that becomes `path` if the context succeeds.

  Args:
    path: the final path; what it held before is replaced.
    folder: where the temporary file is. None: beside `path`. It must be on the
      same file system.
  """
  with temporary(path.parent if folder is None else folder, path.name) as temp:
    yield temp
    temp.replace(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """Yield a temporary folder that becomes `path` if the context succeeds.

  Args:
    path: the final path: nothing is there yet, or an empty folder. Missing
      folders above it are made.

  Raises:
    OSError: the folder cannot be made, or `path` has files by now.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = path.with_name(_temporary_name(path.name))
  folder.mkdir()
  try:
    yield folder
    folder.rename(path)  # fails if files came into `path` meanwhile
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


@contextlib.contextmanager
def named_errors(path: Any) -> Iterator[None]:
  """Add the name of a file to an OSError without one, such as a full disk's.

  Args:
    path: the file that is read or written.
  """
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = str(path)
    raise


@contextlib.contextmanager
def named_array_errors(path: Any) -> Iterator[None]:
  """Do the same where NumPy writes an array.

  NumPy says how many numbers it wrote, but neither the file nor a reason.

  Args:
    path: the file that is written.
  """
  with named_errors(path):
    try:
      yield
    except OSError as error:
      if error.errno is not None:
        raise
      raise OSError(f"{path}: {error}; is the disk full?") from error


def write_bytes(
  path: Any, data: bytes, *, folder: Any = None, durable: bool = False
) -> None:
  """Write a file whole, or not at all.

  Args:
    path: the file.
    data: its content.
    folder: see `replacing`.
    durable: wait until the content is on the disk, so that it outlives a crash
      of the machine. For local files.
  """
  with replacing(path, folder) as temp, named_errors(path):
    temp.write_bytes(data)
    if durable:
      sync(temp)


def create_text(path: Path, text: str) -> None:
  """Write a new text file whole; one of several processes succeeds.

  Raises:
    FileExistsError: the path exists, perhaps since a moment.
  """
  with temporary(path.parent, path.name) as temp:
    temp.write_text(text)
    try:
      os.link(temp, path)
    except FileExistsError:
      raise
    except OSError:  # a file system without hard links
      with open(path, "x", encoding="utf-8") as file:
        file.write(text)


def write_text(path: Any, text: str) -> None:
  """Write a text file whole, or not at all."""
  write_bytes(path, text.encode())


def write_json(path: Any, value: object, **options: Any) -> None:
  """Write JSON whole, or not at all; `options` are those of `write_bytes`."""
  write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), **options)


def sync(path: Path) -> None:
  """Wait until a file or a folder is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _temporary_name(name: str) -> str:
  """Return a name that no other process or thread gives a file."""
  owner = f"{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}"
  return f"{name}.tmp-{owner}"
