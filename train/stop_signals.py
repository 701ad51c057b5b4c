"""The handling of signals that stop a run.

    SIGTERM, SIGINT   a scheduler or Ctrl-C
    SIGHUP            the terminal is lost; ignored under nohup
    SIGUSR1           SLURM's --signal=USR1, some time before the end of a job

The first signal sets a flag. The loop then finishes its step, saves, prints
how to resume, and leaves with `exit_code`. A second SIGTERM or SIGINT ends the
process at once with the same code, even while the main thread computes: Python
runs signal handlers only when the main thread returns to Python, so that a
separate thread counts the signals. SIGHUP and SIGUSR1 never end it at once: a
shell repeats SIGHUP, and after SIGUSR1 SLURM sends SIGTERM.

Where nothing can be saved yet, or any more, the first signal ends the process
with one line: see `leaving_at_signals`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any, NoReturn, Self

_URGENT = (signal.SIGTERM, signal.SIGINT)
_POLITE = (signal.SIGHUP, signal.SIGUSR1)


def polite_signals() -> list[signal.Signals]:
  """Return SIGHUP and SIGUSR1, without those that somebody else handles.

  A program may have its own handler, and `nohup` ignores SIGHUP.
  """
  return [x for x in _POLITE if _is_default(signal.getsignal(x))]


def _is_default(handler: Any) -> bool:
  """Whether a handler is the system's, Python's or `leaving_at_signals`'s."""
  return isinstance(handler, _Leave) or handler in (
    signal.SIG_DFL,
    signal.default_int_handler,
  )


class _Leave:
  """A handler that ends the process with one line.

  A thread does it, because the main thread may be compiling for minutes.

  Args:
    numbers: the signals.
    before: is called first, with the exit code.
  """

  def __init__(self, numbers: Collection[int], before: Callable[[int], None]):
    self._numbers, self._before = numbers, before
    self._reader, self.writer = socket.socketpair()
    self.writer.setblocking(False)
    self._thread = threading.Thread(
      target=self._watch, name="leave at signals", daemon=True
    )
    self._thread.start()

  def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
    # Again, because a library may have taken the wakeup descriptor.
    self.writer.send(bytes([number]))
    while True:  # the thread ends the process meanwhile
      time.sleep(1)

  def _watch(self) -> None:
    while received := self._reader.recv(1):
      number = received[0]
      if number in self._numbers:
        text = f"rebased: stopped by {signal.Signals(number).name}\n"
        if os.isatty(2):  # the line may hold "^C" or a progress display
          text = "\n" + text
        with contextlib.suppress(OSError):  # standard error may be lost
          os.write(2, text.encode())
        self._before(128 + number)
        os._exit(128 + number)

  def close(self) -> None:
    """End the thread."""
    self.writer.close()
    self._thread.join()
    self._reader.close()


@contextlib.contextmanager
def leaving_at_signals(before: Callable[[int], None]) -> Iterator[None]:
  """End the process at a signal that stops a run, with one line.

  The exit code is 128 + the signal's number. `StopSignals` inside the context
  takes its place. A signal that somebody else handles or ignores is left to
  them, as the shell ignores SIGINT for a job with `&`.

  Python's KeyboardInterrupt would not do: jax has callbacks that drop it, and
  an import that it interrupts may fail with another error.

  Args:
    before: is called with the exit code before the process ends.
  """
  in_main = threading.current_thread() is threading.main_thread()
  found = {x: signal.getsignal(x) for x in (*_URGENT, *_POLITE)}
  handlers = {
    x: handler for x, handler in found.items() if _is_default(handler)
  }
  if not in_main or not handlers:
    yield
    return
  leave = _Leave(handlers, before)
  for number in handlers:
    signal.signal(number, leave)
  old = signal.set_wakeup_fd(leave.writer.fileno(), warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(old)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    leave.close()


class StopSignals:
  """Watch for the signals that stop a run, while the context is open.

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
    """The name of the first signal, such as `SIGTERM`; None without one."""
    return None if self._first is None else signal.Signals(self._first).name

  @property
  def exit_code(self) -> int:
    """128 + the number of the first signal; 0 without one."""
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
    for number in (*_URGENT, *polite_signals()):
      self._handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
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
    self._handled += number in _URGENT
    self._note(number, self._handled)

  def _count(self) -> None:
    """Count the signals, which the interpreter writes as one byte each."""
    count = 0
    while received := self._reader.recv(1):
      if received[0] in self._handlers:
        count += received[0] in _URGENT
        self._note(received[0], count)

  def _note(self, number: int, count: int) -> None:
    """Note a signal; `count` is the number of urgent ones so far."""
    if self._first is None:
      self._first = number
    if count > 1 and number in _URGENT:
      name = signal.Signals(number).name
      text = f"\nsecond signal ({name}): leaving at once, nothing is saved\n"
      with contextlib.suppress(OSError):  # standard error may be lost
        os.write(2, text.encode())
      os._exit(self.exit_code)
