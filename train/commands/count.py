"""The command `rebased count`."""

import dataclasses
from typing import Annotated

from rich.console import Console
import tyro

from train.console import say
from train.data.text import bigram_counts as bigrams


@dataclasses.dataclass(frozen=True)
class CountArgs:
  """Counts pairs of neighbouring tokens, and writes them beside the data set.

  Training and evaluation need it for --data.recall-limit and --recall-limit.
  """

  path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
  least: int = 1  # a pair that occurs less often is left out


def run_count(args: list[str]) -> int:
  """`rebased count`; returns the exit code."""
  parsed = tyro.cli(CountArgs, prog="rebased count", args=args)
  console = Console()
  with console.status("counting"):
    kept, total = bigrams.write(parsed.path, parsed.least)
  place = bigrams.table_path(parsed.path)
  size = place.stat().st_size / 1e6
  say(console, f"{place}: {kept:,} of {total:,} pairs, {size:,.1f} MB")
  return 0
