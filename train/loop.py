"""The training loop: data, steps, evaluation and checkpoints, in their order.

    each step               next batch → train_step → metrics of the last step
    every eval_every steps  metrics on held-out rows
    every save_every steps  a checkpoint
    at a signal             a checkpoint, before any evaluation

The metrics of a step are read after the next step is dispatched, so that the
device never waits for the host. The state is saved only after its metrics are
known to be finite.

A checkpoint also holds what the loop knows beside the state: the metrics since
the last record, and whether an evaluation is due. A resumed run therefore
writes the records that an undisturbed run writes.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import itertools
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from train import compiled_steps, evaluate, metrics, optimizer
from train.checkpoint.checkpoints import CheckpointError, Checkpoints
from train.compiled_steps import Built
from train.config import RunConfig
from train.data import prefetch
from train.data.batches import Batch
from train.data.in_vocabulary import InVocabulary
from train.data.prefetch import DataTimeout
from train.devices import batch_sharding, processes
from train.failing_together import (
  FailingTogether,
  before_stand_ins,
  make_stand_in,
)
from train.nonfinite_steps import NonfiniteSteps, TrainingFailed
from train.progress import Display
from train.records.device_usage import DeviceUsage
from train.records.metrics_writer import MetricsWriter, Window
from train.records.profile import Profile
from train.records.run_folder import RunFolder
from train.stop_signals import StopSignals
from train.stored_config import fingerprint, to_dict
from train.watchdog import Watchdog


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


def unwritten_records(meta: dict[str, Any]) -> list[str]:
  """Return the kinds of records of a checkpoint's own step that are due.

  Args:
    meta: what the checkpoint says of itself.
  """
  kinds = ["eval"] if meta.get("evaluation_due", False) else []
  if meta.get("window", {}).get("steps", 0):
    kinds.append("train")
  return kinds


def why_finished(
  meta: dict[str, Any], config: RunConfig, step: int
) -> str | None:
  """Return why a restored run does not train on; None if it does.

  Args:
    meta: what its checkpoint says of itself.
    config: the run, which may have more steps or another `stop_accuracy` now.
    step: the step of the checkpoint.
  """
  reason = meta.get("finished")
  limit = config.stop_accuracy
  if reason == "finished" and step < config.steps:
    return None
  if reason == "accuracy" and step < config.steps:
    accuracy = meta["held_out"]["accuracy"]
    return reason if limit is not None and accuracy > limit else None
  return reason


def how_to_train_on(reason: str, step: int) -> str:
  """Return a line about a run that ended before, and what continues it."""
  if reason == "accuracy":
    return (
      f"the run ended at step {step}, above --stop-accuracy; `rebased resume "
      "RUN --stop-accuracy None` trains on"
    )
  return (
    f"the run ended at step {step}; `rebased resume RUN --steps N` trains on"
  )


class Loop:
  """One process's part of a run.

  Args:
    config: the run.
    folder: its folder.
    built: the run on its devices.
    checkpoints: where the state is saved.
    writer: where metrics are written.
    meta: what the restored checkpoint says of itself; {} for a new run.
    watch: is told of every progress.

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
    watch: Watchdog,
  ):
    self.held_out: dict[str, float] = meta.get("held_out", {})
    self._held_out_step: int | None = meta.get("held_out_step")
    self.signal = 0
    self._evaluation_due = bool(meta.get("evaluation_due", False))
    self._config, self._built = config, built
    self._checkpoints, self._writer = checkpoints, writer
    self._watch = watch
    train = config.data.train_batches(config.batch, config.seed)
    held_out = config.data.eval_batches(config.micro_batch, config.seed)
    self._train_data = InVocabulary(train, config.model.vocab_size)
    self._eval_data = InVocabulary(held_out, config.model.vocab_size)
    self._window = Window(meta.get("window"))
    self._display: Display | None = None
    self._stop: StopSignals | None = None
    self._pending: _Pending | None = None
    several = processes.are_several()
    self._vote = processes.Vote(built.mesh) if several else None
    self._failing = FailingTogether() if several else None
    self._failed_at: int | None = None  # the first step with a stand-in
    self._nonfinite = NonfiniteSteps(
      skip=config.nan == "skip",
      folder=folder,
      data=self._train_data,
      meta=meta,
    )
    self._rate = optimizer.schedule(config.optimizer, config.steps, np)
    self._usage = DeviceUsage(built.abstract.params)
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
    config, self._display, self._stop = self._config, display, stop
    data = prefetch.iterate(
      self._train_data,
      start=start,
      stop=config.steps,
      rows=batch_sharding.local_rows(config.batch, self._built.mesh),
      workers=config.data.workers,
      timeout=config.data.timeout,
      hurried=self._hurried,
    )
    batches = batch_sharding.put_ahead(data, self._put)
    if self._failing is not None:
      fields = config.data.fields(config.batch)
      stand_in = make_stand_in(fields, config.batch, self._built.mesh)
      batches = self._failing.with_stand_ins(batches, self._put(stand_in))
    step, reason = start, None
    with (
      self._saved_if_it_fails(lambda: state, start),
      data,
      self._profile,
    ):
      reason = self._evaluate_if_due(state, step)
      self._record_if_last(step, reason)
      if reason == "signal":
        self._save(state, step, None)  # unless it was restored
      while reason is None:
        self._profile.before(step, state)
        self._watch.beat(f"data of step {step}")
        before = time.perf_counter()
        batch = next(batches)
        wait = time.perf_counter() - before
        if step == start:
          self._watch.beat(f"compilation and step {step}")
        else:
          self._watch.beat(f"step {step}", training=True)
        before = time.perf_counter()
        state, found = self._built.train_step(state, batch, self._built.key)
        if step == start:  # the rates leave the compilation out
          self._window.pause(time.perf_counter() - before)
        vote = self._cast_vote()
        previous, self._pending = (
          self._pending,
          _Pending(step, found, wait, vote),
        )
        step += 1
        self._read(previous, state)
        reason = self._evaluate_and_save_if_due(state, step)
      if self._failing is not None and self._failing.error is not None:
        raise self._failing.error  # all is saved, but not all is recorded
    return state, step, reason

  def _put(self, batch: Any) -> Any:
    return batch_sharding.put_batch(batch, self._built.mesh, self._config.batch)

  def _own_signal(self) -> int:
    """Return the signal that this process has received; 0 without one."""
    assert self._stop is not None
    lost = self._display is not None and self._display.output_lost
    return self._stop.signal_number or (signal.SIGPIPE if lost else 0)

  def _hurried(self) -> bool:
    """Whether a wait for data must end soon."""
    return self._own_signal() != 0

  def _cast_vote(self) -> jax.Array | None:
    """Note this process's signal, or start to tell all processes of it.

    The others learn of it, or of this process's failure, when they read the
    metrics of this step, so that all processes stop after the same one.
    """
    if self._vote is None or self._failing is None:
      self.signal = self._own_signal()
      return None
    return self._vote.cast(self._failing.vote(self._own_signal()))

  def _read_vote(self, vote: jax.Array) -> None:
    """Read a vote of all processes; raise if one of them has failed."""
    assert self._failing is not None
    self.signal = self._failing.read_vote(int(vote))

  def _interrupts(
    self, votes: collections.deque[jax.Array]
  ) -> Callable[[], bool]:
    """Return a function that says whether a signal ends an evaluation.

    Every process calls it once a batch. A vote of several processes is read
    some batches later, so that no device waits for it.

    Args:
      votes: gets the votes that are not read yet.
    """
    batches = itertools.count(1)

    def interrupted() -> bool:
      part = f"batch {next(batches)} of {self._eval_data.num_batches}"
      self._watch.beat("evaluation", part=part)
      vote = self._cast_vote()
      if vote is not None:
        votes.append(vote)
        if len(votes) > evaluate.AHEAD:
          self._read_vote(votes.popleft())
      return self.signal != 0

    return interrupted

  @contextlib.contextmanager
  def _saved_if_it_fails(
    self, where: Callable[[], Any], start: int
  ) -> Iterator[None]:
    """Save the state if the data, an evaluation or a record fails.

    Args:
      where: returns the state.
      start: the step that the run started from, which needs no saving.
    """
    try:
      yield
    except (TrainingFailed, CheckpointError):
      raise
    except Exception as error:
      if isinstance(error, DataTimeout) and self._own_signal():
        error.exit_code = 128 + self._own_signal()
      # Several processes can only save if all of them know of the failure.
      if self._failing is None or self._failing.told:
        self._save_after_failure(where(), start)
      raise

  def _save_after_failure(self, state: Any, start: int) -> None:
    """Save the state, if it is whole, and say so; never hide the failure."""
    assert self._display is not None
    if any(x.is_deleted() for x in jax.tree.leaves(state)):
      return  # donated to a step that failed
    try:
      if self._failed_at is not None:
        state = before_stand_ins(state, self._failed_at)
        # Of steps with stand-ins, which a resumed run does again.
        self._pending, self._evaluation_due = None, False
      step = int(state.step)
      if step == start or not bool(state.ok):
        return
      self._settle(state)
      self._save(state, step, None)
      self._checkpoints.wait()
    except Exception as error:  # noqa: BLE001  # the first failure is raised
      self._display.line(f"warning: not saved after a failure: {error}")
    else:
      self._display.line(f"saved at step {step} after a failure")

  def _evaluate_and_save_if_due(self, state: Any, step: int) -> str | None:
    """Return the reason to stop after `step` updates, or None to continue."""
    config = self._config
    if step % config.eval_every == 0 or step == config.steps:
      self._evaluation_due = True
    reason = self._evaluate_if_due(state, step)
    if reason is not None or step % config.save_every == 0:
      self._settle(state)
      self._record_if_last(step, reason)
      self._save(state, step, None if reason == "signal" else reason)
      # A save waits for the one before, which takes long on a slow disk.
      reason = reason or self._signalled()
    return reason

  def _evaluate_if_due(self, state: Any, step: int) -> str | None:
    """Evaluate if it is time; return the reason to stop, or None.

    A signal comes first: it leaves the evaluation to the resumed run.
    """
    limit = self._config.stop_accuracy
    if self._evaluation_due:
      self._settle(state)
      try:
        found = self._evaluate(state, step)
      except evaluate.Interrupted:
        return "signal"
      self._evaluation_due = False
      if limit is not None and found["accuracy"] > limit:
        return "accuracy"
    if step == self._config.steps:
      return "finished"
    return self._signalled()

  def _signalled(self) -> str | None:
    """Return "signal" if a signal stops the run; None if none does.

    Several processes know of it by a vote alone.
    """
    if self._vote is None:
      self.signal = self._own_signal()
    return "signal" if self.signal else None

  def _record_if_last(self, step: int, reason: str | None) -> None:
    """Write the last record, whose window may be incomplete.

    After a signal the window stays in the checkpoint and is completed by the
    resumed run.
    """
    if reason not in (None, "signal"):
      self._record(step)

  def _save(self, state: Any, step: int, finished: str | None) -> None:
    self._watch.beat(f"save of step {step}")
    before = time.perf_counter()
    with self._recording():
      self._writer.flush()
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
      held_out_data=self._eval_data.fingerprint,
      jax=jax.__version__,
      finished=finished,
      held_out=self.held_out,
      held_out_step=self._held_out_step,
      window=self._window.state(),
      evaluation_due=self._evaluation_due,
      **self._nonfinite.state(),
    )

  def _evaluate(self, state: Any, step: int) -> dict[str, float]:
    """Return the held-out metrics, and record them.

    Raises:
      Interrupted: a signal came, before the evaluation or in it.
    """
    if self.signal:
      raise evaluate.Interrupted
    before = time.perf_counter()
    held_out = self._held_out(state.params)
    if state.ema is not None:
      average = self._held_out(state.ema)
      del average["tokens"]  # the same
      held_out |= {metrics.of_average(k): x for k, x in average.items()}
    self.held_out, self._held_out_step = held_out, step
    with self._recording():
      self._writer.write("eval", step, **self.held_out)
    if self._display is not None:
      self._display.evaluated(step, self.held_out)
    self._window.pause(time.perf_counter() - before)
    return self.held_out

  def _held_out(self, params: Any) -> dict[str, float]:
    """Return the held-out metrics of parameters.

    Raises:
      Interrupted: a signal came.
    """
    votes = collections.deque[jax.Array]()
    found = evaluate.evaluate(
      self._built,
      params,
      self._eval_data,
      timeout=self._config.data.timeout,
      interrupted=self._interrupts(votes),
      hurried=self._hurried,
      with_stand_ins=self._evaluation_stand_ins(),
    )
    while votes:
      self._read_vote(votes.popleft())
    return self._with_derived(found)

  def _evaluation_stand_ins(
    self,
  ) -> Callable[[Iterator[Batch]], Iterator[Batch]] | None:
    """Return the `with_stand_ins` of an evaluation; None: errors are raised."""
    failing, config = self._failing, self._config
    if failing is None:
      return None
    rows = self._eval_data.rows
    fields = config.data.eval_fields(config.micro_batch)
    stand_in = make_stand_in(fields, rows, self._built.mesh)
    return lambda batches: failing.with_stand_ins(batches, stand_in)

  @contextlib.contextmanager
  def _recording(self) -> Iterator[None]:
    """Let one of several processes train until all know that it cannot write.

    Raises:
      OSError: a record cannot be written, and this is the only process.
    """
    try:
      yield
    except OSError as error:
      if self._failing is None:
        raise
      self._failing.error = self._failing.error or error

  def _settle(self, state: Any) -> None:
    """Read the metrics of the last step; `state` is that after it."""
    pending, self._pending = self._pending, None
    self._read(pending, state)

  def _read(self, pending: _Pending | None, state: Any) -> None:
    """Read the metrics of a step.

    Args:
      pending: the step; None does nothing.
      state: the state after that step or the next one. It is the state before
        the step if the step was not finite.

    Raises:
      TrainingFailed: the step was not finite, and the run does not skip it.
    """
    if pending is None:
      return
    if pending.vote is not None:
      self._failed_at = pending.step
      self._read_vote(pending.vote)
      self._failed_at = None
    values = metrics.by_layer(jax.device_get(pending.metrics))
    self._watch.beat(f"step {pending.step + 1}", training=True)
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
    means["goodput"] = self._watch.goodput()
    config = self._config
    means["tokens_seen"] = step * config.batch * self._train_data.length
    # The optimiser counts no skipped steps.
    means["learning_rate"] = float(
      self._rate(step - 1 - self._nonfinite.skipped)
    )
    means["unix_time"] = time.time()
    if self._config.nan == "skip":
      means["skipped_steps"] = self._nonfinite.skipped
    with self._recording():
      self._writer.write("train", step, **means)
    return means

  def _with_derived(self, values: dict[str, float]) -> dict[str, float]:
    return metrics.with_derived(values, text=self._config.data.perplexity)
