"""Print lines, tables and messages about unknown names; loads no jax."""

from collections.abc import Iterable
import difflib

from rich import table
from rich.console import Console


def say(console: Console, text: str) -> None:
  """Print a line as it is, without markup, colours or line breaks."""
  console.print(text, highlight=False, soft_wrap=True, markup=False)


def rows(title: str, values: dict[str, object]) -> table.Table:
  """Return a table of two columns, names and values."""
  result = table.Table(title=title, show_header=False, title_justify="left")
  result.add_column(style="bold")
  result.add_column(justify="right", overflow="fold")
  for name, value in values.items():
    result.add_row(name, str(value))
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
