"""The training loop: data, steps, evaluation, checkpoints; no mathematics.

Metrics of a step are read after the next one is dispatched, so the device does
not wait for the host. The state is saved only when its metrics are known to be
finite.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import time
from typing import Any

import jax
from rich.console import Console

from train import affine, build as build_lib, evaluate, start as start_lib
from train.build import Built
from train.checkpoint.checkpoints import Checkpoints
from train.config import RunConfig, fingerprint, to_dict
from train.console import Display
from train.data import batches as batches_lib
from train.data.timeout import DataTimeout
from train.devices import mesh as mesh_lib, mesh_report, processes, sharding
from train.faults import Faults, TrainingFailed as TrainingFailed
from train.preempt import Preemption
from train.records import metrics as metrics_lib, wandb
from train.records.gauges import Gauges
from train.records.profile import Profile
from train.records.run_folder import RunFolder


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
    meta: dict[str, Any],
  ):
    self.config, self.folder, self.built = config, folder, built
    self.checkpoints, self.writer = checkpoints, writer
    self.train_data = config.data.train_batches(config.batch, config.seed)
    self.eval_data = config.data.eval_batches(config.micro_batch, config.seed)
    self.window = metrics_lib.Window()
    self.display: Display | None = None
    self.pending: tuple[int, Any, float, jax.Array | None] | None = None
    several = jax.process_count() > 1
    self.vote = processes.Vote(built.mesh) if several else None
    self.signal = 0  # that a process was sent, known to all
    self.held_out: dict[str, float] = meta.get("held_out", {})
    self.faults = Faults(
      skip=config.nan == "skip",
      folder=folder,
      data=self.train_data,
      skipped=meta.get("skipped", 0),
    )
    self.gauges = Gauges(built.abstract["params"])
    self.profile = Profile(config.profile, folder.path)

  def meta(self, finished: str | None) -> dict[str, Any]:
    return dict(
      config=to_dict(self.config),
      config_hash=fingerprint(self.config),
      data=self.train_data.fingerprint,
      jax=jax.__version__,
      finished=finished,
      held_out=self.held_out,
      skipped=self.faults.skipped,
    )

  def run(self, state: Any, start: int, display: Display, stop: Preemption):
    """Trains from step `start`; (state, step, reason)."""
    config, self.display = self.config, display
    rows = sharding.local_rows(config.batch, self.built.mesh)
    data = batches_lib.iterate(
      self.train_data,
      start=start,
      stop=config.steps,
      rows=rows,
      workers=config.data.workers,
      timeout=config.data.timeout,
    )
    put = lambda x: sharding.put_batch(x, self.built.mesh, config.batch)
    ahead = sharding.put_ahead(data, put)
    step, reason = start, None if start < config.steps else "finished"
    with self.saved_if_data_hangs(lambda: (state, step)), data, self.profile:
      while reason is None:
        self.profile.before(step, state)
        before = time.perf_counter()
        batch = next(ahead)
        wait = time.perf_counter() - before
        state, metrics = self.built.train_step(state, batch, self.built.key)
        self.settle(state)
        vote = self.heed(stop.signal_number)
        self.pending, step = (step, metrics, wait, vote), step + 1
        reason = self.after(state, step)
    self.settle(state)
    self.record(step)  # of a window that a stop cut short
    return state, step, reason

  def heed(self, signal: int) -> jax.Array | None:
    """Takes a signal of this process; of several, tells the others of it.

    They all hear of it when they read the metrics of this step.
    """
    if self.vote is None:
      self.signal = signal
      return None
    return self.vote.cast(signal)

  @contextlib.contextmanager
  def saved_if_data_hangs(self, where: Callable[[], tuple[Any, int]]):
    """Saves (state, step) where a batch has not come in time."""
    try:
      yield
    except DataTimeout:
      state, step = where()
      if jax.process_count() == 1:  # else the others do not know of it
        self.settle(state)
        self.save(state, step, None)
      raise

  def after(self, state: Any, step: int) -> str | None:
    """Evaluates and saves where it is due; a reason ends the loop."""
    config = self.config
    last = step == config.steps
    reason = "finished" if last else None
    if step % config.eval_every == 0 or last:
      accuracy = self.evaluate(state, step)["accuracy"]
      if config.stop_accuracy is not None and accuracy > config.stop_accuracy:
        reason = "accuracy"
    if reason is None and self.signal:
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
    """Held-out results, recorded."""
    self.settle(state)
    before = time.perf_counter()
    self.held_out = self.describe(
      evaluate.evaluate(
        self.built,
        state["params"],
        self.eval_data,
        timeout=self.config.data.timeout,
      )
    )
    self.writer.write("eval", step, **self.held_out)
    self.display.evaluated(step, self.held_out)
    self.window.pause(time.perf_counter() - before)
    return self.held_out

  def settle(self, state: Any) -> None:
    """Reads the metrics of the step before; fails where they are not finite."""
    if self.pending is None:
      return
    (step, metrics, wait, vote), self.pending = self.pending, None
    if vote is not None:
      self.signal = int(vote)
    values = affine.by_layer(jax.device_get(metrics))
    if metrics_lib.finite(values):
      tokens = self.config.batch * self.train_data.length
      self.window.add(values, tokens, wait)
    else:
      meta = self.meta(None)
      self.display.line(self.faults.handle(step, values, state, meta))
    done, due = step + 1, (step + 1) % self.config.log_every == 0
    self.display.step(done, self.record(done) if due else None)

  def record(self, step: int) -> dict[str, float] | None:
    """Writes the means since the last record, if there are any."""
    means = self.window.flush()
    if means is not None:
      means = self.describe(means)
      means |= self.gauges.read(means["tokens_per_second"])
      if self.config.nan == "skip":
        means["skipped_steps"] = self.faults.skipped
      self.writer.write("train", step, **means)
    return means

  def describe(self, values: dict[str, float]) -> dict[str, float]:
    """The values, with the perplexity where the data is text."""
    if not self.config.data.perplexity:
      return values
    return metrics_lib.with_perplexity(values)


def train(
  config: RunConfig,
  folder: RunFolder,
  console: Console,
  *,
  allow_data_change: bool = False,
) -> Outcome:
  """Runs, or goes on with, the run of this folder.

  With `allow_data_change` it goes on although the data, its batch or its seed
  are not those of the folder: at the step where it was, which then is another
  place of other data.

  Raises:
    RunFolderError, ValueError: the run cannot start; nothing was changed.
    CheckpointError, TrainingFailed: it cannot go on.
  """
  mesh = mesh_lib.make_mesh(config.mesh)
  first = jax.process_index() == 0
  with jax.set_mesh(mesh):
    built = build_lib.build(config, mesh)
    weights = None
    if config.init_from is not None and not folder.config_file.exists():
      weights = start_lib.source_weights(config, built)
    wandb.check(config)
    start_lib.try_data(config)
    # What a step refuses, it refuses before there is a folder.
    built.train_step.eval_shape(*build_lib.inputs(config, built))
    placed = mesh_report.describe(
      config, build_lib.to_dicts(built.abstract)["params"], mesh.shape
    )
    with (
      start_lib.claimed(folder, config, allow_data_change=allow_data_change),
      Checkpoints(folder.checkpoints, keep=config.keep) as checkpoints,
      Preemption() as stop,
    ):
      state, start, meta, notes = start_lib.initial(
        config,
        built,
        checkpoints,
        folder,
        weights,
        allow_data_change=allow_data_change,
      )
      if first:
        folder.update(config)
        folder.cut_metrics(start)
        folder.write("sharding.txt", mesh_report.as_text(*placed))
      display = Display(console, start=start, steps=config.steps, active=first)
      writer = metrics_lib.Writer(config, folder, active=first)
      begin = time.perf_counter()
      with writer, display:
        for note in (f"run folder: {folder.path}", *placed[0], *notes):
          display.line(note)
        loop = Loop(config, folder, built, checkpoints, writer, meta)
        reason, step = meta.get("finished"), start
        if reason is None:
          state, step, reason = loop.run(state, start, display, stop)
        checkpoints.wait()
      seconds = time.perf_counter() - begin
      code = 128 + loop.signal if reason == "signal" else 0
      return Outcome(step, reason, code, loop.held_out, seconds, state)
