"""A report of how each parameter is split over the mesh."""

from collections.abc import Mapping
import io
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.config import RunConfig
from train.devices import parameter_sharding


def describe(
  config: RunConfig, params: Any, sizes: Mapping[str, int]
) -> tuple[list[str], Table]:
  """Return lines about the whole run, and a table of all parameters.

  The lines include a warning for each rule that does not divide a parameter.

  Args:
    config: the run.
    params: its parameters, or their shapes.
    sizes: the devices along each mesh axis.
  """
  places = parameter_sharding.place_all(params, sizes)
  axes = " × ".join(f"{name} {n}" for name, n in sizes.items() if n > 1)
  whole = sum(x.share({name: 1 for name in sizes}) for x in places)
  here = sum(x.share(sizes) for x in places)
  lines = [
    f"mesh: {axes or 'one device'}; {here:,} of {whole:,} parameters a device"
  ]
  lines += [
    f"warning: {x.path}: {reason}; it is not split over that axis"
    for x in places
    for reason in x.dropped
  ]
  heads = getattr(config.model.second, "heads", None)
  if heads is not None and heads % sizes["tensor"]:
    lines.append(
      f"warning: model.second.heads={heads} is not a multiple of mesh.tensor="
      f"{sizes['tensor']}: every device computes all heads"
    )
  table = Table(title="parameters on the mesh", title_justify="left")
  for column in ("parameter", "shape", "split over"):
    table.add_column(column)
  table.add_column("numbers a device", justify="right")
  for x in places:
    spec = (*x.spec, *(None,) * (len(x.shape) - len(x.spec)))
    split = ", ".join(name or "–" for name in spec) if any(spec) else ""
    table.add_row(Text(x.path), str(x.shape), split, f"{x.share(sizes):,}")
  return lines, table


def as_text(lines: list[str], table: Table) -> str:
  """Return the lines and the table of `describe` as plain text."""
  file = io.StringIO()
  Console(file=file, width=120).print(table)
  return "\n".join([*lines, "", file.getvalue()])
