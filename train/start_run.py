"""Train a config in a run folder: the entry that Python and the command share.

from train import RunConfig, run

outcome = run(config, "runs/mine")   # the same call resumes a stopped run
print(outcome.reason, outcome.held_out["loss"])
"""

from collections.abc import Iterator, Mapping
import contextlib
import shlex
import sys
import time

from etils import epath
import jax
from rich.console import Console

from pallas_kernels import IMPLEMENTATIONS, which_implementation
from rebased_jax import import_trainer
from train import (
  best_checkpoint,
  compiled_steps,
  console as console_lib,
  init_weights,
  initial_state,
  loop as loop_lib,
  same_run,
  stored_config,
)
from train.checkpoint.checkpoints import Checkpoints
from train.config import RunConfig
from train.data.text.token_source import DataError
from train.devices import backend, mesh as mesh_lib, mesh_report, processes
from train.heartbeat import Heartbeat
from train.loop import Outcome
from train.nonfinite_steps import TrainingFailed
from train.progress import Display
from train.records import report, wandb
from train.records.metrics_writer import MetricsWriter
from train.records.run_folder import (
  RunFolder,
  RunFolderError,
  default_folder,
)
from train.stop_signals import StopSignals
from train.timeouts import STEP_TIMEOUT
from train.watchdog import Watchdog


def run(
  config: RunConfig,
  run_dir: epath.PathLike | None = None,
  *,
  console: Console | None = None,
  allow_data_change: bool = False,
  allow_optimizer_change: bool = False,
  step_timeout: float | None = STEP_TIMEOUT,
) -> Outcome:
  """Train a config, or resume the run that the folder holds.

  A resume may change what does not act on what the run learns: the intervals of
  records, evaluations and saves, the mesh, the places of data, and so on. See
  `train.stored_config.is_about_work`.

  SIGTERM, SIGINT, SIGHUP and SIGUSR1 stop the run after the current step: it is
  saved, and the same call resumes it. See `train/stop_signals.py`.

  Args:
    config: the run. Its classes must be importable by name, because the folder
      stores `module:Class` for each.
    run_dir: the folder for config.json, metrics.jsonl, checkpoints and
      pictures: a new one, or that of this run. None: a new one, `runs/TIME`.
    console: prints progress and results. None: prints to standard output.
    allow_data_change: resume although the data, its batch or its seed are not
      those of the folder. The run then continues at its step of the new data.
    allow_optimizer_change: resume although `steps` or the optimiser are not
      those of the folder. The optimiser's state is kept, and history.jsonl
      gets the change.
    step_timeout: seconds without any progress, such as a step or a batch of an
      evaluation, after which the process ends with exit code 4. None: never.

  Returns:
    Where and why the run stopped, its held-out metrics and its final state.

  Raises:
    ConfigError: the config does not survive the round trip to JSON.
    RunFolderError: the folder holds another run or other files.
    ValueError: the config does not fit the devices or the data. In all cases so
      far nothing was written.
    CheckpointError: no checkpoint can be read, or one cannot be written.
    TrainingFailed: a step was not finite, or data became unreadable. Before an
      error in the loop is raised, the state is saved.
    DataTimeout: a batch did not come in time; a thread still waits for it, so
      end the process with `os._exit`.
    PeerLost: another process of the run has ended.
  """
  # Where `train` is a user's own module, a call may come from outside the
  # context that gave this function.
  with (
    import_trainer(),
    processes.naming_lost_peers(),
    Watchdog(step_timeout) as watch,
  ):
    allowed = dict(
      allow_data_change=allow_data_change,
      allow_optimizer_change=allow_optimizer_change,
    )
    return _run(config, run_dir, console, watch, allowed)


def _run(
  config: RunConfig,
  run_dir: epath.PathLike | None,
  console: Console | None,
  watch: Watchdog,
  allowed: Mapping[str, bool],
) -> Outcome:
  backend.devices()  # says so if there are none
  if run_dir is None:
    if jax.process_count() > 1:
      raise ValueError(
        "run_dir=None: expected a folder that all processes share"
      )
    with default_folder() as made:
      return _run(config, made, console, watch, allowed)
  if console is None:
    console = console_lib.to_stdout(quiet=jax.process_index() != 0)
  folder = RunFolder(run_dir)
  outcome = train(config, folder, console, watch, **allowed)
  if outcome.reason == "signal":
    text = (
      f"stopped at step {outcome.step} and saved; resume with\n"
      f"  rebased resume {shlex.quote(str(run_dir))}"
    )
    console_lib.say(console, text)
    if getattr(console.file, "lost", False):
      with contextlib.suppress(OSError):
        print(f"nobody reads the output: {text}", file=sys.stderr)
  else:
    watch.beat("pictures and table")
    with _failing():
      report.finish(config, folder, outcome, console)
  processes.stop_together()
  return outcome


@contextlib.contextmanager
def _failing() -> Iterator[None]:
  """Raise no ValueError, which would mean that nothing was changed.

  Raises:
    TrainingFailed: the data is at fault; the message says what is wrong.
    RuntimeError: any other ValueError or NotImplementedError.
  """
  try:
    yield
  except (DataError, RunFolderError) as error:
    raise TrainingFailed(str(error)) from error
  except (ValueError, NotImplementedError) as error:
    kind = type(error).__name__
    raise RuntimeError(f"the run failed: {kind}: {error}") from error


def _check_named_kernels(config: RunConfig) -> None:
  """Check that the devices run the kernels that the mixers' configs name.

  Otherwise only the lowering of a step would find it.

  Raises:
    NotImplementedError: they do not.
  """
  for mixer in (config.model.first, config.model.second):
    name = getattr(mixer, "implementation", None)
    if name in IMPLEMENTATIONS:
      which_implementation(name)


def train(
  config: RunConfig,
  folder: RunFolder,
  console: Console,
  watch: Watchdog | None = None,
  *,
  allow_data_change: bool = False,
  allow_optimizer_change: bool = False,
) -> Outcome:
  """Do what `run` does, without the pictures and the table at the end.

  Everything that can be refused is refused before the folder is touched.
  """
  watch = watch or Watchdog()
  stored_config.check_storable(config)
  best_checkpoint.check(config)
  allowed = dict(
    allow_data_change=allow_data_change,
    allow_optimizer_change=allow_optimizer_change,
  )
  if not folder.config_file.exists():
    config.optimizer.check_unused()
  same_run.check(config, folder, **allowed)
  config = config.with_absolute_paths()
  mesh = mesh_lib.make_mesh(config.mesh)
  first = jax.process_index() == 0
  with (
    Heartbeat(console, watch.doing, active=first) as heartbeat,
    jax.set_mesh(mesh),
  ):
    watch.beat("model")
    built = compiled_steps.build(config, mesh)
    initial_state.check_optimizer_state(config, built, folder)
    weights = None
    if config.init_from is not None and not folder.config_file.exists():
      weights = init_weights.source_weights(config, built)
    with processes.all_or_none():
      if first:
        wandb.check(config)
      watch.beat("start of the data")
      initial_state.try_data(config)
      _check_named_kernels(config)
      # Shapes only: finds what a step cannot compute.
      built.train_step.eval_shape(*compiled_steps.step_inputs(config, built))
    placed = mesh_report.describe(
      config, compiled_steps.to_dicts(built.abstract)["params"], mesh.shape
    )
    with (
      _claimed(folder, config, allowed) as run_id,
      Checkpoints(
        folder.checkpoints,
        keep=config.keep,
        keep_every=config.keep_every,
        score=best_checkpoint.score_of(config),
        run=run_id,
        on_saved=folder.note_save if first else None,
      ) as checkpoints,
      StopSignals() as stop,
    ):
      processes.check_alike({"saved steps": checkpoints.steps()})
      watch.beat("initial state")
      state, start, meta, notes = initial_state.restore_or_create(
        config,
        built,
        checkpoints,
        folder,
        weights,
        **allowed,
      )
      if first:
        folder.cut_metrics(start, again=loop_lib.unwritten_records(meta))
        # Before the config, so that no change can lack in the history.
        folder.note_changes(start, initial_state.changes_since(meta, config))
        folder.update(config)
        folder.write("sharding.txt", mesh_report.as_text(*placed))
      display = Display(
        console, heartbeat, start=start, steps=config.steps, active=first
      )
      writer = MetricsWriter(config, folder, active=first, start=start)
      begin = time.perf_counter()
      with _failing(), writer, display:
        for note in (f"run folder: {folder.path}", *placed[0], *notes):
          display.line(note)
        loop = loop_lib.Loop(
          config, folder, built, checkpoints, writer, meta, watch
        )
        reason, step = loop_lib.why_finished(meta, config, start), start
        if reason is None:
          state, step, reason = loop.run(state, start, display, stop)
        else:
          display.line(loop_lib.how_to_train_on(reason, start))
        watch.beat("last save")
        checkpoints.wait()
        code = 128 + loop.signal if reason == "signal" else 0
        writer.exit_code = code
      seconds = time.perf_counter() - begin
      return Outcome(step, reason, code, loop.held_out, seconds, state)


@contextlib.contextmanager
def _claimed(
  folder: RunFolder, config: RunConfig, allowed: Mapping[str, bool]
) -> Iterator[str | None]:
  """Open and lock the folder; the first process does so for all of them.

  Yields:
    The id of the run; None if it began before runs had one.

  Raises:
    RunFolderError: the folder cannot be used, or another run trains in it.
  """
  failure, run_id = None, None
  processes.all_processes(True)  # each has seen what was there before
  with contextlib.ExitStack() as locks:
    if jax.process_index() == 0:
      try:
        folder.open(config, **allowed)
        locks.enter_context(folder.locked())
        run_id = folder.run_id()
      except RunFolderError as error:
        failure = error
    if not processes.all_processes(failure is None):
      raise failure or RunFolderError(f"{folder.path}: refused by process 0")
    same_run.check_folder(folder)
    yield processes.from_first(run_id or "") or None
