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
  ):
    self.doing = doing
    self._console, self._active, self._every = console, active, every
    self._said = time.monotonic()
    self._closed = threading.Event()

  def line(self, text: str) -> None:
    """Print a line, which counts as a sign of life."""
    self._said = time.monotonic()
    if self._active:
      console_lib.say(self._console, text)

  def _beat(self) -> None:
    while not self._closed.wait(self._every / 10):
      if time.monotonic() - self._said < self._every:
        continue
      text = self.doing()
      if text is not None:
        self.line(text)

  def __enter__(self) -> Self:
    self._said = time.monotonic()
    if self._active:
      threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
