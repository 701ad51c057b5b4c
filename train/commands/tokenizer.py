"""`rebased tokenizer train INPUT …`: train a BPE tokenizer on text."""

from collections.abc import Callable
from concurrent.futures import Future
import dataclasses
import os
import signal
import sys
import threading
from typing import Annotated, Any

import tyro

from train.commands.parsing import parse
from train.console import say, to_stdout
from train.data.prepare.train_tokenizer import (
  TokenizerTraining,
  train_tokenizer,
)

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

  SIGINT ends the process.
  """
  if not args or args[0] in ("-h", "--help"):
    print(_USAGE)
    return 0 if args else 2
  if args[0] != "train":
    raise ValueError(f"there is no command tokenizer {args[0]!r}: only train")
  parsed = parse(TokenizerArgs, "rebased tokenizer train", args[1:])
  console = to_stdout()
  try:
    with console.status("reading, then merging"):
      spec, sample = _in_thread(train_tokenizer, parsed.config, parsed.inputs)
  except KeyboardInterrupt:
    print("rebased: stopped; there is no new tokenizer", file=sys.stderr)
    sys.stderr.flush()
    # A normal exit would wait for the library, which cannot be interrupted.
    os._exit(128 + signal.SIGINT)
  say(
    console,
    f"{parsed.config.out}: {spec.vocab_size:,} tokens, from "
    f"{sample.documents:,} documents, {sample.bytes / 1e6:,.1f} MB, "
    f"{sample.skipped:,} skipped",
  )
  return 0


def _in_thread(function: Callable, *args: Any) -> Any:
  """Call a function in a thread; only so can a signal end the wait for it.

  Python handles signals between two steps of the main thread, and merging is
  one step that takes minutes.
  """
  result: Future = Future()

  def call() -> None:
    try:
      result.set_result(function(*args))
    except BaseException as error:  # noqa: BLE001  # the main thread raises it
      result.set_exception(error)

  threading.Thread(target=call, daemon=True).start()
  return result.result()
