"""The pictures of a run: its learning curves and its attention matrix."""

from __future__ import annotations

import io
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


def save(drawing: Figure, path: epath.PathLike) -> None:
  """Write a figure as a PNG file, whole or not at all."""
  buffer = io.BytesIO()
  drawing.savefig(buffer, format="png", dpi=150)
  atomic.write_bytes(epath.Path(path), buffer.getvalue())


def learning(
  records: list[dict[str, Any]], config: RunConfig, path: epath.PathLike
) -> None:
  """Draw the plotted metrics against the step, in training and held out.

  Args:
    records: those of metrics.jsonl.
    config: the run.
    path: the PNG to write.
  """
  from matplotlib import figure

  shown = metrics.plotted()
  drawing = figure.Figure(figsize=(4 * len(shown), 3.2), layout="constrained")
  panels = drawing.subplots(1, len(shown), squeeze=False)[0]
  for panel, metric in zip(panels, shown, strict=True):
    name = metric.name
    for kind, label in (("train", "training"), ("eval", "held out")):
      points = [
        (x["step"], x[name]) for x in records if x["kind"] == kind and name in x
      ]
      steps, values = zip(*points, strict=True) if points else ((), ())
      marker = "o" if kind == "eval" else None
      panel.plot(steps, values, label=label, marker=marker, markersize=3)
    panel.set_xlabel("step")
    panel.set_ylabel(metric.label or name)
    panel.set_ylim(metric.plot)
    panel.grid(alpha=0.3)
    if name == "accuracy" and config.stop_accuracy is not None:
      label = f"{config.stop_accuracy:.0%}"
      panel.axhline(config.stop_accuracy, ls=":", c="gray", label=label)
  panels[-1].legend(loc="center right")
  save(drawing, path)


def attention(
  A_TT: np.ndarray, batch: dict[str, np.ndarray], path: epath.PathLike
) -> None:
  """Draw the normalised attention matrix over an MQAR row (Figure 5).

  Red squares mark where each query should look: at the value that follows its
  key. The convolution before the attention has brought the key there too.

  Args:
    A_TT: the weights, as the mean over heads; rows are queries.
    batch: one row: tokens (1, T), positions (1, M), targets (1, M).
    path: the PNG to write.
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
    label="true positions",
  )
  panel.set_xlabel("key position")
  panel.set_ylabel("query position")
  panel.legend(loc="upper right")
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
