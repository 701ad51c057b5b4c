"""Let one process of a host fill a cache while the others wait."""

from collections.abc import Iterator
import contextlib
import fcntl
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def one_maker(cache_dir: Path) -> Iterator[None]:
  """Wait until no other process of this host makes a file of a cache.

  The folder itself is locked, so that no file of the lock remains. The system
  frees the lock of a process that is killed. The caller looks again whether the
  file is there when it has the lock.

  Args:
    cache_dir: the folder of the cache, which is made if necessary.

  Raises:
    OSError: the folder cannot be made or opened.
  """
  cache_dir.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(cache_dir, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.info("%s: waiting for the process that makes a file", cache_dir)
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
      # Some network file systems lock no folders. The file is then made twice.
      _log.warning("%s cannot be locked: %s", cache_dir, error.strerror)
    yield
  finally:
    os.close(descriptor)
