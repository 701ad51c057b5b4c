"""`rebased prepare INPUT … --out OUT`: turn text into tokens for training."""

import dataclasses
import signal
from types import FrameType
from typing import Annotated

import tyro

from train.commands.parsing import parse
from train.console import to_stdout
from train.data.prepare.prepare_dataset import PrepareConfig, prepare
from train.stop_signals import polite_signals


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
  """Turn text into a folder of tokens that training reads.

  Repeat the same command to continue after it was stopped.
  """

  config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
  #: Files and folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, plain text.
  inputs: Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")
  ] = ()


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong; nothing was changed.
    PrepareError: the text is malformed.
    OSError: a file cannot be read or written.
    KeyboardInterrupt: SIGINT, SIGTERM, SIGHUP or SIGUSR1 came; finished
      shards stay.
  """
  parsed = parse(PrepareArgs, "rebased prepare", args)
  numbers = (signal.SIGTERM, *polite_signals())
  before = {number: signal.signal(number, _interrupt) for number in numbers}
  try:
    # The data set is finished even if nobody reads the output any more.
    prepare(parsed.config, parsed.inputs, to_stdout())
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
  """Stop on a signal as on Ctrl-C; the exception carries the signal."""
  raise KeyboardInterrupt(number)
