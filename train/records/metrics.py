"""Records of a run: JSON lines always, TensorBoard and wandb on request."""

import json
import math
import time
from typing import Any

import tensorboardX

from train.config import RunConfig
from train.records.run_folder import RunFolder
from train.records.wandb import WandbRun


class Writer:
  """Appends records to metrics.jsonl as they come; a context manager."""

  def __init__(self, config: RunConfig, folder: RunFolder, *, active: bool):
    self._file = folder.metrics_file.open("a") if active else None
    self._board = self._wandb = None
    if active and config.wandb is not None:
      self._wandb = WandbRun(config, folder)
    if active and config.tensorboard:
      self._board = tensorboardX.SummaryWriter(
        str(folder.path / "tensorboard"), flush_secs=10
      )

  def write(self, kind: str, step: int, **values: Any) -> None:
    """One record; its numbers go to the other places as kind/name."""
    if self._file is None:
      return
    record = {"kind": kind, "step": step, **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(f"{kind}/{name}", value, step)
    if self._wandb is not None:
      self._wandb.write(kind, step, values)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_) -> None:
    if self._file is not None:
      self._file.close()
    for other in (self._board, self._wandb):
      if other is not None:
        other.close()


class Window:
  """Means of a run's metrics over the steps since the last record."""

  def __init__(self):
    self._sums: dict[str, float] = {}
    self._steps = self._tokens = 0
    self._wait = 0.0
    self._start = time.perf_counter()

  def add(self, metrics: dict[str, float], tokens: int, wait: float) -> None:
    """One step: its metrics, its input tokens, its seconds spent on data."""
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + value
    self._steps += 1
    self._tokens += tokens
    self._wait += wait

  def pause(self, seconds: float) -> None:
    """Leaves time spent on other things, as evaluation, out of the rates."""
    self._start += seconds

  def flush(self) -> dict[str, float] | None:
    """Means, tokens_per_second, step_time and data_wait; None of no steps.

    The window starts anew.
    """
    if not self._steps:
      return None
    seconds = max(time.perf_counter() - self._start, 1e-9)
    means = {name: x / self._steps for name, x in self._sums.items()}
    rates = dict(
      tokens_per_second=self._tokens / seconds,
      step_time=seconds / self._steps,
      data_wait=self._wait / seconds,
    )
    self.__init__()
    return means | rates


PERPLEXITIES = ("perplexity", "ar_perplexity", "non_ar_perplexity")
LABELS = {  # in tables
  "ar_perplexity": "AR perplexity",
  "non_ar_perplexity": "non-AR perplexity",
  "ar_share": "AR share of targets",
}


def with_perplexity(values: dict[str, float]) -> dict[str, float]:
  """The values, and a perplexity exp(loss) for every loss among them.

  inf where that is beyond floats.
  """
  exp = lambda loss: math.exp(loss) if not loss >= 700 else math.inf
  found = {
    name: exp(values[name.replace("perplexity", "loss")])
    for name in PERPLEXITIES
    if name.replace("perplexity", "loss") in values
  }
  return values | found


def finite(metrics: dict[str, float]) -> bool:
  """Whether every value is a finite number."""
  return all(math.isfinite(value) for value in metrics.values())
