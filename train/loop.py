"""The training loop: data, steps, evaluation, checkpoints; no mathematics.

Metrics of a step are read after the next one is dispatched, so the device does
not wait for the host. The state is saved only when its metrics are known to be
finite.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from train import build as build_lib, evaluate, metrics as metrics_lib, sharding
from train.build import Built
from train.checkpoint import (
  CheckpointError,
  Checkpoints,
  NoCheckpointError,
  restore_params,
)
from train.config import (
  RunConfig,
  differences,
  fingerprint,
  from_dict,
  to_dict,
)
from train.console import Display
from train.data import batches as batches_lib
from train.preempt import Preemption
from train.run_folder import RunFolder, RunFolderError


class TrainingFailed(RuntimeError):
  """The run cannot go on; the message says why and what was kept."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a call of `train` ended."""

  step: int
  reason: str  # "finished", "accuracy" or "signal"
  exit_code: int
  held_out: dict[str, float]
  seconds: float  # of training in this process
  state: Any


class Loop:
  """One process's part of a run, between its parts' contexts."""

  def __init__(
    self,
    config: RunConfig,
    folder: RunFolder,
    built: Built,
    checkpoints: Checkpoints,
    writer: metrics_lib.Writer,
  ):
    self.config, self.folder, self.built = config, folder, built
    self.checkpoints, self.writer = checkpoints, writer
    self.train_data = config.data.train_batches(config.batch, config.seed)
    self.eval_data = config.data.eval_batches(config.batch, config.seed)
    self.window = metrics_lib.Window()
    self.display: Display | None = None
    self.pending: tuple[int, Any, float] | None = None
    self.held_out: dict[str, float] = {}

  def meta(self, finished: str | None) -> dict[str, Any]:
    return dict(
      config=to_dict(self.config),
      config_hash=fingerprint(self.config),
      data=self.train_data.fingerprint,
      jax=jax.__version__,
      finished=finished,
      held_out=self.held_out,
    )

  def run(self, state: Any, start: int, display: Display, stop: Preemption):
    """Trains from step `start`; (state, step, reason)."""
    config, self.display = self.config, display
    rows = sharding.local_rows(config.batch)
    data = batches_lib.iterate(
      self.train_data, start=start, stop=config.steps, rows=rows
    )
    step, reason = start, None if start < config.steps else "finished"
    with data:
      while reason is None:
        before = time.perf_counter()
        batch = sharding.put_batch(next(data), self.built.mesh)
        wait = time.perf_counter() - before
        state, metrics = self.built.train_step(state, batch, self.built.key)
        self.settle(state)
        self.pending, step = (step, metrics, wait), step + 1
        reason = self.after(state, step, stop)
    self.settle(state)
    self.record(step)  # of a window that a stop cut short
    return state, step, reason

  def after(self, state: Any, step: int, stop: Preemption) -> str | None:
    """Evaluates and saves where it is due; a reason ends the loop."""
    config = self.config
    last = step == config.steps
    reason = "finished" if last else None
    if step % config.eval_every == 0 or last:
      accuracy = self.evaluate(state, step)["accuracy"]
      if config.stop_accuracy is not None and accuracy > config.stop_accuracy:
        reason = "accuracy"
    if reason is None and stop.requested:
      reason = "signal"
    if reason is not None or step % config.save_every == 0:
      self.settle(state)
      finished = None if reason == "signal" else reason
      self.save(state, step, finished)
    return reason

  def save(self, state: Any, step: int, finished: str | None) -> None:
    before = time.perf_counter()
    self.checkpoints.save(step, build_lib.to_dicts(state), self.meta(finished))
    self.window.pause(time.perf_counter() - before)

  def evaluate(self, state: Any, step: int) -> dict[str, float]:
    """Held-out loss and accuracy, recorded."""
    self.settle(state)
    before = time.perf_counter()
    self.held_out = evaluate.evaluate(
      self.built, state["params"], self.eval_data
    )
    self.writer.write("eval", step, **self.held_out)
    self.display.evaluated(step, self.held_out)
    self.window.pause(time.perf_counter() - before)
    return self.held_out

  def settle(self, state: Any) -> None:
    """Reads the metrics of the step before; fails where they are not finite."""
    if self.pending is None:
      return
    (step, metrics, wait), self.pending = self.pending, None
    values = {name: float(x) for name, x in metrics.items()}
    if not metrics_lib.finite(values):
      raise TrainingFailed(self.dump(state, step, values))
    tokens = self.config.batch * self.train_data.length
    self.window.add(values, tokens, wait)
    done, due = step + 1, (step + 1) % self.config.log_every == 0
    self.display.step(done, self.record(done) if due else None)

  def record(self, step: int) -> dict[str, float] | None:
    """Writes the means since the last record, if there are any."""
    means = self.window.flush()
    if means is not None:
      self.writer.write("train", step, **means)
    return means

  def dump(self, state: Any, step: int, values: dict[str, float]) -> str:
    """Keeps the state before a step that failed, its batch and its metrics."""
    folder = RunFolder(self.folder.path / f"failed-step-{step}")
    shown = ", ".join(f"{name}={x:.4g}" for name, x in values.items())
    message = f"step {step} is not finite: {shown}"
    if jax.process_index() == 0:
      folder.path.mkdir(parents=True, exist_ok=True)
      batch = self.train_data.read(step)
      with (folder.path / "batch.npz").open("wb") as file:
        np.savez(file, **batch)
      folder.write("reason.txt", message + "\n")
    with Checkpoints(folder.checkpoints) as kept:
      if kept.latest() is None:  # else a resume has come to the same step
        kept.save(step, build_lib.to_dicts(state), self.meta(None))
    return f"{message}; the state before it and its batch are in {folder.path}"


def source_weights(config: RunConfig, built: Built) -> tuple[Any, str]:
  """The parameters of the run `init_from`, and a note of where they are from.

  Raises:
    RunFolderError: it is no run, has no checkpoint, or another model's.
  """
  source = RunFolder(config.init_from)
  source.read_config()
  target = build_lib.to_dicts(built.abstract)["params"]
  try:
    step, params = restore_params(source.checkpoints, target)
  except CheckpointError as error:
    raise RunFolderError(f"init_from={config.init_from}: {error}") from error
  return params, f"weights of {source.path}, step {step}; fresh optimiser"


def initial(
  config: RunConfig,
  built: Built,
  checkpoints: Checkpoints,
  folder: RunFolder,
  weights: tuple[Any, str] | None,
) -> tuple[Any, int, dict[str, Any], list[str]]:
  """(state, step, meta, notes): restored, warm or fresh.

  Raises:
    RunFolderError: the data of the checkpoint is not the run's.
    CheckpointError: no checkpoint is readable, or it does not fit.
  """
  as_dicts = build_lib.to_dicts(built.abstract)
  try:
    found = checkpoints.restore(as_dicts)
  except NoCheckpointError:
    if config.init_from is None:
      return build_lib.fresh_state(config, built), 0, {}, []
    params, note = weights or source_weights(config, built)
    return build_lib.warm_state(params, built), 0, {}, [note]
  saved = from_dict(found.meta["config"], "checkpoint")
  changed = differences(saved, config)
  if changed:
    raise RunFolderError(
      f"{folder.path}: its checkpoint is of another config: "
      f"{'; '.join(changed)}"
    )
  data = config.data.train_batches(config.batch, config.seed)
  try:
    batches_lib.check_fingerprint(found.meta["data"], data.fingerprint)
  except ValueError as error:
    raise RunFolderError(f"{folder.path}: {error}") from error
  notes = [f"warning: {broken}" for broken in found.broken]
  notes.append(f"resuming at step {found.step}")
  state = build_lib.from_dicts(found.state, built.abstract)
  return state, found.step, found.meta, notes


def _try_data(config: RunConfig) -> None:
  """Makes a batch of both kinds; ValueError where the data cannot be made."""
  config.data.train_batches(config.batch, config.seed).read(0)
  config.data.eval_batches(config.batch, config.seed).read(0)


def train(config: RunConfig, folder: RunFolder, console) -> Outcome:
  """Runs, or goes on with, the run of this folder.

  Raises:
    RunFolderError, ValueError: the run cannot start; nothing was changed.
    CheckpointError, TrainingFailed: it cannot go on.
  """
  mesh = sharding.make_mesh()
  first = jax.process_index() == 0
  with jax.set_mesh(mesh):
    built = build_lib.build(config, mesh)
    weights = None
    if config.init_from is not None and not folder.config_file.exists():
      weights = source_weights(config, built)
    _try_data(config)
    folder.open(config)
    with (
      folder.locked(),
      Checkpoints(folder.checkpoints, keep=config.keep) as checkpoints,
      Preemption() as stop,
    ):
      state, start, meta, notes = initial(
        config, built, checkpoints, folder, weights
      )
      if first:
        folder.cut_metrics(start)
      display = Display(console, start=start, steps=config.steps, active=first)
      writer = metrics_lib.Writer(
        folder, tensorboard=config.tensorboard, active=first
      )
      begin = time.perf_counter()
      with writer, display:
        for note in (f"run folder: {folder.path}", *notes):
          display.line(note)
        loop = Loop(config, folder, built, checkpoints, writer)
        reason, step = meta.get("finished"), start
        loop.held_out = meta.get("held_out", {})
        if reason is None:
          state, step, reason = loop.run(state, start, display, stop)
        checkpoints.wait()
      seconds = time.perf_counter() - begin
      code = stop.exit_code if reason == "signal" else 0
      return Outcome(step, reason, code, loop.held_out, seconds, state)
