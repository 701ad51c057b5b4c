"""The training loop: data, steps, evaluation and checkpoints, in their order.

    each step               next batch → train_step → metrics of the last step
    every eval_every steps  metrics on held-out rows
    every save_every steps  a checkpoint

The metrics of a step are read after the next step is dispatched, so that the
device never waits for the host. The state is saved only after its metrics are
known to be finite.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import time
from typing import Any, NamedTuple

import jax

from train import compiled_steps, evaluate, metrics
from train.checkpoint.checkpoints import Checkpoints
from train.compiled_steps import Built
from train.config import RunConfig
from train.data import prefetch
from train.data.prefetch import DataTimeout
from train.devices import batch_sharding, processes
from train.nonfinite_steps import NonfiniteSteps
from train.progress import Display
from train.records.device_usage import DeviceUsage
from train.records.metrics_writer import MetricsWriter, Window
from train.records.profile import Profile
from train.records.run_folder import RunFolder
from train.stop_signals import StopSignals
from train.stored_config import fingerprint, to_dict


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The end of a call of `train.run`."""

  #: Updates of the parameters that are done.
  step: int
  #: "finished", "accuracy" (the run's `stop_accuracy` is reached) or "signal".
  reason: str
  #: 0, or 128 + the signal's number.
  exit_code: int
  #: The last held-out metrics, by name.
  held_out: dict[str, float]
  #: Seconds of training in this process.
  seconds: float
  #: step, ok, params and opt_state, on the devices. Not printed: it is large.
  state: Any = dataclasses.field(repr=False)


class _Pending(NamedTuple):
  """A step that is dispatched, and whose metrics are not read yet."""

  step: int
  metrics: dict[str, jax.Array]
  wait: float  # seconds that the host waited for the batch
  vote: jax.Array | None  # a signal, which all processes are told of


class Loop:
  """One process's part of a run.

  Args:
    config: the run.
    folder: its folder.
    built: the run on its devices.
    checkpoints: where the state is saved.
    writer: where metrics are written.
    meta: what the restored checkpoint says of itself; {} for a new run.

  Attributes:
    held_out: the last held-out metrics, by name.
    signal: the number of the signal that stops the run, the same in all
      processes; 0 without one.
  """

  def __init__(
    self,
    config: RunConfig,
    folder: RunFolder,
    built: Built,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    meta: dict[str, Any],
  ):
    self.held_out: dict[str, float] = meta.get("held_out", {})
    self.signal = 0
    self._config, self._built = config, built
    self._checkpoints, self._writer = checkpoints, writer
    self._train_data = config.data.train_batches(config.batch, config.seed)
    self._eval_data = config.data.eval_batches(config.micro_batch, config.seed)
    self._window = Window()
    self._display: Display | None = None
    self._pending: _Pending | None = None
    several = jax.process_count() > 1
    self._vote = processes.Vote(built.mesh) if several else None
    self._nonfinite = NonfiniteSteps(
      skip=config.nan == "skip",
      folder=folder,
      data=self._train_data,
      skipped=meta.get("skipped", 0),
    )
    self._usage = DeviceUsage(built.abstract["params"])
    self._profile = Profile(config.profile, folder.path)

  def run(
    self, state: Any, start: int, display: Display, stop: StopSignals
  ) -> tuple[Any, int, str]:
    """Train from step `start`, and return (state, step, reason).

    Args:
      state: the state before step `start`. Its arrays are donated.
      start: the first step.
      display: shows the progress.
      stop: knows whether a signal came.
    """
    config, self._display = self._config, display
    data = prefetch.iterate(
      self._train_data,
      start=start,
      stop=config.steps,
      rows=batch_sharding.local_rows(config.batch, self._built.mesh),
      workers=config.data.workers,
      timeout=config.data.timeout,
    )
    batches = batch_sharding.put_ahead(data, self._put)
    step = start
    reason = None if start < config.steps else "finished"
    with (
      self._saved_if_data_hangs(lambda: (state, step)),
      data,
      self._profile,
    ):
      while reason is None:
        self._profile.before(step, state)
        before = time.perf_counter()
        batch = next(batches)
        wait = time.perf_counter() - before
        state, found = self._built.train_step(state, batch, self._built.key)
        self._settle(state)
        vote = self._cast_vote(stop.signal_number)
        self._pending = _Pending(step, found, wait, vote)
        step += 1
        reason = self._evaluate_and_save_if_due(state, step)
    self._settle(state)
    self._record(step)  # a signal may come before the next record is due
    return state, step, reason

  def _put(self, batch: Any) -> Any:
    return batch_sharding.put_batch(batch, self._built.mesh, self._config.batch)

  def _cast_vote(self, signal: int) -> jax.Array | None:
    """Note this process's signal, or start to tell all processes of it.

    The others learn of it when they read the metrics of this step, so that all
    processes stop after the same one.
    """
    if self._vote is None:
      self.signal = signal
      return None
    return self._vote.cast(signal)

  @contextlib.contextmanager
  def _saved_if_data_hangs(
    self, where: Callable[[], tuple[Any, int]]
  ) -> Iterator[None]:
    """Save (state, step), which `where` returns, if a batch is not in time."""
    try:
      yield
    except DataTimeout:
      state, step = where()
      if jax.process_count() == 1:  # the other processes do not know of it
        self._settle(state)
        self._save(state, step, None)
      raise

  def _evaluate_and_save_if_due(self, state: Any, step: int) -> str | None:
    """Return the reason to stop after `step` updates, or None to continue."""
    config = self._config
    last = step == config.steps
    reason = "finished" if last else None
    if step % config.eval_every == 0 or last:
      accuracy = self._evaluate(state, step)["accuracy"]
      if config.stop_accuracy is not None and accuracy > config.stop_accuracy:
        reason = "accuracy"
    if reason is None and self.signal:
      reason = "signal"
    if reason is not None or step % config.save_every == 0:
      self._settle(state)
      self._save(state, step, None if reason == "signal" else reason)
    return reason

  def _save(self, state: Any, step: int, finished: str | None) -> None:
    before = time.perf_counter()
    self._checkpoints.save(
      step, compiled_steps.to_dicts(state), self._meta(finished)
    )
    self._window.pause(time.perf_counter() - before)

  def _meta(self, finished: str | None) -> dict[str, Any]:
    """Return what a checkpoint says of itself; `finished` is a reason."""
    return dict(
      config=to_dict(self._config),
      config_hash=fingerprint(self._config),
      data=self._train_data.fingerprint,
      jax=jax.__version__,
      finished=finished,
      held_out=self.held_out,
      skipped=self._nonfinite.skipped,
    )

  def _evaluate(self, state: Any, step: int) -> dict[str, float]:
    """Return the held-out metrics, and record them."""
    self._settle(state)
    before = time.perf_counter()
    found = evaluate.evaluate(
      self._built,
      state["params"],
      self._eval_data,
      timeout=self._config.data.timeout,
    )
    self.held_out = self._with_derived(found)
    self._writer.write("eval", step, **self.held_out)
    if self._display is not None:
      self._display.evaluated(step, self.held_out)
    self._window.pause(time.perf_counter() - before)
    return self.held_out

  def _settle(self, state: Any) -> None:
    """Read the metrics of the step before.

    Args:
      state: the state after that step, which is the state before it if the step
        was not finite.

    Raises:
      TrainingFailed: the step was not finite, and the run does not skip it.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    if pending.vote is not None:
      self.signal = int(pending.vote)
    values = metrics.by_layer(jax.device_get(pending.metrics))
    if metrics.are_finite(values):
      tokens = self._config.batch * self._train_data.length
      self._window.add(values, tokens, pending.wait)
    else:
      warning = self._nonfinite.handle(
        pending.step, values, state, self._meta(None)
      )
      if self._display is not None:
        self._display.line(warning)
    done = pending.step + 1
    record = self._record(done) if done % self._config.log_every == 0 else None
    if self._display is not None:
      self._display.step(done, record)

  def _record(self, step: int) -> dict[str, float] | None:
    """Write the means since the last record; return None if there are none."""
    means = self._window.flush()
    if means is None:
      return None
    means = self._with_derived(means)
    means |= self._usage.read(means["tokens_per_second"])
    if self._config.nan == "skip":
      means["skipped_steps"] = self._nonfinite.skipped
    self._writer.write("train", step, **means)
    return means

  def _with_derived(self, values: dict[str, float]) -> dict[str, float]:
    return metrics.with_derived(values, text=self._config.data.perplexity)
