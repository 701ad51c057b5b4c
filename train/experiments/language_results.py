"""The table and the plot of Table 2, from the records of its cells alone.

FOLDER/cells/NAME.json    the records
FOLDER/table-2.md         perplexity of each system beside the paper's
FOLDER/table-2.png        perplexity against the tokens so far
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rebased_jax import atomic
from train.experiments import language
from train.records import plots

_Published = Mapping[str, tuple[float, float, float]]
#: Table 2: perplexity of all tokens, of AR ones and of the others.
TABLE_2: _Published = {
  "attention": (16.62, 3.57, 58.57),
  "based": (16.69, 3.72, 57.21),
  "rebased": (16.45, 3.67, 56.31),
}
_SHOWN = language.METRICS[:3]
_TITLES = ("all tokens", "AR tokens", "other tokens")


def write(
  found: Mapping[str, Any],
  name: str,
  folder: Path,
  published: _Published = TABLE_2,
) -> list[Path]:
  """Write the table and the plot.

  Args:
    found: the records by name.
    name: of the files.
    folder: gets the two files.
    published: the paper's perplexities by system.

  Returns:
    The files; none without a record.
  """
  if not found:
    return []
  page, picture = folder / f"{name}.md", folder / f"{name}.png"
  atomic.write_text(
    page, "\n".join([f"# {name}", "", *table(found, published), ""])
  )
  draw(found, picture)
  return [page, picture]


def table(
  found: Mapping[str, Any], published: _Published = TABLE_2
) -> list[str]:
  """Return the lines of a table: a system a row, ours / the paper's.

  Args:
    found: the records by name.
    published: the paper's perplexities by system.
  """
  lines = [
    "| system | parameters | perplexity | on AR tokens | on other tokens | AR "
    "share | seeds | tokens | seconds a run, device |",
    "|" + "---|" * 9,
  ]
  for system, runs in by_system(found).items():
    theirs = published.get(system, ("–",) * 3)
    entries = [
      f"{spread(runs, metric)} / {their}"
      for metric, their in zip(_SHOWN, theirs, strict=True)
    ]
    first = runs[0]
    seconds = np.mean([run["seconds"] for run in runs])
    lines.append(
      f"| {system} | {first['parameters']:,} | {' | '.join(entries)} | "
      f"{first['held_out'][-1]['ar_share']:.1%} | {len(runs)} | "
      f"{first['tokens'] / 1e6:.1f} M | {seconds:.0f}, {first['device']} |"
    )
  return lines


def by_system(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """Return the records of each system, in the order of the systems."""
  runs: dict[str, list[dict[str, Any]]] = {}
  for system in language.SYSTEMS:
    chosen = [x for x in found.values() if x["system"] == system]
    if chosen:
      runs[system] = chosen
  return runs


def spread(runs: list[dict[str, Any]], metric: str) -> str:
  """Return a metric at the end, as mean ± deviation (n − 1) over seeds."""
  values = [run["held_out"][-1][metric] for run in runs]
  if len(values) == 1:
    return f"{values[0]:.2f}"
  return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def draw(found: Mapping[str, Any], path: Path) -> None:
  """Draw held-out perplexity against the tokens so far; a line for each run.

  Args:
    found: the records by name.
    path: the PNG to write.
  """
  from matplotlib import figure, ticker

  drawing = figure.Figure(figsize=(10.5, 3.8), layout="constrained")
  panels = drawing.subplots(1, 3)
  for panel, metric, title in zip(panels, _SHOWN, _TITLES, strict=True):
    for number, (system, runs) in enumerate(by_system(found).items()):
      for index, run in enumerate(runs):
        panel.plot(
          [x["tokens"] / 1e6 for x in run["held_out"]],
          [x[metric] for x in run["held_out"]],
          marker="o",
          markersize=3,
          lw=1,
          color=f"C{number}",
          label=system if index == 0 else None,
        )
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
    panel.set_xlabel("million tokens")
    panel.set_title(title, fontsize="medium")
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("held-out perplexity")
  panels[0].legend(frameon=False)
  plots.save(drawing, path)
