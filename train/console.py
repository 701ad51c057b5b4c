"""Print lines, tables and messages about unknown names; loads no jax."""

from collections.abc import Callable, Iterable
import contextlib
import difflib
import io
import os
import sys
from typing import Any

from rich import table
from rich.console import Console
from rich.text import Text


class OutputLost(Exception):
  """Nobody can read the output any more; the message has the reason."""


class Output(io.TextIOBase):
  """Standard output whose reader may go away, as `| head` does.

  Writing to a closed pipe or a lost terminal fails. Here the first failure
  calls `on_lost`, and all text after it is dropped.

  Args:
    stream: where the text goes. None stands for a closed standard output, as
      Python has it.
    on_lost: called once with the error. None: nothing is called.

  Attributes:
    lost: whether writing has failed.
  """

  def __init__(
    self,
    stream: Any,
    on_lost: Callable[[OutputLost], None] | None = None,
  ):
    self.lost = False
    self._stream, self._on_lost = stream, on_lost

  @property
  def encoding(self) -> str:
    """The stream's encoding; rich chooses its characters by it."""
    return getattr(self._stream, "encoding", None) or "utf-8"

  @property
  def errors(self) -> str | None:
    """How the stream encodes characters that it lacks."""
    return getattr(self._stream, "errors", None)

  @property
  def buffer(self) -> Any:
    """The bytes under the stream."""
    return self._stream.buffer

  def isatty(self) -> bool:
    """Whether the stream is a terminal."""
    return self._stream is not None and self._stream.isatty()

  def fileno(self) -> int:
    """Return the stream's file descriptor."""
    if self._stream is None:
      raise io.UnsupportedOperation("fileno")
    return self._stream.fileno()

  def writable(self) -> bool:
    """Whether text is accepted: always."""
    return True

  def write(self, text: str) -> int:
    """Write text, or drop it once writing has failed."""
    self._try(lambda: self._stream.write(text))
    return len(text)

  def flush(self) -> None:
    """Flush the stream, unless writing has failed."""
    self._try(lambda: self._stream.flush())

  def _try(self, action: Callable[[], object]) -> None:
    if self.lost or self._stream is None:
      return
    try:
      action()
    except UnicodeError:  # a ValueError, but no loss
      raise
    except (OSError, OutputLost, ValueError) as error:  # closed: a ValueError
      self.lost = True
      self._drop_buffered_text()
      if self._on_lost is not None:
        self._on_lost(OutputLost(f"standard output cannot be written: {error}"))

  def _drop_buffered_text(self) -> None:
    """Let Python's flush at its exit succeed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self._stream.fileno())
      os.close(null)


def to_stdout(*, quiet: bool = False) -> Console:
  """Return a console that prints on while it can, and never fails.

  Args:
    quiet: whether it prints nothing.
  """
  # The stream is a proper file for rich, though no subclass of typing.IO.
  output: Any = Output(sys.stdout)
  return Console(file=output, quiet=quiet)


def say(console: Console, text: str) -> None:
  """Print a line as it is, without markup, colours or line breaks."""
  console.print(text, highlight=False, soft_wrap=True, markup=False)


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
