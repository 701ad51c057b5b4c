"""The table and the plot of a user's own sweep, from its records alone.

FOLDER/cells/NAME.json    the records, one a width
FOLDER/sweep.md           accuracy by width and learning rate
FOLDER/sweep.png          the same as a plot
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rebased_jax import atomic
from train.experiments import record as records
from train.records import plots


def write(preset: str, found: Mapping[str, Any], folder: Path) -> list[Path]:
  """Write the table and the plot of a sweep.

  Args:
    preset: the name of the preset.
    found: the records by name, in the order of the table.
    folder: gets the two files.

  Returns:
    The files.
  """
  page, picture = folder / "sweep.md", folder / "sweep.png"
  atomic.write_text(page, table(preset, found))
  _draw(preset, found, picture)
  return [page, picture]


def table(preset: str, found: Mapping[str, Any]) -> str:
  """Return the results as a page in Markdown.

  Args:
    preset: the name of the preset.
    found: the records by name.
  """
  lines = [
    f"# Sweep of {preset}",
    "",
    "Accuracy is of the held-out rows at the best epoch: the mean over seeds, "
    "± the standard deviation (n − 1). The best rate of a width is in bold. "
    "An epoch of unlimited data is the steps between two evaluations.",
    "",
    "| width | rate | accuracy | seeds | epochs | not finite | time, device |",
    "|---|---|---|---|---|---|---|",
  ]
  for record in found.values():
    best = records.best_rate(record)["learning_rate"]
    for rate, values in sorted(records.accuracy_by_rate(record).items()):
      runs = [x for x in record["runs"] if x["learning_rate"] == rate]
      shown = f"**{rate:g}**" if rate == best else f"{rate:g}"
      epochs = max(run["epochs"] for run in runs)
      bad = sum(not run["finite"] for run in runs)
      lines.append(
        f"| {_width(record)} | {shown} | {_mean(values)} | {len(values)} | "
        f"{epochs} of {record['epochs_planned']} | {bad} | "
        f"{record['seconds']:.0f} s a width, {record['device']} |"
      )
  return "\n".join(lines) + "\n"


def _draw(preset: str, found: Mapping[str, Any], path: Path) -> None:
  """Draw accuracy against the learning rate, a line for each width."""
  from matplotlib import figure

  drawing = figure.Figure(figsize=(6.4, 4.0), layout="constrained")
  panel = drawing.subplots()
  for record in found.values():
    rates = sorted(records.accuracy_by_rate(record).items())
    panel.errorbar(
      [rate for rate, _ in rates],
      [np.mean(values) for _, values in rates],
      [np.std(values, ddof=1) if len(values) > 1 else 0 for _, values in rates],
      marker="o",
      capsize=3,
      label=f"width {_width(record)}",
    )
  panel.set_xscale("log")
  panel.set_xlabel("learning rate")
  panel.set_ylabel("held-out accuracy, best epoch")
  panel.set_ylim(0, 1.02)
  panel.grid(alpha=0.3)
  panel.legend(frameon=False)
  panel.set_title(preset)
  plots.save(drawing, path)


def _width(record: Mapping[str, Any]) -> int:
  return record["run"]["model"]["width"]


def _mean(values: list[float]) -> str:
  if len(values) == 1:
    return f"{values[0]:.4f}"
  return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
