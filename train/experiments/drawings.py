"""Pictures of the page of results, drawn from the records of cells alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.experiments import (
  attention_figures,
  language,
  language_results,
  paper,
  record as records,
  results,
)
from train.records import plots

_GREEK = {"gamma": "γ", "beta": "β"}


def write(folder: Path, pictures: Path) -> list[Path]:
  """Draw every figure that has records.

  Args:
    folder: holds `cells/`.
    pictures: the folder of the PNG files.

  Returns:
    The files.
  """
  experiments = paper.make_experiments()
  every, paths = {}, []
  pictures.mkdir(parents=True, exist_ok=True)
  for name, experiment in experiments.items():
    found = results.read_cells(experiment, folder / "cells")
    every |= found
    if found and name != "table-3":  # whose cells have one width
      paths.append(pictures / f"{name}.png")
      results.draw(experiment, found, paths[-1])
  ablation = {
    name: record
    for name, record in every.items()
    if name in experiments["table-1"].cells
    and len(records.accuracy_by_rate(record)) > 1
  }
  if ablation:
    paths.append(pictures / "figure-4.png")
    _draw_figure_4(ablation, paths[-1])
  affine = {name: x for name, x in every.items() if has_affine(x)}
  if affine:
    paths.append(pictures / "figure-10.png")
    _draw_figure_10(affine, paths[-1])
  paths += attention_figures.write(every, pictures)
  texts = language.read_cells(folder / "cells")
  if texts:
    paths.append(pictures / "table-2.png")
    language_results.draw(texts, paths[-1])
  paths.append(pictures / "figure-2.png")
  _draw_figure_2(paths[-1])
  return paths


def has_affine(record: Mapping[str, Any]) -> bool:
  """Whether a record has γ or β of each epoch."""
  return any("affine" in run for run in record["runs"])


def moments(
  run: Mapping[str, Any], side: str, letter: str
) -> tuple[list[float], list[float]] | None:
  """Return mean and standard deviation of γ or β after each epoch.

  Args:
    run: one run of a record.
    side: "query" or "key".
    letter: "gamma" or "beta".

  Returns:
    The moments in the last layer that has them; None if the model has none.
  """
  ending = f".{side}_affine.{letter}"
  names = [name for name in run["affine"] if name.endswith(ending)]
  if not names:
    return None
  found = run["affine"][max(names)]
  return found["mean"], found["std"]


def _draw_figure_2(path: Path) -> None:
  """Draw similarity as a function of q·k / √F."""
  from matplotlib import figure

  s = np.linspace(-3, 3, 301)
  drawing = figure.Figure(figsize=(5.4, 3.6), layout="constrained")
  panel = drawing.subplots()
  curves = {
    "softmax: eˢ": np.exp(s),
    "Based: 1 + s + s²/2": 1 + s + s**2 / 2,
    "ReBased: s²": s**2,
  }
  for label, values in curves.items():
    panel.plot(s, values, label=label)
  panel.set_xlabel("s = q·k / √F")
  panel.set_ylabel("similarity, not normalised")
  panel.set_ylim(-0.3, 9)
  panel.grid(alpha=0.3)
  panel.legend(frameon=False)
  plots.save(drawing, path)


def _draw_figure_4(found: Mapping[str, Any], path: Path) -> None:
  """Draw the expected best accuracy against the number of tried rates."""
  from matplotlib import figure

  places = {name: results.place(name) for name in found}
  grid = sorted({(x.length, x.width) for x in places.values()})
  size = 3.2 * len(grid) + 1.6, 3.4
  drawing = figure.Figure(figsize=size, layout="constrained")
  panels = drawing.subplots(1, len(grid), squeeze=False, sharey=True)[0]
  for panel, (length, width) in zip(panels, grid, strict=True):
    for name, record in found.items():
      if (places[name].length, places[name].width) != (length, width):
        continue
      rates = records.accuracy_by_rate(record)
      expected = results.expected_best([np.mean(x) for x in rates.values()])
      variant = places[name].system.removeprefix("ablation-")
      color = f"C{list(paper.VARIANT_LABELS).index(variant)}"
      label = paper.VARIANT_LABELS[variant]
      counts = range(1, len(expected) + 1)
      panel.plot(counts, expected, marker="o", color=color, label=label)
    panel.set_title(f"{length} tokens, width {width}")
    panel.set_xlabel("tried learning rates")
    panel.set_ylim(0, 1.02)
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("expected accuracy of the best")
  panels[-1].legend(frameon=False, loc="lower right")
  plots.save(drawing, path)


def _draw_figure_10(found: Mapping[str, Any], path: Path) -> None:
  """Draw mean and deviation of γ and β against the epoch."""
  from matplotlib import figure

  drawing = figure.Figure(figsize=(8.4, 6.0), layout="constrained")
  panels = drawing.subplots(2, 2, sharex=True)
  for row, letter in zip(panels, _GREEK, strict=True):
    for panel, side in zip(row, ("query", "key"), strict=True):
      for number, (name, record) in enumerate(found.items()):
        values = moments(records.shown_run(record), side, letter)
        if values is None:
          continue
        mean, std = np.asarray(values[0], float), np.asarray(values[1], float)
        epochs = np.arange(1, len(mean) + 1)
        color = f"C{number % 10}"
        panel.plot(epochs, mean, color=color, label=name)
        panel.fill_between(
          epochs, mean - std, mean + std, color=color, alpha=0.15, lw=0
        )
      panel.set_title(f"{_GREEK[letter]} of the {side}")
      panel.grid(alpha=0.3)
  for panel in panels[-1]:
    panel.set_xlabel("epoch")
  handles, labels = panels[0][0].get_legend_handles_labels()
  drawing.legend(
    handles,
    labels,
    loc="outside lower center",
    ncols=3,
    frameon=False,
    fontsize="small",
  )
  plots.save(drawing, path)
