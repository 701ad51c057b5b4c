"""Say what a run does whenever it has printed nothing for a while.

Reading large data, compiling and evaluating take minutes in a large run. A log
that is silent for so long looks like that of a run that hangs.
"""

from collections.abc import Callable
import threading
import time
from typing import Self

from rich.console import Console

from train import console as console_lib


class Heartbeat:
  """Print a line at least every so often; a context manager.

  Args:
    console: where the lines go.
    doing: returns the line to print now. None: there is none to print.
    active: whether anything is printed. In one process of a run it is.
    every: seconds without a line after which one is printed.
    first: the same for the first line. None: `every`.

  Attributes:
    doing: see above; a display of the run's progress may replace it.
  """

  def __init__(
    self,
    console: Console,
    doing: Callable[[], str | None],
    *,
    active: bool = True,
    every: float = 30.0,
    first: float | None = None,
  ):
    self.doing = doing
    self._console, self._active, self._every = console, active, every
    self._wait = every if first is None else first
    self._said = time.monotonic()
    self._closed = threading.Event()

  def line(self, text: str) -> None:
    """Print a line, which counts as a sign of life."""
    self._said = time.monotonic()
    if self._active:
      console_lib.say(self._console, text)

  def _beat(self) -> None:
    while not self._closed.wait(self._wait / 10):
      if time.monotonic() - self._said < self._wait:
        continue
      text = self.doing()
      if text is not None:
        self.line(text)
        self._wait = self._every

  def __enter__(self) -> Self:
    self._said = time.monotonic()
    if self._active:
      threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()


def on_stderr(
  doing: Callable[[], str | None], *, active: bool = True
) -> Heartbeat:
  """Return a heartbeat for a command whose result goes to standard output.

  On a terminal its first line comes after 2 seconds, so that somebody who waits
  knows why.

  Args:
    doing: returns the line to print now. None: there is none to print.
    active: whether anything is printed.
  """
  console = Console(stderr=True)
  first = 2.0 if console.is_terminal else None
  return Heartbeat(console, doing, active=active, first=first)
