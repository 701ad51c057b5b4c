"""`rebased experiment NAME`: run an experiment of the paper, cell by cell."""

import dataclasses
import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
import tyro

from train import console as lines
from train.commands.parsing import parse

# The rest is imported when the options are right: jax takes seconds.
if TYPE_CHECKING:
  from train.experiments.paper import Experiment
  from train.experiments.sweep import Cell

_Positional = Annotated[str, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class RunArgs:
  """Run the cells of an experiment that have no record yet, and draw it.

  A cell that was stopped continues. Each finished cell is a file in `cells/`.
  """

  #: Which experiment.
  name: Annotated[_Positional, tyro.conf.arg(metavar="NAME")]
  #: The folder of records, tables and plots.
  out: str = "experiments"
  #: Run only cells whose names match one of these patterns, as "rebased-L128*".
  only: tuple[str, ...] = ()
  #: Learning rates of every cell, instead of those of the experiment.
  rates: tuple[float, ...] = ()
  #: Seeds of every cell, instead of those of the experiment.
  seeds: tuple[int, ...] = ()
  #: Stop after this time, at the end of an epoch. None: no limit.
  minutes: float | None = None
  #: Run a few cells at a small size, which show nothing of the paper.
  quick: bool = False


@dataclasses.dataclass(frozen=True)
class ListArgs:
  """Show every experiment, and which of its cells have been run."""

  #: The folder of records.
  out: str = "experiments"


@dataclasses.dataclass(frozen=True)
class VerifyArgs:
  """Run the first epochs of a recorded cell again, and compare."""

  #: The record of the cell.
  cell: Annotated[_Positional, tyro.conf.arg(metavar="CELL.json")]
  #: Epochs to run.
  epochs: int = 2
  #: Largest difference of an accuracy.
  tolerance: float = 0.02


@dataclasses.dataclass(frozen=True)
class PageArgs:
  """Write the page of results, with its pictures, from the records."""

  #: The folder of records.
  out: str = "experiments"
  #: The folder of `results.md` and `figures/`.
  docs: str = "docs"


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or a record is of another cell.
  """
  console = Console()
  word = args[0] if args else "--help"
  if word == "list":
    return _list(parse(ListArgs, "rebased experiment list", args[1:]), console)
  if word == "page":
    return _page(parse(PageArgs, "rebased experiment page", args[1:]), console)
  if word == "verify":
    return _verify(
      parse(VerifyArgs, "rebased experiment verify", args[1:]),
      console,
    )
  parsed = parse(RunArgs, "rebased experiment", args)
  return _run(parsed, console)


def _run(args: RunArgs, console: Console) -> int:
  from train.commands.run_cells import run_cells
  from train.experiments import paper, results

  experiments = paper.make_experiments()
  if args.name not in experiments:
    known = (*experiments, "list", "page", "verify")
    raise ValueError(lines.unknown("experiment", args.name, known))
  experiment = experiments[args.name]
  if args.quick:
    experiment = _small(experiment)
    lines.say(console, "--quick: small cells; not of the paper's size")
  chosen = {
    name: _with_grid(cell, args)
    for name, cell in _choose(experiment, args.only).items()
  }
  folder = Path(args.out)
  recorded = results.read_cells(experiment, folder / "cells")
  code = run_cells(chosen, recorded, folder / "cells", args.minutes, console)
  for path in results.write(experiment, folder):
    lines.say(console, f"wrote {path}")
  done = len(results.read_cells(experiment, folder / "cells"))
  left = len(experiment.cells) - done
  if left:
    lines.say(
      console, f"{left} cells have no record; the same command continues"
    )
  return code


def _with_grid(cell: "Cell", args: RunArgs) -> "Cell":
  """Return the cell with the rates and seeds of the command."""
  return dataclasses.replace(
    cell, rates=args.rates or cell.rates, seeds=args.seeds or cell.seeds
  )


def _choose(
  experiment: "Experiment", only: tuple[str, ...]
) -> "dict[str, Cell]":
  """Return the cells whose names match a pattern; all if there is none."""
  if not only:
    return dict(experiment.cells)
  chosen = {
    name: cell
    for name, cell in experiment.cells.items()
    if any(fnmatch.fnmatch(name, pattern) for pattern in only)
  }
  if not chosen:
    raise ValueError(
      f"--only {' '.join(only)}: expected a pattern that matches one of the "
      f"cells {', '.join(experiment.cells)}"
    )
  return chosen


def _small(experiment: "Experiment") -> "Experiment":
  from train.experiments import paper

  cells = {
    f"quick-{name}": paper.make_small(experiment.cells[name])
    for name in experiment.quick
  }
  return dataclasses.replace(
    experiment,
    name=f"{experiment.name}-quick",
    statement="Small cells, which show that the code runs.",
    cells=cells,
    published={},
  )


def _list(args: ListArgs, console: Console) -> int:
  from train.experiments import paper, results

  folder = Path(args.out) / "cells"
  # Without a frame the rows fit into 80 columns.
  table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
  for column in ("cell", "paper", "ours", "runs, epochs"):
    table.add_column(column, no_wrap=True)
  for experiment in paper.make_experiments().values():
    found = results.read_cells(experiment, folder)
    count = f"{len(found)} of {len(experiment.cells)} cells"
    table.add_row(experiment.name, "", count, "")
    for name in experiment.cells:
      published = experiment.published.get(name)
      theirs = "" if published is None else str(published)
      table.add_row(f"  {name}", theirs, *_ours(found.get(name)))
  console.print(table)
  return 0


def _page(args: PageArgs, console: Console) -> int:
  from train.experiments import page

  folder = Path(args.out)
  if not (folder / "cells").is_dir():
    raise ValueError(
      f"--out {args.out}: expected a folder with `cells/`; run an experiment "
      "first"
    )
  for path in page.write(folder, Path(args.docs)):
    lines.say(console, f"wrote {path}")
  return 0


def _ours(record: dict | None) -> tuple[str, str]:
  """Return our accuracy and the size of our run."""
  from train.experiments import record as records

  if record is None:
    return "not run", ""
  best = records.best_rate(record)
  done, planned = record["epochs_done"], record["epochs_planned"]
  size = f"{len(record['runs'])} runs, {done}/{planned}"
  return f"{best['mean']:.4f} ± {best['std']:.4f}", size


def _verify(args: VerifyArgs, console: Console) -> int:
  import numpy as np

  from train.experiments import record as records
  from train.experiments.sweep import Sweep

  record = records.read(Path(args.cell))
  cell = records.cell_of(record)
  count = min(args.epochs, record["epochs_done"])
  if count < 1:
    raise ValueError(f"--epochs {args.epochs}: expected 1 or more")
  worst = 0.0
  for epoch in Sweep(cell).epochs():
    for place, run in enumerate(epoch.runs):
      then = record["runs"][run]["accuracy"]
      if epoch.number < len(then) and epoch.active_R[place]:
        now = float(np.nan_to_num(epoch.accuracy_R[place]))
        worst = max(worst, abs(now - then[epoch.number]))
    lines.say(
      console,
      f"epoch {epoch.number + 1}: largest difference so far {worst:.4f}",
    )
    if epoch.number + 1 == count:
      break
  if worst <= args.tolerance:
    lines.say(console, f"{record['name']}: {count} epochs agree")
    return 0
  lines.say(
    console,
    f"{record['name']}: an accuracy differs by {worst:.4f}, more than "
    f"--tolerance {args.tolerance:g}",
  )
  return 1
