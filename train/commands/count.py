"""`rebased count PATH`: count the token pairs of a data set."""

import dataclasses
from typing import Annotated

from rich.console import Console
import tyro

from train.commands.parsing import parse
from train.console import say
from train.data.text import bigram_counts


@dataclasses.dataclass(frozen=True)
class CountArgs:
  """Count the pairs of neighbouring tokens, and write the counts to a file.

  The file lies beside the data set. Training and evaluation need it for
  --data.recall-limit and --recall-limit.
  """

  #: A folder from `rebased prepare`, or a Megatron index NAME.idx.
  path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
  #: Leave out pairs that occur less often than this.
  least: int = 1


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: there is no data set, or it cannot be used.
    OSError: the counts cannot be written.
  """
  parsed = parse(CountArgs, "rebased count", args)
  console = Console()
  with console.status("counting"):
    kept, total = bigram_counts.write(parsed.path, parsed.least)
  table = bigram_counts.table_path(parsed.path)
  size = table.stat().st_size / 1e6
  say(console, f"{table}: {kept:,} of {total:,} pairs, {size:,.1f} MB")
  return 0
