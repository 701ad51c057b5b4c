"""`rebased experiment NAME`: run an experiment of the paper, cell by cell."""

from collections.abc import Mapping
import dataclasses
import fnmatch
from pathlib import Path
import time
from typing import TYPE_CHECKING, Annotated, TypeVar

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
_AnyCell = TypeVar("_AnyCell")


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

  if args.name == "table-2":
    return _run_text(args, console)
  experiments = paper.make_experiments()
  if args.name not in experiments:
    known = (*experiments, "table-2", "list", "page", "verify")
    raise ValueError(lines.unknown("experiment", args.name, known))
  experiment = experiments[args.name]
  if args.quick:
    experiment = _small(experiment)
    lines.say(console, "--quick: small cells; not of the paper's size")
  chosen = {
    name: _with_grid(cell, args)
    for name, cell in _choose(experiment.cells, args.only).items()
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


def _run_text(args: RunArgs, console: Console) -> int:
  """Run the language models of Table 2."""
  if args.rates:
    raise ValueError(
      f"--rates {args.rates}: expected none: the language models of table-2 "
      "have the learning rate of their presets"
    )
  from train.experiments import language, language_results

  size = language.QUICK if args.quick else language.FULL
  seeds = args.seeds or (language.SEEDS[:1] if args.quick else language.SEEDS)
  name = "table-2-quick" if args.quick else "table-2"
  if args.quick:
    lines.say(console, "--quick: small cells; not of the paper's size")
  folder = Path(args.out) / "quick" if args.quick else Path(args.out)
  cells = language.make_cells(size, seeds)
  chosen = _choose(cells, args.only)
  end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
  corpus = language.make_text(size, folder / "text", console)
  lines.say(
    console,
    f"text: {corpus['bytes'] / 1e6:.0f} MB, {corpus['train']['tokens']:,} "
    f"training tokens, sha256 {corpus['sha256'][:12]}",
  )
  code = 0
  for cell in chosen.values():
    seconds = None if end is None else end - time.monotonic()
    if seconds is not None and seconds <= 0:
      break
    record, code = language.run_text_cell(
      cell, folder, corpus, seconds=seconds, console=console
    )
    if record is None:
      break
    last = record["held_out"][-1]
    lines.say(
      console,
      f"{cell.name}: perplexity {last['perplexity']:.2f}, AR "
      f"{last['ar_perplexity']:.2f}, other {last['non_ar_perplexity']:.2f}; "
      f"{record['seconds']:.0f} s, {record['tokens_per_second']:,} tokens/s",
    )
  found = language.read_cells(folder / "cells", size)
  published = {} if args.quick else language_results.TABLE_2
  for path in language_results.write(found, name, folder, published):
    lines.say(console, f"wrote {path}")
  left = len(cells.keys() - found.keys())
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
  cells: Mapping[str, _AnyCell], only: tuple[str, ...]
) -> dict[str, _AnyCell]:
  """Return the cells whose names match a pattern; all if there is none."""
  if not only:
    return dict(cells)
  chosen = {
    name: cell
    for name, cell in cells.items()
    if any(fnmatch.fnmatch(name, pattern) for pattern in only)
  }
  if not chosen:
    raise ValueError(
      f"--only {' '.join(only)}: expected a pattern that matches one of the "
      f"cells {', '.join(cells)}"
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
  from train.experiments import language, paper, results

  folder = Path(args.out) / "cells"
  if not folder.is_dir():
    lines.say(
      console,
      f"no records: {folder} is not there; a checkout of the project has its "
      "records under benchmarks/results/experiments, and --out names a folder",
    )
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
  texts = language.read_cells(folder)
  planned = language.make_cells()
  done = len(planned.keys() & texts.keys())
  count = f"{done} of {len(planned)} cells"
  table.add_row("table-2: perplexity", "", count, "")
  for name in {**planned, **texts}:
    table.add_row(f"  {name}", *_ours_of_text(name, texts.get(name)))
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


def _ours_of_text(name: str, record: dict | None) -> tuple[str, str, str]:
  """Return the paper's perplexity, ours and the size of our run."""
  from train.experiments import language_results

  system = name.removeprefix("text-").rpartition("-seed")[0]
  theirs = language_results.TABLE_2.get(system)
  shown = "" if theirs is None else f"{theirs[0]:.2f}"
  if record is None:
    return shown, "not run", ""
  ours = f"{record['held_out'][-1]['perplexity']:.2f}"
  return shown, ours, f"{record['tokens'] / 1e6:.0f} M tokens"


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
