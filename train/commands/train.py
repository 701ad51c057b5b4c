"""`rebased train PRESET`: train a preset, or resume the run in a folder."""

import contextlib
import dataclasses
from typing import Annotated

import tyro

from train.commands.arguments import SystemArg, parse_preset
from train.commands.parsing import naming_options
from train.config import RunConfig
from train.records.run_folder import default_folder
from train.timeouts import JOIN_TIMEOUT, STEP_TIMEOUT


@dataclasses.dataclass(frozen=True)
class TrainArgs:
  """Train the preset, with the fields that you change."""

  run: Annotated[RunConfig, tyro.conf.arg(name="")]
  #: The system that the model gets, as in the preset of that system. Its
  #: options may follow: --model.mixer.heads 8 is --model.second.heads 8, and
  #: the same of the first layer if that has the same mixer. None: the preset's.
  mixer: SystemArg = None
  #: The run's folder: a new one, or that of this run, which is then resumed.
  #: None: runs/PRESET-TIME.
  run_dir: str | None = None
  #: Resume although the data, the batch or the seed changed.
  allow_data_change: bool = False
  #: Resume although the steps or the optimiser changed. The state of the
  #: optimiser is kept.
  allow_optimizer_change: bool = False
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
    ValueError: an argument or the config is wrong; nothing was changed.
    OSError, CheckpointError or TrainingFailed: the run failed.
  """
  name, parsed = parse_preset(TrainArgs, "train", args)
  # Imported when the options are right: jax takes seconds.
  from train import start_run
  from train.devices import processes

  processes.start(parsed.distributed, parsed.join_timeout)
  if parsed.run_dir is None and parsed.distributed != "off":
    raise ValueError(
      "run_dir=None: expected --run-dir, a folder that all processes share, "
      f"with --distributed {parsed.distributed}"
    )
  with contextlib.ExitStack() as made:
    run_dir = parsed.run_dir
    if run_dir is None:
      run_dir = made.enter_context(default_folder(name))
    with naming_options(parsed.run):
      outcome = start_run.run(
        parsed.run,
        run_dir,
        allow_data_change=parsed.allow_data_change,
        allow_optimizer_change=parsed.allow_optimizer_change,
        step_timeout=parsed.step_timeout,
      )
  return outcome.exit_code
