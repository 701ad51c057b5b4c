"""Print lines, tables and messages about unknown names; loads no jax."""

from collections.abc import Callable, Iterable
import contextlib
import difflib
import math
import os
import sys
from typing import Any

from rich import table
from rich.console import Console
from rich.text import Text


class OutputLost(Exception):
  """Standard output cannot be written any more.

  Args:
    cause: the error of the write that failed.
  """

  def __init__(self, cause: Exception):
    super().__init__(f"standard output cannot be written: {cause}")
    self.cause = cause


class Output:
  """Standard output whose reader may go away, as that of `| head` does.

  Writing to a closed pipe, a lost terminal or a full disk fails. Here the first
  failure calls `on_lost`, and all text after it is dropped. In all else it is
  the stream.

  Args:
    stream: where the text goes. None, which Python has for a closed standard
      output, drops all text.
    on_lost: called once, with the error.

  Attributes:
    lost: whether writing has failed.
  """

  def __init__(self, stream: Any, on_lost: Callable[[OutputLost], None]):
    self.lost = False
    self._on_lost = on_lost
    if stream is None:
      stream = open(os.devnull, "w")  # noqa: SIM115  # open until the end
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Write text, or drop it once writing has failed."""
    self._try(lambda: self._stream.write(text))
    return len(text)

  def writelines(self, lines: Iterable[str]) -> None:
    """Write several texts."""
    self.write("".join(lines))

  def flush(self) -> None:
    """Flush the stream, unless writing has failed."""
    self._try(self._stream.flush)

  def _try(self, action: Callable[[], object]) -> None:
    if self.lost:
      return
    try:
      action()
    except (OSError, OutputLost) as error:
      self.lost = True
      self._drop_buffered_text()
      self._on_lost(OutputLost(error))

  def _drop_buffered_text(self) -> None:
    """Let Python's own flush succeed when the process ends."""
    with contextlib.suppress(OSError):  # a stream in memory has no descriptor
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self._stream.fileno())
      os.close(null)


def to_stdout(*, quiet: bool = False) -> Console:
  """Return a console that prints as long as it can, and never fails.

  `Output.lost` of its file says whether printing has failed.

  Args:
    quiet: whether it prints nothing.
  """
  output: Any = Output(sys.stdout, lambda _: None)
  return Console(file=output, quiet=quiet)


def say(console: Console, text: str) -> None:
  """Print a line as it is: no markup, emoji codes, colours or line breaks."""
  console.print(
    text, highlight=False, soft_wrap=True, markup=False, emoji=False
  )


def rows(title: str, values: dict[str, object]) -> table.Table:
  """Return a table of two columns, names and values, printed as they are."""
  # A path or a name may hold square brackets, which are no markup here.
  named = Text(title)
  result = table.Table(title=named, show_header=False, title_justify="left")
  result.add_column(style="bold")
  result.add_column(justify="right", overflow="fold")
  for name, value in values.items():
    result.add_row(Text(name), Text(str(value)))
  return result


def number(value: float) -> str:
  """Return a number for a table: four digits, or all of a whole number."""
  if isinstance(value, int) or not math.isfinite(value):
    return f"{value:,}"
  if abs(value) >= 10_000 or value.is_integer():
    return f"{value:,.0f}"
  return f"{value:.4g}"


def near(name: str, known: Iterable[str]) -> str:
  """Return "; did you mean NAME?", or nothing if no known name is close."""
  found = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {found[0]!r}?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
  """Return the message about a name that is not among the known ones.

  Args:
    kind: what is named, as "preset".
    name: the unknown name.
    known: the names that exist.
  """
  hint = near(name, known) or "."
  return f"there is no {kind} {name!r}{hint} Known: {', '.join(known)}"
