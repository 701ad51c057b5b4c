"""`rebased resume RUN`: resume a run, with another end or other records."""

import dataclasses
from typing import Literal

from train.commands.arguments import (
  DataPlaces,
  RunArg,
  check_data_is_there,
  moved,
)
from train.commands.parsing import (
  as_options,
  naming_options,
  option_names,
  parse,
)
from train.config import (
  MeshConfig,
  OptimizerConfig,
  ProfileConfig,
  RunConfig,
)
from train.records.run_folder import RunFolder
from train.stored_config import differences, is_about_optimizer
from train.timeouts import JOIN_TIMEOUT, STEP_TIMEOUT


@dataclasses.dataclass(frozen=True)
class ResumedData(DataPlaces):
  """The places of a run's data, if it was moved, and who reads it."""

  #: Processes that make batches. None: as many as the run had.
  workers: int | None = None
  #: Seconds to wait for a batch. None: as many as the run waited.
  timeout: float | None = None


@dataclasses.dataclass(frozen=True)
class ResumedModel:
  """Choices of the compiled model that change memory and time alone."""

  #: What the backward pass computes again instead of keeping it.
  remat: Literal["none", "dots", "full"] = "none"
  #: Whether one compiled pair is scanned over all pairs. None: yes, except on
  #: a GPU.
  scan_layers: bool | None = None


@dataclasses.dataclass(frozen=True)
class ResumeArgs:
  """Resume a run from its newest checkpoint.

  What an option does not name stays as the run has it. `rebased resume RUN
  --help` shows the run's values.
  """

  #: The run's folder.
  run_dir: RunArg
  #: Updates of the parameters, also beyond those of a finished run. A schedule
  #: ends at the new last step. None: as the run has it.
  steps: int | None = None
  #: Held-out accuracy above which the run ends early. None: never.
  stop_accuracy: float | None = None
  #: Steps between evaluations on held-out rows.
  eval_every: int = 100
  #: Steps between checkpoints.
  save_every: int = 500
  #: Steps between records of metrics.
  log_every: int = 10
  #: How many of the newest checkpoints stay.
  keep: int = 3
  #: Checkpoints at multiples of that many steps stay too. None: no others.
  keep_every: int | None = None
  #: The checkpoint that is best by this held-out metric stays too, such as
  #: "loss" or "accuracy". None: the best one does not.
  keep_best: str | None = None
  #: Write TensorBoard event files too.
  tensorboard: bool = False
  #: A project of Weights & Biases that gets the records too.
  wandb: str | None = None
  #: What to do when a step is not finite: end the run, or skip the step.
  nan: Literal["abort", "skip"] = "abort"
  #: Parts that the targets of a row are cut into, to save memory.
  loss_chunks: int = 1
  #: Which steps the profiler traces.
  profile: ProfileConfig = ProfileConfig()
  #: Choices of the compiled model that change memory and time alone.
  model: ResumedModel = ResumedModel()
  #: Where the data is now, if it was moved, and who reads it.
  data: ResumedData = ResumedData()
  #: The mesh of devices.
  mesh: MeshConfig = MeshConfig()
  #: Resume although the data has changed.
  allow_data_change: bool = False
  #: Train on with another learning rate, or what else of the optimiser the
  #: options change. Its state is kept.
  allow_optimizer_change: bool = False
  #: The update rule and its schedule, for --allow-optimizer-change.
  optimizer: OptimizerConfig = OptimizerConfig()
  #: Weight of the z-loss, for --allow-optimizer-change.
  z_loss: float = 0.0
  #: How this process finds the others: "off" if there are none, "auto" from
  #: the cluster, or HOST:PORT,N,I for process I of N.
  distributed: str = "off"
  #: Seconds to wait for the other processes at the start.
  join_timeout: float = JOIN_TIMEOUT
  #: Seconds without any progress after which the process ends with exit code 4.
  #: None: never.
  step_timeout: float | None = STEP_TIMEOUT


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the run cannot be resumed.
    OSError, CheckpointError or TrainingFailed: the run failed.
  """
  parsed, stored, config = _parse(args)
  check_data_is_there(config.data)
  changed = [x for x in differences(stored, config) if is_about_optimizer(x)]
  others = [x for x in changed if not x.startswith("steps:")]
  if others and not parsed.allow_optimizer_change:
    raise ValueError(
      as_options(
        f"{'; '.join(others)}: expected --allow-optimizer-change beside it, "
        "because the run learns something else from here on",
        option_names(parsed),
      )
    )
  # Imported after the options are right: they need orbax, which takes seconds.
  from train import start_run
  from train.devices import processes

  processes.start(parsed.distributed, parsed.join_timeout)
  with naming_options(parsed):
    outcome = start_run.run(
      config,
      parsed.run_dir,
      allow_data_change=parsed.allow_data_change,
      allow_optimizer_change=parsed.allow_optimizer_change or bool(changed),
      step_timeout=parsed.step_timeout,
    )
  return outcome.exit_code


def _parse(args: list[str]) -> tuple[ResumeArgs, RunConfig, RunConfig]:
  """Return the arguments, the config of the run, and the one to resume with."""
  prog = "rebased resume"
  if args and not args[0].startswith("-"):
    run_dir = args[0]
  else:
    run_dir = parse(ResumeArgs, prog, args).run_dir
  stored = RunFolder(run_dir).read_config()

  def elsewhere(option: str) -> str:
    if option not in option_names(stored):
      return ""
    return (
      f" with resume: a run keeps it. `rebased train --config "
      f"{run_dir}/config.json {option} …` trains another run with it"
    )

  names = [
    x.name
    for x in dataclasses.fields(ResumeArgs)
    if hasattr(stored, x.name) and x.name not in ("data", "model")
  ]
  model = ResumedModel(stored.model.remat, stored.model.scan_layers)
  default = ResumeArgs(
    run_dir, model=model, **{name: getattr(stored, name) for name in names}
  )
  parsed = parse(ResumeArgs, prog, args, default, elsewhere)
  model = dataclasses.replace(
    stored.model,
    remat=parsed.model.remat,
    scan_layers=parsed.model.scan_layers,
  )
  with naming_options(parsed):
    parsed.optimizer.check_unused(stored.optimizer)
    config = dataclasses.replace(
      stored,
      model=model,
      data=moved(stored.data, parsed.data),
      **{name: getattr(parsed, name) for name in names},
    )
  return parsed, stored, config
