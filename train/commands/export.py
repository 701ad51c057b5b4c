"""`rebased export RUN`: write a run's model to a folder for any program."""

import dataclasses
from pathlib import Path

from rich.console import Console

from rebased_jax.which_weights import Weights
from train.commands.arguments import (
  RunArg,
  StepArg,
  check_model_is_there,
)
from train.commands.parsing import parse
from train.console import say


@dataclasses.dataclass(frozen=True)
class ExportArgs:
  """Write a run's model as safetensors, config.json and its tokenizer.

  `rebased_jax.load` reads the folder, and so do `generate` and --init-from.
  """

  #: The run's folder.
  run_dir: RunArg
  #: The folder to write: a new one.
  out: str
  #: The step of the checkpoint. "best": the best by the run's --keep-best, or
  #: by the held-out loss if it has none. None: the newest.
  step: StepArg = None
  #: The weights: trained, or ema for the average of a run with --ema.
  weights: Weights = "trained"
  #: "bytes", a tokenizer.json, or a folder that holds one. None: the copy in
  #: the data set. "none": write no tokenizer.
  tokenizer: str | None = None
  #: The token of --tokenizer that ends a document.
  eos: str = "auto"
  #: The size in MB above which the weights are several files.
  max_file_mb: int = 5000


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the folder is there already.
    CheckpointError: there is no such checkpoint, or it is unreadable.
    OSError: the folder cannot be written.
  """
  parsed = parse(ExportArgs, "rebased export", args)
  check_model_is_there(parsed.run_dir)
  # Imported when the options are right: jax takes seconds.
  from rebased_jax import parameter_count
  from train import best_checkpoint, export_model
  from train.text_completion import ModelSource

  step = best_checkpoint.find(parsed.run_dir, parsed.step)
  model, step = export_model.export(
    parsed.run_dir,
    parsed.out,
    ModelSource(step, parsed.tokenizer, parsed.eos, parsed.weights),
    max_file_bytes=parsed.max_file_mb * 1_000_000,
  )
  console = Console()
  count = parameter_count(model)
  say(console, f"step {step} of {parsed.run_dir}: {count:,} parameters")
  say(console, describe(parsed.out))
  return 0


def describe(out: str) -> str:
  """Return a line for each file of an exported model, and its tokenizer."""
  from rebased_jax.model_files import read_info

  lines = [
    f"  {file}  {file.stat().st_size:,} bytes"
    for file in sorted(Path(out).iterdir())
  ]
  tokenizer = read_info(out).tokenizer
  name = "none" if tokenizer is None else tokenizer.type
  return "\n".join([*lines, f"  tokenizer: {name}"])
