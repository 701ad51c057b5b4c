"""`rebased evaluate RUN`: print the held-out loss and accuracy of a run.

With `--text`, or with other data than the run's, it prints the losses of whole
documents instead; see `evaluate_documents`.
"""

from collections.abc import Iterable
import dataclasses

from rich.console import Console

from rebased_jax.which_weights import Weights
from train.commands.arguments import (
  DataPlaces,
  RunArg,
  StepArg,
  check_model_is_there,
  parse_run,
)
from train.commands.parsing import parse
from train.config import RunConfig, TextData
from train.data.checks import require
from train.data.config import Recall
from train.devices.mesh_config import MeshConfig
from train.records.run_folder import RunFolder
from train.timeouts import JOIN_TIMEOUT, STEP_TIMEOUT

# What an evaluation that hangs leaves behind.
_LEFT = "nothing of the model was changed"


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
  """Print the held-out loss and accuracy of a run.

  With --text, or a --data.path that is not the run's data, print the losses of
  whole documents, of any length.
  """

  #: The run's folder. With --text or other data also an exported model.
  run_dir: RunArg
  #: The step of the checkpoint. "best": the best by the run's --keep-best, or
  #: by the held-out loss if it has none. None: the newest.
  step: StepArg = None
  #: The weights: trained, or ema for the average of a run with --ema.
  weights: Weights = "trained"
  #: Evaluate on the test split instead of the validation split.
  test: bool = False
  #: Which targets of text count as associative recall: those whose token,
  #: bigram or trigram occurred before in their row. None: as the run has it.
  recall: Recall | None = None
  #: A bigram that occurs more often than this in the training text is not
  #: associative recall. `rebased count` makes the counts.
  recall_limit: int | None = None
  #: Files of text to evaluate on: plain text, JSON lines, Parquet. None: no
  #: text.
  text: tuple[str, ...] | None = None
  #: "bytes", a tokenizer.json, or a folder that holds one, for --text. None:
  #: the copy in the data set or the exported model.
  tokenizer: str | None = None
  #: The token of --tokenizer that ends a document.
  eos: str = "auto"
  #: Documents of a batch, for --text and other data.
  rows: int = 8
  #: The most tokens of a document that run at a time, for --text and other
  #: data. Longer documents are read in pieces.
  piece: int = 1024
  #: A file for the losses by document, source and position, as JSON lines, for
  #: --text and other data.
  out: str | None = None
  #: Evaluate the held-out rows although the data has changed.
  allow_data_change: bool = False
  #: Where the data is now, if it was moved; or other data to evaluate on.
  data: DataPlaces = DataPlaces()
  #: The mesh of devices, if it is not to be the run's.
  mesh: MeshConfig = MeshConfig()
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
    ValueError: an argument is wrong, or the run's data is not what it was.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  asked = parse(EvaluateArgs, "rebased evaluate", args)
  paths = asked.data.path
  require(asked.text != (), "text", (), "one file or more")
  check_model_is_there(asked.run_dir)
  # Imported when the options are right: jax takes seconds.
  import jax

  from rebased_jax import model_files
  from train import best_checkpoint
  from train.commands import evaluate_documents
  from train.devices import backend, processes
  from train.heartbeat import on_stderr
  from train.records import report
  from train.watchdog import Watchdog

  # Before a checkpoint is read, which asks jax for the other processes.
  processes.start(asked.distributed, asked.join_timeout)
  step = best_checkpoint.find(asked.run_dir, asked.step)
  if asked.text or (
    paths
    and not asked.allow_data_change
    and evaluate_documents.is_other_data(paths, asked.run_dir, step)
  ):
    return _evaluate_documents(asked, step)
  if model_files.is_exported(asked.run_dir):
    raise ValueError(
      f"{asked.run_dir} is an exported model, which has no held-out rows: "
      "expected --text FILE or --data.path SET"
    )
  parsed, config = parse_run(EvaluateArgs, "evaluate", args)
  of_documents = ("tokenizer", "eos", "rows", "piece", "out")
  _check_unused(parsed, of_documents, "held-out rows")
  if isinstance(config.data, TextData):
    # A run folder may come from a stranger: it does not say where we write.
    data = dataclasses.replace(config.data, cache_dir=parsed.data.cache_dir)
    config = dataclasses.replace(config, data=data)
  config = with_recall(config, parsed.recall, parsed.recall_limit)
  backend.devices()  # says so if there are none
  first = jax.process_index() == 0
  with (
    Watchdog(parsed.step_timeout, _LEFT) as watch,
    on_stderr(watch.doing, active=first),
  ):
    return report.evaluate_run(
      config,
      RunFolder(parsed.run_dir),
      step,
      Console(),
      weights=parsed.weights,
      test=parsed.test,
      allow_data_change=parsed.allow_data_change,
      watch=watch,
    )


def _evaluate_documents(asked: EvaluateArgs, step: int | None) -> int:
  """Evaluate whole documents, and return the exit code.

  Args:
    asked: the arguments.
    step: the step of the checkpoint. None: the newest.
  """
  used = (
    *(
      "run_dir",
      "step",
      "weights",
      "text",
      "tokenizer",
      "eos",
      "rows",
      "piece",
      "out",
    ),
    *("step_timeout", *(() if asked.text else ("data",))),
  )
  names = (x.name for x in dataclasses.fields(asked) if x.name not in used)
  _check_unused(asked, names, "documents")
  held_out = asked.data.eval_path
  require(not held_out, "data.eval_path", held_out, "none: --data.path has all")
  from train import text_completion
  from train.commands import evaluate_documents
  from train.devices import backend
  from train.heartbeat import on_stderr
  from train.watchdog import Watchdog

  request = evaluate_documents.Request(
    asked.run_dir,
    text_completion.ModelSource(
      step, asked.tokenizer, asked.eos, asked.weights
    ),
    asked.text or (),
    asked.data.path,
    asked.rows,
    asked.piece,
    asked.out,
  )
  backend.devices()  # says so if there are none
  with (
    Watchdog(asked.step_timeout, _LEFT) as watch,
    on_stderr(watch.doing),
  ):
    return evaluate_documents.run(request, watch)


def _check_unused(asked: EvaluateArgs, names: Iterable[str], what: str) -> None:
  """Raise ValueError if an option is given that has no meaning here."""
  default = EvaluateArgs(asked.run_dir)
  for name in names:
    value, expected = getattr(asked, name), repr(getattr(default, name))
    expected += f", because it has no meaning for {what}"
    require(value == getattr(default, name), name, value, expected)


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
