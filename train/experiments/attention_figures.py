"""Figures 5, 8 and 9 of the paper: attention on the right tokens.

They are drawn from the records of cells of Table 3, which hold the weights of
the query rows over the columns of the pairs, on a few examples.

figure-5.png   the first example, one panel a model
figure-8.png   the other examples
figure-9.png   noise: how much weight the k-th largest wrong token has
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np

from train.records import plots


class QueryWeights(NamedTuple):
  """The weights of all shown queries of a cell."""

  right_Q: np.ndarray  # of the right token
  wrong_QS: np.ndarray  # of the other 2 N − 1 tokens, the largest first


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
  """Draw the figures, if a record has attention weights.

  Args:
    found: records by the name of the cell.
    folder: gets the PNG files.

  Returns:
    The files; none if no record has weights.
  """
  shown = _with_weights(found)
  if not shown:
    return []
  count = min(len(x["attention"]["weights"]) for x in shown.values())
  paths = [folder / f"figure-{number}.png" for number in (5, 8, 9)]
  _draw_matrices(shown, range(1), paths[0])
  _draw_matrices(shown, range(1, count), paths[1])
  _draw_noise(shown, paths[2])
  return paths


def wrong_weights(found: Mapping[str, Any]) -> dict[str, QueryWeights]:
  """Return the weights of right and wrong tokens, by the name of the cell.

  Args:
    found: records by the name of the cell. Those without weights are left out.
  """
  result = {}
  for name, record in _with_weights(found).items():
    A_XNS, right_XN = _arrays(record)
    A_QS = A_XNS.reshape(-1, A_XNS.shape[-1])
    is_right_QS = np.arange(A_QS.shape[-1]) == right_XN.reshape(-1, 1)
    wrong_QS = A_QS[~is_right_QS].reshape(len(A_QS), -1)
    result[name] = QueryWeights(
      A_QS[is_right_QS], np.sort(wrong_QS, axis=-1)[:, ::-1]
    )
  return result


def _with_weights(found: Mapping[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in found.items() if "attention" in x}


def _arrays(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Return the weights (X, N, 2 N) and the right columns (X, N) of a record."""
  found = record["attention"]
  # None stands for a number that was not finite.
  return np.asarray(found["weights"], float), np.asarray(found["right_columns"])


def _draw_matrices(
  shown: Mapping[str, Any], examples: Sequence[int], path: Path
) -> None:
  """Draw the matrices of examples: a row for each, a column for each model."""
  from matplotlib import colors, figure, ticker

  size = 4.2 * len(shown) + 1.0, 2.6 * len(examples) + 0.4
  drawing = figure.Figure(figsize=size, layout="constrained")
  panels = drawing.subplots(len(examples), len(shown), squeeze=False)
  for column, (name, record) in enumerate(shown.items()):
    A_XNS, right_XN = _arrays(record)
    for row, example in enumerate(examples):
      panel = panels[row, column]
      # In the order of the keys the right tokens are on a line.
      order_N = np.argsort(right_XN[example])
      image = panel.imshow(
        A_XNS[example][order_N],
        # The root shows the weak weights too.
        norm=colors.PowerNorm(0.5, vmin=0, vmax=1),
        cmap="viridis",
        aspect="auto",
      )
      panel.scatter(
        right_XN[example][order_N],
        np.arange(len(order_N)),
        s=14,
        marker="s",
        facecolors="none",
        edgecolors="red",
        linewidths=0.6,
      )
      panel.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
      if row == 0:
        panel.set_title(_label(name), parse_math=False)
      if row == len(examples) - 1:
        panel.set_xlabel("token of the pairs")
      if column == 0:
        panel.set_ylabel("query, by its key")
  drawing.colorbar(image, ax=panels, label="weight, mean over heads")
  plots.save(drawing, path)


def _draw_noise(shown: Mapping[str, Any], path: Path) -> None:
  """Draw the k-th largest weight of a wrong token, as the mean over queries."""
  from matplotlib import figure

  drawing = figure.Figure(figsize=(6.4, 4.0), layout="constrained")
  panel = drawing.subplots()
  for number, (name, found) in enumerate(wrong_weights(shown).items()):
    mean_S = found.wrong_QS.mean(axis=0)
    places = np.arange(1, len(mean_S) + 1)
    color = f"C{number}"
    panel.plot(places, mean_S, color=color, label=_label(name))
    panel.axhline(found.right_Q.mean(), color=color, ls="--", lw=1)
  panel.set_yscale("log")
  panel.set_ylim(1e-5, 1.5)
  panel.set_xlabel("wrong tokens of the pairs, the largest weight first")
  panel.set_ylabel("weight, mean over queries")
  panel.set_title("noise; dashed: the right token", fontsize="medium")
  panel.grid(alpha=0.3)
  panel.legend(frameon=False)
  plots.save(drawing, path)


def _label(name: str) -> str:
  """Return the system in the name of a cell, "…iou-SYSTEM-L128-d48"."""
  return re.sub(r"^.*iou-|-L\d+-d\d+$", "", name)
