"""Tables and figures of experiments, drawn from the records of cells alone.

FOLDER/cells/NAME.json    the records
FOLDER/EXPERIMENT.md      ours beside the paper's, cell by cell
FOLDER/EXPERIMENT.png     the same as a plot
FOLDER/figure-5.png …     attention, where the records have it
"""

from collections.abc import Mapping
from math import comb
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np

from rebased_jax import atomic
from train.experiments import attention_figures, record as records
from train.experiments.paper import Experiment
from train.records import plots


class Place(NamedTuple):
  """The system, length and width in the name of a cell."""

  system: str
  length: int
  width: int


def place(name: str) -> Place:
  """Return what the name of a cell says.

  Args:
    name: "SYSTEM-L128-d64".
  """
  found = re.fullmatch(r"(.+)-L(\d+)-d(\d+)", name)
  assert found is not None, name
  return Place(found[1], int(found[2]), int(found[3]))


def read_cells(experiment: Experiment, folder: Path) -> dict[str, Any]:
  """Return the records of the finished cells of an experiment, by name.

  Args:
    experiment: the experiment.
    folder: holds `NAME.json` for each finished cell.

  Raises:
    RecordError: a file cannot be read, or is of another cell of this name.
  """
  found = {}
  for name, cell in experiment.cells.items():
    path = folder / f"{name}.json"
    if path.exists():
      found[name] = records.read_of(path, cell)
  return found


def table(experiment: Experiment, found: Mapping[str, Any]) -> str:
  """Return the results as a page in Markdown.

  Args:
    experiment: the experiment.
    found: its records, by the name of the cell.
  """
  lines = [
    f"# {experiment.name} of arXiv 2402.10644",
    "",
    experiment.statement,
    "",
    f"{len(found)} of {len(experiment.cells)} cells were run. Accuracy is of "
    "the 3,000 held-out rows at the best epoch, at the learning rate with the "
    "best mean over seeds, ± the standard deviation over seeds.",
    "",
    *rows(experiment, found),
  ]
  return "\n".join(lines) + "\n"


def rows(
  experiment: Experiment, found: Mapping[str, Any], *, only_run: bool = False
) -> list[str]:
  """Return the lines of a table of ours beside the paper's, cell by cell.

  Args:
    experiment: the experiment.
    found: its records, by the name of the cell.
    only_run: leave out cells without a record.
  """
  lines = [
    "| cell | paper | ours | seeds | rates | epochs | seconds, device |",
    "|---|---|---|---|---|---|---|",
  ]
  for name in found if only_run else experiment.cells:
    published = experiment.published.get(name)
    theirs = "" if published is None else str(published)
    lines.append(f"| {name} | {theirs} | {ours(found.get(name))} |")
  return lines


def rule(columns: int) -> str:
  """Return the line of a Markdown table below its head."""
  return "|" + "---|" * columns


def grid(experiment: Experiment, found: Mapping[str, Any]) -> list[str]:
  """Return the lines of a table of systems by width: ours / the paper's.

  A dash stands for a cell that was not run, or that the paper does not have.
  The last column is the mean over widths, where all of them are there.

  Args:
    experiment: the experiment.
    found: its records, by the name of the cell.
  """
  names = {**experiment.cells, **experiment.published}
  widths = sorted({place(name).width for name in names})
  rows = dict.fromkeys(
    (place(name).length, place(name).system) for name in names
  )
  lines = [
    "| tokens | system | "
    + "".join(f"width {x} | " for x in widths)
    + "mean |",
    rule(len(widths) + 3),
  ]
  for length, system in sorted(rows, key=lambda row: row[0]):
    mine, theirs, entries = [], [], []
    for width in widths:
      name = f"{system}-L{length}-d{width}"
      best = records.best_rate(found[name]) if name in found else None
      published = experiment.published.get(name)
      mine.append(None if best is None else best["mean"])
      theirs.append(None if published is None else published.mean)
      left = "–" if best is None else f"{best['mean']:.2f} ± {best['std']:.2f}"
      entries.append(f"{left} / {'–' if published is None else published}")
    entries.append(f"{_mean_of_all(mine)} / {_mean_of_all(theirs)}")
    shown = system.removeprefix("ablation-")
    lines.append(f"| {length} | {shown} | {' | '.join(entries)} |")
  return lines


def _mean_of_all(values: list[float | None]) -> str:
  """Return the mean; a dash if one value is missing."""
  known = [value for value in values if value is not None]
  if len(known) < len(values):
    return "–"
  return f"{np.mean(known):.2f}"


def draw(experiment: Experiment, found: Mapping[str, Any], path: Path) -> None:
  """Draw accuracy by width, a panel for each length; the paper's is dashed.

  Args:
    experiment: the experiment.
    found: its records, by the name of the cell.
    path: the PNG to write.
  """
  from matplotlib import figure

  lengths = sorted({place(name).length for name in experiment.cells})
  systems = list(dict.fromkeys(place(name).system for name in experiment.cells))
  size = max(6.4, 3.0 * len(lengths)), 4.0
  drawing = figure.Figure(figsize=size, layout="constrained")
  panels = drawing.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
  for panel, length in zip(panels, lengths, strict=True):
    for number, system in enumerate(systems):
      _draw_system(panel, experiment, found, system, length, f"C{number}")
    widths = _widths(experiment, length)
    panel.set_xticks(range(len(widths)), [str(width) for width in widths])
    panel.set_title(f"{length} tokens")
    panel.set_xlabel("width")
    panel.set_ylim(0, 1.02)
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("held-out accuracy, best epoch")
  drawing.legend(
    *_legend(systems), loc="outside lower center", ncols=4, frameon=False
  )
  drawing.suptitle(f"{experiment.name}: ours, and the paper's dashed")
  plots.save(drawing, path)


def expected_best(values: list[float]) -> list[float]:
  """Return the expected best of n tried learning rates, for n = 1 … M.

  Figure 4 shows this number. It is the V-statistic of Dodge et al. 2019, of
  draws with replacement:

      E_n = Σ_i v_(i) ((i/M)ⁿ − ((i − 1)/M)ⁿ)      v_(1) ≤ … ≤ v_(M)

  Args:
    values: the accuracy at each learning rate, as the mean over seeds.
  """
  v_M = np.sort(np.asarray(values))
  M = len(v_M)
  i_M = np.arange(1, M + 1)
  return [
    float((v_M * ((i_M / M) ** n - ((i_M - 1) / M) ** n)).sum())
    for n in range(1, M + 1)
  ]


def expected_best_unbiased(values: list[float]) -> list[float]:
  """Return what `expected_best` does, for draws without replacement.

  It is the U-statistic of Dodge et al. 2021:

      E_n = Σ_{i ≥ n} v_(i) C(i − 1, n − 1) / C(M, n)

  Args:
    values: the accuracy at each learning rate, as the mean over seeds.
  """
  ordered = sorted(values)
  M = len(ordered)
  return [
    sum(
      ordered[i - 1] * comb(i - 1, n - 1) / comb(M, n) for i in range(n, M + 1)
    )
    for n in range(1, M + 1)
  ]


def write(experiment: Experiment, folder: Path) -> list[Path]:
  """Write the page and the plots of an experiment.

  Args:
    experiment: the experiment.
    folder: holds `cells/`, and gets the files.

  Returns:
    The files.

  Raises:
    RecordError: a record cannot be read, or is of another cell.
  """
  found = read_cells(experiment, folder / "cells")
  figures = attention_figures.write(found, folder)
  page = folder / f"{experiment.name}.md"
  picture = folder / f"{experiment.name}.png"
  atomic.write_text(page, table(experiment, found))
  draw(experiment, found, picture)
  return [page, picture, *figures]


def ours(record: dict[str, Any] | None) -> str:
  """Return our columns of a row of the table; empty ones of no record.

  Args:
    record: of the cell. None: it was not run.
  """
  if record is None:
    return "not run | | | |"
  best = records.best_rate(record)
  spread = f" ± {best['std']:.4f}" if best["seeds"] > 1 else ""
  done, planned = record["epochs_done"], record["epochs_planned"]
  rates = _rates(record, best["learning_rate"])
  cut = sum(records.is_cut(record, run) for run in record["runs"])
  ended = f", {cut} of {len(record['runs'])} runs cut short" if cut else ""
  return (
    f"{best['mean']:.4f}{spread} | {best['seeds']} | {rates} | "
    f"{done} of {planned}{ended} | {record['seconds']:.0f}, {record['device']}"
  )


def _rates(record: dict[str, Any], best: float) -> str:
  """Return the learning rates that were tried, the best in bold."""
  tried = sorted(records.accuracy_by_rate(record))
  return ", ".join(
    f"**{rate:g}**" if rate == best else f"{rate:g}" for rate in tried
  )


def _draw_system(panel, experiment, found, system, length, color) -> None:
  """Draw one system in the panel of one length."""
  # The widths stand side by side at equal distances.
  where = {width: x for x, width in enumerate(_widths(experiment, length))}
  mine, theirs = [], []
  for name in {**experiment.cells, **experiment.published}:
    cell = place(name)
    if (cell.system, cell.length) != (system, length):
      continue
    x = where[cell.width]
    if name in found:
      best = records.best_rate(found[name])
      mine.append((x, best["mean"], best["std"]))
    if name in experiment.published:
      theirs.append((x, experiment.published[name].mean))
  if theirs:
    panel.plot(
      *zip(*sorted(theirs), strict=True), ls="--", lw=1, alpha=0.6, color=color
    )
  if mine:
    xs, means, stds = zip(*sorted(mine), strict=True)
    panel.errorbar(xs, means, stds, marker="o", capsize=3, color=color)


def _widths(experiment: Experiment, length: int) -> list[int]:
  """Return the widths at a length, of our cells and of the paper's."""
  places = map(place, {**experiment.cells, **experiment.published})
  return sorted({cell.width for cell in places if cell.length == length})


def _legend(systems: list[str]):
  """Return handles and labels: one color for each system."""
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], marker="o", color=f"C{number}")
    for number in range(len(systems))
  ]
  return handles, [system.removeprefix("ablation-") for system in systems]
