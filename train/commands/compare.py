"""`rebased compare RUN …`: show several runs in one table and one plot."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
import tyro

from train.commands.parsing import parse
from train.console import say
from train.records import comparison

_LABELS = 34  # columns of the terminal that the labels of rows take
_VALUES = 20  # columns that each run takes


@dataclasses.dataclass(frozen=True)
class CompareArgs:
  """Show what differs between runs: configs, metrics, speed, and a plot.

  It reads no checkpoint, so that the runs may still train.
  """

  #: Folders of runs, or folders that hold such folders.
  runs: Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN …")
  ]
  #: The picture of the learning curves. "none": draw none.
  out: str = "compare.png"


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: a folder is none of a run, or there are fewer than two runs.
    OSError: the picture cannot be written.
  """
  parsed = parse(CompareArgs, "rebased compare", args)
  folders = comparison.find_folders(parsed.runs)
  if len(folders) < 2:
    raise ValueError(
      f"found {len(folders)} run: expected two or more to compare; `rebased "
      "inspect RUN` shows one"
    )
  parent = Path(parsed.out).absolute().parent
  if not parent.is_dir():
    raise ValueError(f"--out {parsed.out}: expected a folder that exists")
  runs, console = comparison.read(folders), Console()
  show(runs, console)
  if parsed.out != "none":
    # Imported when a picture is drawn: matplotlib takes a second.
    from train.records import plots

    plots.compare(runs, parsed.out)
    say(console, f"wrote {parsed.out}")
  return 0


def show(runs: Sequence[comparison.Run], console: Console) -> None:
  """Print the table of several runs, in parts that fit the terminal."""
  rows = comparison.table(runs)
  width = max(1, (console.width - _LABELS) // _VALUES)
  for start in range(0, len(runs), width):
    part = slice(start, start + width)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", style="bold")
    for each in runs[part]:
      table.add_column(Text(each.name), justify="right", overflow="fold")
    for label, values in rows.items():
      table.add_row(Text(label), *map(Text, values[part]))
    console.print(table)
    console.print()
  kinds = {type(each.config.data).__name__ for each in runs}
  if len(kinds) > 1:
    say(
      console,
      f"the data is of {len(kinds)} kinds, {', '.join(sorted(kinds))}: their "
      "losses do not compare",
    )
