"""`rebased evaluate RUN`: print the held-out loss and accuracy of a run."""

import dataclasses

from rich.console import Console

from train.commands.arguments import DataPlaces, RunArg, parse_run
from train.config import RunConfig, TextData
from train.data.recall import Recall
from train.devices import backend, processes
from train.devices.mesh import MeshConfig
from train.records import report
from train.records.run_folder import RunFolder
from train.watchdog import STEP_TIMEOUT, Watchdog


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
  """Print the held-out loss and accuracy of a run."""

  #: The run's folder.
  run_dir: RunArg
  #: The step of the checkpoint. None: the newest.
  step: int | None = None
  #: Evaluate on the test split instead of the validation split.
  test: bool = False
  #: Which targets of text count as associative recall: those whose token,
  #: bigram or trigram occurred before in their row. None: as the run has it.
  recall: Recall | None = None
  #: A bigram that occurs more often than this in the training text is not
  #: associative recall. `rebased count` makes the counts.
  recall_limit: int | None = None
  #: Evaluate although the data has changed.
  allow_data_change: bool = False
  #: Where the data is now, if it was moved.
  data: DataPlaces = DataPlaces()
  #: The mesh of devices, if it is not to be the run's.
  mesh: MeshConfig = MeshConfig()
  #: How this process finds the others: "off" if there are none, "auto" from
  #: the cluster, or HOST:PORT,N,I for process I of N.
  distributed: str = "off"
  #: Seconds to wait for the other processes at the start.
  join_timeout: float = processes.JOIN_TIMEOUT
  #: Seconds without any progress after which the process ends with exit code 4.
  #: None: never.
  step_timeout: float | None = STEP_TIMEOUT


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the run's data is not what it was.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  parsed, config = parse_run(EvaluateArgs, "evaluate", args)
  if isinstance(config.data, TextData):
    # A run folder may come from a stranger: it does not say where we write.
    data = dataclasses.replace(config.data, cache_dir=parsed.data.cache_dir)
    config = dataclasses.replace(config, data=data)
  config = with_recall(config, parsed.recall, parsed.recall_limit)
  processes.start(parsed.distributed, parsed.join_timeout)
  backend.devices()  # says so if there are none
  with Watchdog(parsed.step_timeout) as watch:
    return report.evaluate_run(
      config,
      RunFolder(parsed.run_dir),
      parsed.step,
      Console(),
      test=parsed.test,
      allow_data_change=parsed.allow_data_change,
      watch=watch,
    )


def with_recall(
  config: RunConfig, recall: Recall | None, limit: int | None
) -> RunConfig:
  """Return a run's config with another definition of associative recall.

  Args:
    config: the run.
    recall: the definition; None keeps the run's.
    limit: the new `recall_limit`. If `recall` is given, None means no limit.

  Raises:
    ValueError: the run's data is not text, or the definition is not one.
  """
  if recall is None and limit is None:
    return config
  if not isinstance(config.data, TextData):
    name, value = (
      ("recall_limit", limit) if recall is None else ("recall", recall)
    )
    kind = type(config.data).__name__
    raise ValueError(f"{name}={value!r}: expected none with {kind}")
  data = dataclasses.replace(
    config.data, recall=recall or config.data.recall, recall_limit=limit
  )
  return dataclasses.replace(config, data=data)
