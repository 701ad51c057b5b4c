"""The pictures of a run."""

import io
from typing import Any

from etils import epath
from matplotlib import figure
from matplotlib.figure import Figure
import numpy as np

from train.config import RunConfig


def save(drawing: Figure, path: epath.PathLike) -> None:
  """Writes a PNG whole, or not at all."""
  buffer = io.BytesIO()
  drawing.savefig(buffer, format="png", dpi=150)
  path = epath.Path(path)
  temporary = path.parent / f"{path.name}.tmp"
  temporary.write_bytes(buffer.getvalue())
  temporary.replace(path)


def learning(
  records: list[dict[str, Any]], config: RunConfig, path: epath.PathLike
) -> None:
  """Loss and accuracy against the step, in training and held out."""
  drawing = figure.Figure(figsize=(8, 3.2), layout="constrained")
  panels = drawing.subplots(1, 2)
  for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
    for kind, label in (("train", "training"), ("eval", "held out")):
      points = [(x["step"], x[name]) for x in records if x["kind"] == kind]
      steps, values = zip(*points, strict=True) if points else ((), ())
      marker = "o" if kind == "eval" else None
      panel.plot(steps, values, label=label, marker=marker, markersize=3)
    panel.set_xlabel("step")
    panel.set_ylabel(name)
    panel.grid(alpha=0.3)
  panels[0].set_ylim(bottom=0)
  panels[1].set_ylim(-0.02, 1.02)
  if config.stop_accuracy is not None:
    label = f"{config.stop_accuracy:.0%}"
    panels[1].axhline(config.stop_accuracy, ls=":", c="gray", label=label)
  panels[1].legend(loc="center right")
  save(drawing, path)


def attention(
  A_TT: np.ndarray, batch: dict[str, np.ndarray], path: epath.PathLike
) -> None:
  """The normalised attention matrix over an MQAR row, as in Figure 5.

  A query's true position is the value that follows its key: the convolution
  has brought the key there too.

  Args:
    A_TT: the weights, the mean over heads; rows are queries.
    batch: the row: tokens (1, T), positions (1, N), targets (1, N).
    path: of the PNG.
  """
  tokens_T, positions_N = batch["tokens"][0], batch["positions"][0]
  columns_N = true_columns(tokens_T, positions_N)
  drawing = figure.Figure(figsize=(6, 5), layout="constrained")
  panel = drawing.subplots()
  image = panel.imshow(A_TT, cmap="viridis", vmin=0, vmax=1)
  drawing.colorbar(image, ax=panel, label="attention, mean over heads")
  panel.scatter(
    columns_N,
    positions_N,
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


def true_columns(tokens_T: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
  """The position of the value that answers each query."""
  pairs = len(positions_N)
  keys_N = tokens_T[: 2 * pairs : 2]
  index_N = [int(np.flatnonzero(keys_N == tokens_T[p])[0]) for p in positions_N]
  return 2 * np.asarray(index_N) + 1
