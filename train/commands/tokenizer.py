"""`rebased tokenizer train INPUT …`: train a BPE tokenizer on text."""

import dataclasses
from typing import Annotated

import tyro

from train.commands.parsing import parse
from train.console import say, to_stdout
from train.data.prepare.train_tokenizer import (
  TokenizerTraining,
  train_tokenizer,
)
from train.stop_signals import leaving_at_signals

_USAGE = "usage: rebased tokenizer train INPUT … --out tokenizer.json"


@dataclasses.dataclass(frozen=True)
class TokenizerArgs:
  """Train a byte-level BPE tokenizer on text."""

  config: Annotated[TokenizerTraining, tyro.conf.arg(name="")]
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
    PrepareError: the text is malformed, or there is none.
    OSError: a file cannot be read or written.

  A signal that stops a run ends the process, and leaves no tokenizer.
  """
  if not args or args[0] in ("-h", "--help"):
    print(_USAGE)
    return 0 if args else 2
  if args[0] != "train":
    raise ValueError(f"there is no command tokenizer {args[0]!r}: only train")
  parsed = parse(TokenizerArgs, "rebased tokenizer train", args[1:])
  console = to_stdout()
  # Merging is one call that takes minutes, and Python cannot interrupt it.
  leaving = leaving_at_signals(lambda code: console.show_cursor(True))
  with leaving, console.status("reading, then merging"):
    spec, sample = train_tokenizer(parsed.config, parsed.inputs)
  say(
    console,
    f"{parsed.config.out}: {spec.vocab_size:,} tokens, from "
    f"{sample.documents:,} documents, {sample.bytes / 1e6:,.1f} MB, "
    f"{sample.skipped:,} skipped",
  )
  return 0
