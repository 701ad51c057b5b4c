"""The pictures of runs: learning curves and the attention matrix."""

from __future__ import annotations

from collections.abc import Sequence
import io
import math
import typing
from typing import Any

from etils import epath
import numpy as np

from rebased_jax import atomic
from train import metrics
from train.config import RunConfig

# Imported when a picture is drawn: matplotlib takes a second.
if typing.TYPE_CHECKING:
  from matplotlib.figure import Figure

  from train.records.comparison import Run


def save(drawing: Figure, path: epath.PathLike) -> None:
  """Write a figure as a PNG file, whole or not at all."""
  buffer = io.BytesIO()
  drawing.savefig(buffer, format="png", dpi=150)
  atomic.write_bytes(epath.Path(path), buffer.getvalue())


def learning(
  records: list[dict[str, Any]],
  config: RunConfig,
  path: epath.PathLike,
  title: str,
) -> None:
  """Draw the learning curves of a run, in training and held out.

  Args:
    records: those of metrics.jsonl.
    config: the run.
    path: the PNG to write.
    title: names the run.
  """
  shown = metrics.panels(text=config.data.perplexity)
  drawing, axes = _start(shown, title)
  for panel, axis in zip(shown, axes, strict=True):
    for kind, label in (("train", "training"), ("eval", "held out")):
      marker = "o" if kind == "eval" else None
      axis.plot(
        *_curve(records, kind, panel.name),
        label=label,
        marker=marker,
        markersize=3,
      )
    axis.set_xlabel("step")
    _finish(axis, panel)
    if panel.name == "accuracy" and config.stop_accuracy is not None:
      label = f"{config.stop_accuracy:.0%}, where the run ends"
      axis.axhline(config.stop_accuracy, ls=":", c="gray", label=label)
  _add_legend(drawing, axes[-1])
  save(drawing, path)


def compare(runs: Sequence[Run], path: epath.PathLike) -> None:
  """Draw the learning curves of several runs against the tokens seen.

  Args:
    runs: the runs. Their loss is drawn, unless all of them are of text.
    path: the PNG to write.
  """
  from matplotlib import ticker

  shown = metrics.panels(text=all(run.config.data.perplexity for run in runs))
  title = f"{len(runs)} runs: training (pale) and held out (dots)"
  drawing, axes = _start(shown, title)
  colours = [f"C{i % 10}" for i in range(len(runs))]
  for panel, axis in zip(shown, axes, strict=True):
    for run, colour in zip(runs, colours, strict=True):
      for kind in ("train", "eval"):
        steps, values = _curve(run.records, kind, panel.name)
        tokens = [step * run.tokens_per_step for step in steps]
        style = dict(marker="o") if kind == "eval" else dict(alpha=0.35)
        name = run.name if kind == "eval" else None
        axis.plot(tokens, values, c=colour, label=name, markersize=3, **style)
    axis.set_xlabel("tokens seen")
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    _finish(axis, panel)
  _add_legend(drawing, axes[-1])
  save(drawing, path)


def _start(shown: Sequence[metrics.Panel], title: str) -> tuple[Figure, list]:
  """Return a figure with an empty panel for each of those shown."""
  from matplotlib import figure

  size = (max(4 * len(shown), 6), 3.8)
  drawing = figure.Figure(figsize=size, layout="constrained")
  drawing.suptitle(title, fontsize="medium", parse_math=False)
  return drawing, list(drawing.subplots(1, len(shown), squeeze=False)[0])


def _curve(
  records: list[dict[str, Any]], kind: str, name: str
) -> tuple[list[int], list[float]]:
  """Return the steps and the finite values of a metric."""
  points = [
    (x["step"], x[name])
    for x in records
    if x["kind"] == kind and name in x and math.isfinite(x[name])
  ]
  return [step for step, _ in points], [value for _, value in points]


def _finish(axis: Any, panel: metrics.Panel) -> None:
  from matplotlib import ticker

  axis.set_ylabel(panel.label)
  if panel.log:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
  axis.set_ylim(panel.limits)
  axis.grid(alpha=0.3)


def _add_legend(drawing: Figure, axis: Any) -> None:
  """Put the legend of a panel below all of them, off the curves."""
  handles, labels = axis.get_legend_handles_labels()
  if handles:
    drawing.legend(
      handles, labels, loc="outside lower center", ncols=min(3, len(labels))
    )


def attention(
  A_TT: np.ndarray,
  batch: dict[str, np.ndarray],
  path: epath.PathLike,
  title: str,
) -> None:
  """Draw the normalised attention matrix over an MQAR row (Figure 5).

  Red squares mark where each query should look: at the value that follows its
  key. The convolution before the attention has brought the key there too.

  Args:
    A_TT: the weights, as the mean over heads; rows are queries.
    batch: one row: tokens (1, T), positions (1, M), targets (1, M).
    path: the PNG to write.
    title: names the run, the layer and the row.
  """
  from matplotlib import figure

  tokens_T, positions_M = batch["tokens"][0], batch["positions"][0]
  columns_M = true_columns(tokens_T, positions_M)
  drawing = figure.Figure(figsize=(6, 5), layout="constrained")
  panel = drawing.subplots()
  image = panel.imshow(A_TT, cmap="viridis", vmin=0, vmax=1)
  drawing.colorbar(image, ax=panel, label="attention, mean over heads")
  panel.scatter(
    columns_M,
    positions_M,
    s=60,
    marker="s",
    facecolors="none",
    edgecolors="red",
    label="the value that the query asks for",
  )
  panel.set_xlabel("key position")
  panel.set_ylabel("query position")
  panel.set_title(title, fontsize="medium", parse_math=False)
  _add_legend(drawing, panel)
  save(drawing, path)


def true_columns(tokens_T: np.ndarray, positions_M: np.ndarray) -> np.ndarray:
  """Return the position of the value that answers each query, (M,).

  Args:
    tokens_T: an MQAR row, which begins with M pairs of a key and a value.
    positions_M: the positions of the queries.
  """
  pairs = len(positions_M)
  keys_M = tokens_T[: 2 * pairs : 2]
  index_M = [int(np.flatnonzero(keys_M == tokens_T[p])[0]) for p in positions_M]
  return 2 * np.asarray(index_M) + 1
