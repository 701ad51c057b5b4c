"""What a person sees of a run: a bar on a terminal, lines elsewhere."""

from collections.abc import Iterable
import difflib
import time

from rich import progress, table
from rich.console import Console


class Display:
  """Progress of one run; a context manager. Silent unless `active`."""

  def __init__(self, console: Console, *, start: int, steps: int, active: bool):
    self.console = console
    self._active = active
    self._steps = steps
    self._held_out = "–"
    self._begin, self._start = time.perf_counter(), start
    self._bar = None
    if active and console.is_terminal:
      column = lambda text: progress.TextColumn(
        text, table_column=table.Column(no_wrap=True)
      )
      self._bar = progress.Progress(
        column("{task.completed:,}/{task.total:,}"),
        progress.BarColumn(bar_width=8),
        column("{task.fields[text]}"),
        progress.TimeRemainingColumn(
          compact=True, table_column=table.Column(no_wrap=True)
        ),
        column("left"),
        console=console,
      )
      self._task = self._bar.add_task(
        "train", total=steps, completed=start, text="compiling"
      )

  def step(self, step: int, values: dict[str, float] | None) -> None:
    """`step` updates are done; values are there where a record was written."""
    if not self._active:
      return
    text = None
    if values is not None:
      text = (
        f"loss {values['loss']:.4f} {_headline(values)} "
        f"held-out {self._held_out} "
        f"{values['tokens_per_second'] / 1e3:,.0f}k tokens/s"
      )
    if self._bar is None:
      if text is not None:
        self.line(f"step {step}/{self._steps}  {text}  left {self._left(step)}")
      return
    self._bar.update(self._task, completed=step)
    if text is not None:
      self._bar.update(self._task, text=text)

  def evaluated(self, step: int, values: dict[str, float]) -> None:
    """A held-out result, for the bar or as a line of its own."""
    self._held_out = _headline(values).partition(" ")[2]
    if self._bar is None:
      self.line(
        f"step {step}: held-out {_headline(values, 4)}, loss "
        f"{values['loss']:.4f}"
      )

  def line(self, text: str) -> None:
    """A line of text, above the bar."""
    if self._active:
      self.console.print(text, highlight=False, soft_wrap=True)

  def _left(self, step: int) -> str:
    seconds = time.perf_counter() - self._begin
    left = int(seconds / max(step - self._start, 1) * (self._steps - step))
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

  def __enter__(self) -> "Display":
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.stop()


def _headline(values: dict[str, float], digits: int = 3) -> str:
  """The number that says most: perplexity of text, else accuracy."""
  if "perplexity" in values:
    return f"perplexity {values['perplexity']:.{digits - 1}f}"
  return f"accuracy {values['accuracy']:.{digits}f}"


def say(console: Console, text: str) -> None:
  """A line as it is, without markup, colours or breaks."""
  console.print(text, highlight=False, soft_wrap=True, markup=False)


def rows(title: str, values: dict[str, object]) -> table.Table:
  """A two-column table."""
  result = table.Table(title=title, show_header=False, title_justify="left")
  result.add_column(style="bold")
  result.add_column(justify="right", overflow="fold")
  for name, value in values.items():
    result.add_row(name, str(value))
  return result


def near(name: str, known: Iterable[str]) -> str:
  """What may have been meant, as the end of a sentence, or nothing."""
  found = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {found[0]!r}?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
  """The message about a name that is not among the known ones."""
  hint = near(name, known) or "."
  return f"there is no {kind} {name!r}{hint} Known: {', '.join(known)}"
