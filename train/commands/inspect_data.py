"""`rebased inspect data`: what is in a data set of tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.console import rows
from train.data.prepare.tokenizer import load_recorded
from train.data.text.prepared_source import PreparedSource
from train.data.text.megatron_source import MegatronSource
from train.data.text.packing import stream_plan
from train.data.text.rows import fill_pieces, open_source
from train.data.text.token_source import TokenSource

_BORDER = "▌"  # stands between the documents of a sample
_QUANTILES = {
  "least": 0.0,
  "10 %": 0.1,
  "median": 0.5,
  "90 %": 0.9,
  "most": 1.0,
}

Decode = Callable[[Sequence[int]], str]


def show(path: str, console: Console, *, length: int, verify: bool) -> int:
  """Prints counts, lengths, domains and a decoded sample of a data set.

  Args:
    path: a prepared folder, or a Megatron index.
    console: where to.
    length: tokens of the sample.
    verify: reads every byte of a prepared set and compares its checksums.

  Raises:
    DataError: there is no data set, or it is not sound.
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
    if not isinstance(source, PreparedSource):
      raise ValueError(f"{path}: Megatron's format has no checksums to verify")
    source.verify()
    console.print(f"all {len(source.shards)} shards have their checksums")
  _sample(source, length, console)
  return 0


def _summary(source: TokenSource) -> dict[str, object]:
  """What the files say of themselves."""
  tokens = int(source.lengths.sum(dtype=np.int64))
  values: dict[str, object] = {
    "documents": f"{len(source):,}",
    "tokens": f"{tokens:,}",
  }
  if isinstance(source, PreparedSource):
    data = source.sidecar
    values |= {x: f"{data[x]:,}" for x in ("documents", "tokens")}
    if source.row_length is not None:
      values |= {
        "rows": f"{len(source):,} of {source.row_length} + 1 tokens",
        "tokens behind the last rows": f"{data.get('left_over', 0):,}",
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
  """Quantiles of the lengths of the documents."""
  table = Table(title="tokens of a document", title_justify="left")
  points = np.quantile(lengths_n, list(_QUANTILES.values()), method="nearest")
  for name in (*_QUANTILES, "mean"):
    table.add_column(name, justify="right")
  table.add_row(*(f"{int(x):,}" for x in points), f"{lengths_n.mean():,.1f}")
  return table


def _domains(sidecar: dict[str, Any]) -> Table:
  """Documents and tokens of each domain."""
  table = Table(title="domains", title_justify="left")
  for column in ("domain", "documents", "tokens", "share of tokens"):
    table.add_column(column, justify="left" if column == "domain" else "right")
  total = max(sidecar["tokens"], 1)
  for name in sidecar["domain_names"]:
    found = [x["domains"].get(name, {}) for x in sidecar["shards"]]
    documents, tokens = (
      sum(x.get(field, 0) for x in found) for field in ("documents", "tokens")
    )
    table.add_row(
      name, f"{documents:,}", f"{tokens:,}", f"{tokens / total:.1%}"
    )
  return table


def _sample(source: TokenSource, length: int, console: Console) -> None:
  """Tokens around the start of the middle document, with the borders.

  Of rows, which may share tokens, the first tokens of the middle one.
  """
  total = int(source.lengths.sum(dtype=np.int64))
  width = None if source.row_length is None else source.row_length + 1
  length = min(length, width or total)
  if length < 2:
    console.print("no sample: it has no two tokens")
    return
  plan = stream_plan(length, source.lengths, np.arange(len(source)))
  begin = int(plan.start_n[len(plan.document_n) // 2])
  if width is None:
    begin = min(max(begin - length // 2, 0), total - length)
  row = fill_pieces(source, *plan.pieces_at(np.array([begin])), (1, length))
  document_P, start_P, _, place_P = row.pieces
  tokens_N, borders = row.tokens_RW[0], place_P[1:]
  where = f"documents {document_P[0]} to {document_P[-1]}, from token "
  where += f"{start_P[0]} of the first"
  if width is not None:
    borders = np.flatnonzero(tokens_N[:-1] == _end(source)) + 1
    where = f"row {document_P[0]}"
  decode, note = decoder(source)
  text = Text()
  for i, part in enumerate(np.split(tokens_N, borders)):
    text.append(_BORDER if i else "", style="bold red")
    text.append(decode(part.tolist()))
  console.print(
    f"\nsample: {length} tokens, {where}; {_BORDER} is a border between "
    f"documents{note}",
    highlight=False,
    soft_wrap=True,
  )
  console.print(text, soft_wrap=True)


def decoder(source: TokenSource) -> tuple[Decode, str]:
  """How to show tokens as text, and a note where that cannot be."""
  numbers = lambda tokens: " ".join(map(str, tokens))
  if not isinstance(source, PreparedSource):
    return numbers, "; the format has no tokenizer, so tokens are numbers"
  eos = _end(source)
  try:
    tokenizer = load_recorded(source.path, source.sidecar["tokenizer"])
  except ValueError as error:
    return numbers, f"; tokens are numbers: {error}"
  return lambda tokens: tokenizer.decode([x for x in tokens if x != eos]), ""


def _end(source: PreparedSource) -> int | None:
  """The token that ends a document."""
  return source.sidecar.get("eos")
