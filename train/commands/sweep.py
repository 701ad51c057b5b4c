"""`rebased sweep PRESET`: train a preset at many rates, seeds and widths."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
import tyro

from train import console as lines
from train.commands.arguments import SystemArg, parse_preset
from train.commands.parsing import naming_options
from train.config import RunConfig
from train.data.checks import require

if TYPE_CHECKING:
  from train.experiments.sweep import Cell


@dataclasses.dataclass(frozen=True)
class SweepArgs:
  """Train the preset, with the fields that you change, at a grid of numbers.

  The runs of a width are one compiled program, which the devices share. A sweep
  that was stopped continues. The preset's data must fit on a device: it is one
  of mqar, mqar-… or mqar-paper-….
  """

  run: Annotated[RunConfig, tyro.conf.arg(name="")]
  #: The system that the model gets, as in the preset of that system; see
  #: `rebased train`. None: the preset's.
  mixer: SystemArg = None
  #: Highest learning rates. Empty: the preset's.
  rates: tuple[float, ...] = ()
  #: Seeds. Empty: the preset's.
  seeds: tuple[int, ...] = ()
  #: Widths of the model. Empty: the preset's.
  widths: tuple[int, ...] = ()
  #: The folder of records, table and plot. None: sweeps/PRESET.
  out: str | None = None
  #: Stop after this time, at the end of an epoch. None: no limit.
  minutes: float | None = None


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the folder is of another sweep.
  """
  name, parsed = parse_preset(SweepArgs, "sweep", args)
  # Imported when the options are right: jax takes seconds.
  from train.commands.run_cells import run_cells
  from train.experiments import own_sweep, record as records

  if parsed.mixer is not None:
    name = f"{name}-{parsed.mixer}"
  folder = Path(parsed.out or Path("sweeps", name))
  with naming_options(parsed), naming_options(parsed.run):
    positive = all(width >= 1 for width in parsed.widths)
    require(positive, "widths", parsed.widths, "integers ≥ 1")
    cells = {
      f"{name}-d{width}": _cell(parsed, width)
      for width in parsed.widths or (parsed.run.model.width,)
    }
  console = Console()
  places = {each: folder / "cells" / f"{each}.json" for each in cells}
  recorded = {
    each: records.read_of(path, cells[each])
    for each, path in places.items()
    if path.exists()
  }
  code = run_cells(cells, recorded, folder / "cells", parsed.minutes, console)
  found = {
    each: records.read(path) for each, path in places.items() if path.exists()
  }
  if found:
    for path in own_sweep.write(name, found, folder):
      lines.say(console, f"wrote {path}")
  left = len(cells) - len(found)
  if left:
    lines.say(
      console,
      f"{left} of {len(cells)} widths are not finished; the same command "
      "continues",
    )
  return code


def _cell(args: SweepArgs, width: int) -> "Cell":
  """Return the cell of one width."""
  from train.experiments.sweep import Cell

  config = args.run
  model = dataclasses.replace(config.model, width=width)
  return Cell(
    dataclasses.replace(config, model=model),
    rates=args.rates or (config.optimizer.learning_rate,),
    seeds=args.seeds or (config.seed,),
  )
