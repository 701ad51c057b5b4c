"""Open the shards of data sets, and keep no more open than a process may.

A process may have 1,024 open files on most machines (`ulimit -n`), and a data
set may have thousands of shards. The process raises its own limit as far as the
system allows. It keeps the shards that it read most recently, of all data sets
together, in half of that number. The other half is for everything else.
"""

import collections
from collections.abc import Callable
import errno
import os
from pathlib import Path
import resource
import stat
import threading
from typing import Any, Generic, TypeVar
import weakref

from train.data.text.token_source import DataError

_MOST = 1 << 16  # open files that a process asks for

_T = TypeVar("_T")

# The shards that are open, by data set and shard; the latest used one is last.
_recent: collections.OrderedDict[tuple[int, int], Any]
_recent = collections.OrderedDict()
# Python may free a data set, which calls `_forget`, inside a locked block.
_lock = threading.RLock()


class TooManyOpenFiles(DataError):
  """A file cannot be opened because the process has too many open files."""


class OpenFiles(Generic[_T]):
  """Open shards of one data set.

  A shard is closed when it is dropped here and no thread reads it any more, so
  an open shard must close its file when Python frees it.
  """

  def __init__(self) -> None:
    weakref.finalize(self, _forget, id(self)).atexit = False

  def get(self, shard: int, open_shard: Callable[[int], _T]) -> _T:
    """Return an open shard, which is opened if necessary.

    Args:
      shard: the number of the shard.
      open_shard: opens a shard by number.

    Raises:
      DataError: what `open_shard` raises. If it is TooManyOpenFiles, the shards
        of all data sets are closed first, and it is called again.
    """
    key = (id(self), shard)
    with _lock:
      if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
      most = max(1, raise_limit() // 2)
      while len(_recent) >= most:
        _recent.popitem(last=False)
    try:
      opened = open_shard(shard)
    except TooManyOpenFiles:
      # Other files fill the limit: keep no shard but this one.
      with _lock:
        _recent.clear()
      opened = open_shard(shard)
    with _lock:
      _recent[key] = opened
    return opened


def _forget(owner: int) -> None:
  """Close the shards of a data set that nobody uses any more."""
  with _lock:
    for key in list(_recent):
      if key[0] == owner:
        _recent.pop(key, None)


def raise_limit() -> int:
  """Raise this process's limit of open files, and return it.

  The limit becomes 65,536, or what the system allows if that is less. A higher
  one stays, and so does one that the system refuses to raise.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY:
    return _MOST
  most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
  if soft >= most:
    return soft
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  except (ValueError, OSError):  # macOS has a separate, lower limit
    return soft
  return most


def unreadable(path: Path, error: OSError) -> DataError:
  """Return an error that says why a file cannot be opened or read.

  Args:
    path: the file.
    error: what the system said.

  Returns:
    A TooManyOpenFiles if that is the reason.
  """
  if error.errno == errno.EMFILE:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return TooManyOpenFiles(
      f"{path}: cannot be opened: this process already has {most:,} open "
      "files, its limit: expected room for one more; `ulimit -n NUMBER` raises "
      "the limit"
    )
  return DataError(f"{path}: cannot be read: {error.strerror or error}")


def file_size(path: Path) -> int:
  """Return the size of a regular file in bytes.

  Opening a pipe would wait for its other end, and a device may have no end, so
  nothing but a regular file is opened. Links are followed.

  Args:
    path: the file.

  Raises:
    DataError: it is missing, or is not a regular file.
  """
  try:
    found = path.stat()
  except FileNotFoundError as error:
    linked = ": its link leads nowhere" if path.is_symlink() else ""
    raise DataError(f"{path}: missing{linked}") from error
  except OSError as error:
    raise unreadable(path, error) from error
  if not stat.S_ISREG(found.st_mode):
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
    raise DataError(f"{path}: it is {kind}: expected a regular file")
  return found.st_size


_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a pipe",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}


class RawFile:
  """A file of bytes that is read at any place, by any number of threads.

  Reading by `pread` takes from the disk little more than what is asked for. A
  memory map would read ahead at each place, and a file that is cut while it is
  mapped would end the process with SIGBUS.

  Args:
    path: the file. It is closed when Python frees this object.

  Raises:
    OSError: it cannot be opened.
  """

  def __init__(self, path: Path) -> None:
    self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

  def read(self, begin: int, size: int) -> bytes:
    """Return the bytes begin..begin+size-1, fewer at the end of the file."""
    parts, left = [], size
    while left:
      part = os.pread(self._descriptor, left, begin + size - left)
      if not part:
        break
      parts.append(part)
      left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def __del__(self) -> None:
    # There is no descriptor if the file could not be opened.
    if hasattr(self, "_descriptor"):
      os.close(self._descriptor)
