"""`rebased inspect data PATH`: show what a data set of tokens holds."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
import tyro

from train.commands.parsing import parse
from train.console import rows, say
from train.data.prepare.tokenizer import load_recorded
from train.data.text.megatron_source import MegatronSource
from train.data.text.packing import stream_plan
from train.data.text.prepared_source import PreparedSource
from train.data.text.rows import fill_pieces, open_source
from train.data.text.token_source import TokenSource

_BOUNDARY = "▌"  # stands between the documents of a sample
_QUANTILES = {
  "least": 0.0,
  "10 %": 0.1,
  "median": 0.5,
  "90 %": 0.9,
  "most": 1.0,
}

Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class InspectDataArgs:
  """Show a data set: counts, lengths, domains, and a decoded sample."""

  #: A folder from `rebased prepare`, or a Megatron index NAME.idx.
  path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
  #: The number of tokens in the sample.
  length: int = 256
  #: Read every byte and compare it with the data set's checksums.
  verify: bool = False


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after `inspect data`.

  Raises:
    DataError: there is no data set, or it is damaged.
    ValueError: an argument is wrong.
  """
  parsed = parse(InspectDataArgs, "rebased inspect data", args)
  show(parsed.path, Console(), length=parsed.length, verify=parsed.verify)
  return 0


def show(path: str, console: Console, *, length: int, verify: bool) -> None:
  """Print counts, lengths, domains and a decoded sample of a data set.

  Args:
    path: a prepared folder, or a Megatron index.
    console: where to print.
    length: the number of tokens in the sample.
    verify: read every byte of a prepared set and compare its checksums.

  Raises:
    DataError: there is no data set, or it is damaged.
    ValueError: `length` is below 1, or `verify` has nothing to compare.
  """
  if length < 1:
    raise ValueError(f"length={length}: expected 1 or more")
  source = open_source(path)
  console.print(rows(path, _summary(source)))
  if source.row_length is None:
    console.print(_lengths(source.lengths))
  if isinstance(source, PreparedSource) and source.sidecar.get("domain_names"):
    console.print(_domains(source.sidecar))
  if verify:
    source.verify()
    say(console, f"all {len(source.shards)} shards match their checksums")
  _sample(source, length, console)


def _summary(source: TokenSource) -> dict[str, object]:
  """Return what the data set says about itself, by name."""
  tokens = int(source.lengths.sum(dtype=np.int64))
  values: dict[str, object] = {
    "documents": f"{len(source):,}",
    "tokens": f"{tokens:,}",
  }
  if isinstance(source, PreparedSource):
    data = source.sidecar
    # A row is a record of the files, so these counts differ from the above.
    values |= {x: f"{data[x]:,}" for x in ("documents", "tokens")}
    if source.row_length is not None:
      values |= {
        "rows": f"{len(source):,} of {source.row_length} + 1 tokens",
        "tokens after the last rows": f"{data.get('left_over', 0):,}",
      }
    values |= {
      "skipped": f"{data.get('skipped', 0):,}",
      "shards": f"{len(source.shards):,}",
      "dtype": data["dtype"],
      "vocabulary": f"{data['vocab_size']:,}",
      "end of text": data.get("eos"),
      "tokenizer": data["tokenizer"]["name"],
      "tokenizer's SHA-256": data["tokenizer"]["sha256"][:16],
    }
  if isinstance(source, MegatronSource):
    values |= {
      "sequences": f"{source.sequences:,}",
      "shards": f"{len(source.shards):,}",
      "dtype": source.dtype,
    }
  return values


def _lengths(lengths_n: np.ndarray) -> Table:
  """Return a table of the quantiles of the documents' lengths (n,)."""
  table = Table(title="tokens of a document", title_justify="left")
  points = np.quantile(lengths_n, list(_QUANTILES.values()), method="nearest")
  for name in (*_QUANTILES, "mean"):
    table.add_column(name, justify="right")
  table.add_row(*(f"{int(x):,}" for x in points), f"{lengths_n.mean():,.1f}")
  return table


def _domains(sidecar: dict[str, Any]) -> Table:
  """Return a table of the documents and tokens of each domain."""
  table = Table(title="domains", title_justify="left")
  for column in ("domain", "documents", "tokens", "share of tokens"):
    table.add_column(column, justify="left" if column == "domain" else "right")
  total = max(sidecar["tokens"], 1)
  for name in sidecar["domain_names"]:
    found = [x.get("domains", {}).get(name, {}) for x in sidecar["shards"]]
    documents, tokens = (
      sum(x.get(field, 0) for x in found) for field in ("documents", "tokens")
    )
    table.add_row(
      Text(name), f"{documents:,}", f"{tokens:,}", f"{tokens / total:.1%}"
    )
  return table


def _sample(source: TokenSource, length: int, console: Console) -> None:
  """Print the text around the start of the middle document.

  Of a data set of rows, print the beginning of the middle row.
  """
  total = int(source.lengths.sum(dtype=np.int64))
  width = None if source.row_length is None else source.row_length + 1
  length = min(length, width or total)
  if length < 2:
    say(console, "no sample: the data set has fewer than two tokens")
    return
  plan = stream_plan(length, source.lengths, np.arange(len(source)))
  begin = int(plan.start_n[len(plan.document_n) // 2])
  if width is None:
    begin = min(max(begin - length // 2, 0), total - length)
  row = fill_pieces(source, *plan.pieces_at(np.array([begin])), (1, length))
  document_P, start_P, _, place_P = row.pieces
  tokens_N, boundaries = row.tokens_RW[0], place_P[1:]
  where = f"documents {document_P[0]} to {document_P[-1]}, from token "
  where += f"{start_P[0]} of the first"
  if width is not None:
    boundaries = np.flatnonzero(tokens_N[:-1] == _end(source)) + 1
    where = f"row {document_P[0]}"
  decode, note = decoder(source)
  text = Text()
  for i, part in enumerate(np.split(tokens_N, boundaries)):
    if i:
      text.append(_BOUNDARY, style="bold red")
    text.append(decode(part.tolist()))
  say(
    console,
    f"\nsample: {length} tokens, {where}; {_BOUNDARY} is a boundary between "
    f"documents{note}",
  )
  console.print(text, soft_wrap=True)


def decoder(source: TokenSource) -> tuple[Decode, str]:
  """Return a function that shows tokens as text, and a note for the reader.

  Args:
    source: the data set. If its tokenizer cannot be loaded, tokens are shown as
      numbers, and the note says why.
  """
  if not isinstance(source, PreparedSource):
    return _numbers, "; the format has no tokenizer, so tokens are numbers"
  eos = _end(source)
  try:
    tokenizer = load_recorded(source.path, source.sidecar["tokenizer"])
  except ValueError as error:
    return _numbers, f"; tokens are numbers: {error}"
  return lambda tokens: tokenizer.decode([x for x in tokens if x != eos]), ""


def _numbers(tokens: Sequence[int]) -> str:
  """Return tokens as numbers."""
  return " ".join(map(str, tokens))


def _end(source: PreparedSource) -> int | None:
  """Return the token that ends a document; None if no token does."""
  return source.sidecar.get("eos")
