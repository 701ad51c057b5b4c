"""The handling of SIGTERM and SIGINT during training.

The first signal sets a flag. The loop then finishes its step, saves, prints
how to resume, and leaves with `exit_code`. A second signal ends the process at
once with the same code, even while the main thread computes: Python runs signal
handlers only when the main thread returns to Python, so that a separate thread
counts the signals.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
  """Watch for SIGTERM and SIGINT while the context is open.

  The flag is that of this process. Several processes agree on the step to stop
  at by `devices.processes.Vote`. `jax.distributed.initialize` installs its own
  SIGTERM handler: call it before entering this context, which replaces it.
  """

  def __init__(self) -> None:
    self._first: int | None = None
    self._handled = 0
    self._handlers: dict[int, Any] = {}

  @property
  def requested(self) -> bool:
    """Whether a signal has asked the run to stop."""
    self._watch()
    return self._first is not None

  @property
  def signal_number(self) -> int:
    """The number of the first signal; 0 without one."""
    self._watch()
    return self._first or 0

  @property
  def signal_name(self) -> str | None:
    """The name of the first signal, `SIGTERM` or `SIGINT`; None without one."""
    return None if self._first is None else signal.Signals(self._first).name

  @property
  def exit_code(self) -> int:
    """143 after SIGTERM, 130 after SIGINT, 0 without a signal."""
    return 0 if self._first is None else 128 + self._first

  def __enter__(self) -> Self:
    """Install the handlers.

    Raises:
      RuntimeError: this is not the main thread, the only one that may install
        signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
      raise RuntimeError(
        "training handles SIGTERM and SIGINT, which Python allows in the main "
        "thread only: call train.run there"
      )
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._thread = threading.Thread(
      target=self._count, name="stop signals", daemon=True
    )
    self._thread.start()
    self._old_fd = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    for number in _SIGNALS:
      self._handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._handlers.items():
      # None stands for a handler that was not installed from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(self._old_fd)
    self._handlers.clear()
    self._writer.close()
    self._thread.join()
    self._reader.close()

  def _watch(self) -> None:
    """Take the wakeup descriptor back from a library that took it."""
    main = threading.current_thread() is threading.main_thread()
    if main and self._handlers:
      signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self._handled += 1
    self._note(number, self._handled)

  def _count(self) -> None:
    """Count the signals, which the interpreter writes as one byte each."""
    count = 0
    while received := self._reader.recv(1):
      if received[0] in _SIGNALS:
        count += 1
        self._note(received[0], count)

  def _note(self, number: int, count: int) -> None:
    if self._first is None:
      self._first = number
    if count > 1:
      name = signal.Signals(number).name
      text = f"\nsecond signal ({name}): leaving at once, nothing is saved\n"
      os.write(2, text.encode())
      os._exit(self.exit_code)
