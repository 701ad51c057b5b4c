"""`rebased resume RUN`: resume a run with the config it has."""

import dataclasses

from train.commands.arguments import DataPlaces, RunArg, parse_run
from train.devices.mesh_config import MeshConfig
from train.timeouts import JOIN_TIMEOUT, STEP_TIMEOUT


@dataclasses.dataclass(frozen=True)
class ResumeArgs:
  """Resume a run with the config it has."""

  #: The run's folder.
  run_dir: RunArg
  #: Where the data is now, if it was moved.
  data: DataPlaces = DataPlaces()
  #: The mesh of devices, if it is not to be the run's.
  mesh: MeshConfig = MeshConfig()
  #: Resume although the data has changed.
  allow_data_change: bool = False
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
  parsed, config = parse_run(ResumeArgs, "resume", args)
  # Imported when the options are right: jax takes seconds.
  from train import start_run
  from train.devices import processes

  processes.start(parsed.distributed, parsed.join_timeout)
  outcome = start_run.run(
    config,
    parsed.run_dir,
    allow_data_change=parsed.allow_data_change,
    step_timeout=parsed.step_timeout,
  )
  return outcome.exit_code
