"""End a worker process together with the process that started it."""

import multiprocessing
from multiprocessing.connection import wait
import os
import threading


def end_with_parent() -> None:
  """End this process as soon as its parent has ended, even by `kill -9`.

  Without it a worker waits for ever to give away its next result. In a process
  that `multiprocessing` did not start, it does nothing. Another call does
  nothing either.
  """
  parent = multiprocessing.parent_process()
  running = {thread.name for thread in threading.enumerate()}
  if parent is None or _THREAD in running:
    return

  def watch() -> None:
    wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=watch, name=_THREAD, daemon=True).start()


_THREAD = "ends with its parent"
