"""Write metrics as JSON lines, and to TensorBoard and wandb on request."""

from collections.abc import Mapping
import contextlib
import json
import time
from types import TracebackType
from typing import Any, Self

from train.config import RunConfig
from train.records.run_folder import RunFolder
from train.records.tensorboard import Board
from train.records.wandb import WandbRun

_FLUSH_EVERY = 10.0  # seconds, for those who watch TensorBoard


class MetricsWriter:
  """Append records to metrics.jsonl as they come; a context manager.

  Args:
    config: the run, which says where else the records go.
    folder: the run's folder.
    active: whether this process writes. One process of a run does.
    start: the step that the run starts from. Records that a killed run left at
      TensorBoard, and that are not in metrics.jsonl any more, are hidden there.

  Attributes:
    exit_code: that of the process, for wandb: 0 for a finished run, 128 + its
      number after a signal. An error in the context counts as 1.
  """

  def __init__(
    self, config: RunConfig, folder: RunFolder, *, active: bool, start: int = 0
  ):
    self.exit_code = 0
    self._flushed = time.monotonic()
    self._file = self._board = self._wandb = None
    if active and config.wandb is not None:
      self._wandb = WandbRun(config, folder)  # may refuse, with nothing open
    if active and config.tensorboard:
      self._board = Board(folder.path / "tensorboard", start)
      for record in folder.read_metrics():
        if record["step"] == start:
          self._to_board(**record)
    if active:
      self._file = folder.append_to_metrics()

  def write(self, kind: str, step: int, **values: Any) -> None:
    """Write one record.

    Args:
      kind: "train" or "eval". TensorBoard and wandb show `kind/name`.
      step: updates of the parameters that are done.
      **values: the metrics.
    """
    if self._file is None:
      return
    record = {"kind": kind, "step": step, **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    if self._board is not None:
      self._to_board(kind, step, **values)
      if time.monotonic() - self._flushed > _FLUSH_EVERY:
        self.flush()
    if self._wandb is not None:
      self._wandb.write(kind, step, values)

  def _to_board(self, kind: str, step: int, **values: float) -> None:
    assert self._board is not None
    named = {f"{kind}/{name}": value for name, value in values.items()}
    self._board.write(step, named)

  def flush(self) -> None:
    """Write what is buffered; call it before a save, so that it is not lost."""
    if self._board is not None:
      self._board.flush()
      self._flushed = time.monotonic()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    code = self.exit_code if kind is None else 1
    with contextlib.ExitStack() as open_ones:
      for file in (self._file, self._board):
        if file is not None:
          open_ones.callback(file.close)
      if self._wandb is not None:
        open_ones.callback(self._wandb.close, code)


class Window:
  """The means of a run's metrics over the steps since the last record.

  Args:
    state: that of a window to continue, as `state` returned it. None: a new
      window.
  """

  def __init__(self, state: Mapping[str, Any] | None = None) -> None:
    self._restart()
    if state is not None:
      self._sums, self._steps = dict(state["sums"]), state["steps"]
      self._tokens, self._wait = state["tokens"], state["wait"]
      self._start -= state["seconds"]

  def state(self) -> dict[str, Any]:
    """Return the open window as JSON data, from which another continues."""
    return dict(
      sums=dict(self._sums),
      steps=self._steps,
      tokens=self._tokens,
      wait=self._wait,
      seconds=time.perf_counter() - self._start,
    )

  def _restart(self) -> None:
    self._sums: dict[str, float] = {}
    self._steps = self._tokens = 0
    self._wait = 0.0
    self._start = time.perf_counter()

  def add(self, metrics: dict[str, float], tokens: int, wait: float) -> None:
    """Add one step.

    Args:
      metrics: the metrics of the step.
      tokens: its input tokens.
      wait: seconds that the step waited for its batch.
    """
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + value
    self._steps += 1
    self._tokens += tokens
    self._wait += wait

  def pause(self, seconds: float) -> None:
    """Leave seconds spent on evaluation or saving out of the rates."""
    self._start += seconds

  def flush(self) -> dict[str, float] | None:
    """Return the means and start a new window; None if there was no step.

    Beside the metrics: tokens_per_second, step_seconds, and
    data_wait_fraction, the share of the time spent waiting for batches.
    """
    if not self._steps:
      return None
    seconds = max(time.perf_counter() - self._start, 1e-9)
    means = {name: x / self._steps for name, x in self._sums.items()}
    rates = dict(
      tokens_per_second=self._tokens / seconds,
      step_seconds=seconds / self._steps,
      data_wait_fraction=self._wait / seconds,
    )
    self._restart()
    return means | rates
