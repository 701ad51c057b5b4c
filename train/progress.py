"""Show the progress of a run: a bar on a terminal, lines elsewhere."""

import time
from typing import Self

from rich import progress, table
from rich.console import Console

from train import metrics
from train.heartbeat import Heartbeat


class Display:
  """The progress of one run; a context manager.

  Args:
    console: where it is shown.
    heartbeat: prints the lines. While the display is open, it says how far the
      training is.
    start: the step that the run starts from.
    steps: the steps of the run.
    active: whether anything is shown. In one process of a run it is.
  """

  def __init__(
    self,
    console: Console,
    heartbeat: Heartbeat,
    *,
    start: int,
    steps: int,
    active: bool,
  ):
    self.console = console
    self._heartbeat, self._elsewhere = heartbeat, heartbeat.doing
    self._active = active
    self._steps = steps
    self._held_out = "–"
    self._done = start
    # When the first step ended: its compilation is in no rate.
    self._first: tuple[int, float] | None = None
    self._bar = None
    if active and console.is_terminal:
      self._bar = progress.Progress(
        _text_column("{task.completed:,}/{task.total:,}"),
        progress.BarColumn(bar_width=8),
        _text_column("{task.fields[text]}"),
        progress.TimeRemainingColumn(
          compact=True, table_column=table.Column(no_wrap=True)
        ),
        _text_column("left"),
        console=console,
      )
      self._task = self._bar.add_task(
        "train", total=steps, completed=start, text="compiling"
      )

  def step(self, step: int, values: dict[str, float] | None) -> None:
    """Show that `step` updates are done.

    Args:
      step: updates of the parameters that are done.
      values: the record that was written for this step. None: there is none.
    """
    if not self._active:
      return
    self._done = step
    if self._first is None:
      self._first = step, time.perf_counter()
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
    """Show held-out metrics, in the bar or as a line."""
    self._held_out = _headline(values).partition(" ")[2]
    if self._bar is None:
      self.line(
        f"step {step}: held-out {_headline(values, 4)}, loss "
        f"{values['loss']:.4f}"
      )

  @property
  def output_lost(self) -> bool:
    """Whether nobody can read the progress any more."""
    return getattr(self.console.file, "lost", False)

  def line(self, text: str) -> None:
    """Show a line of text, above the bar."""
    self._heartbeat.line(text)

  def _left(self, step: int) -> str:
    """Return the time that is left at the pace since the first step."""
    if self._first is None or step <= self._first[0]:
      return "–"
    first, then = self._first
    pace = (time.perf_counter() - then) / (step - first)
    left = int(pace * (self._steps - step))
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

  def _doing(self) -> str | None:
    """Return a line about what the run does; None if the bar shows it."""
    line = self._elsewhere()
    if line is None and self._bar is None:
      line = f"step {self._done}/{self._steps}  left {self._left(self._done)}"
    return line

  def __enter__(self) -> Self:
    self._heartbeat.doing = self._doing
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._heartbeat.doing = self._elsewhere
    if self._bar is not None:
      self._bar.stop()


def _headline(values: dict[str, float], digits: int = 3) -> str:
  """Return the metric that says most, with its name."""
  name = next(name for name in metrics.HEADLINES if name in values)
  if name == "perplexity":  # a larger number than the others
    digits -= 1
  return f"{name} {values[name]:.{digits}f}"


def _text_column(text: str) -> progress.TextColumn:
  return progress.TextColumn(text, table_column=table.Column(no_wrap=True))
