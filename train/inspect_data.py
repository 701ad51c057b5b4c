"""`rebased inspect data`: what is in a data set of tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.console import rows
from train.data.arrayrecord import PreparedSource
from train.data.megatron import MegatronSource
from train.data.plan import stream_plan
from train.data.rows import fill_pieces, open_source
from train.data.source import TokenSource

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
  console.print(_lengths(source.lengths))
  if isinstance(source, PreparedSource) and source.domains is not None:
    console.print(_domains(source))
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


def _domains(source: PreparedSource) -> Table:
  """Documents and tokens of each domain."""
  names = source.sidecar["domain_names"]
  documents = np.bincount(source.domains, minlength=len(names))
  tokens = np.bincount(source.domains, source.lengths, minlength=len(names))
  table = Table(title="domains", title_justify="left")
  for column in ("domain", "documents", "tokens", "share of tokens"):
    table.add_column(column, justify="left" if column == "domain" else "right")
  total = max(tokens.sum(), 1)
  for name, count, size in zip(names, documents, tokens, strict=True):
    table.add_row(name, f"{count:,}", f"{size:,.0f}", f"{size / total:.1%}")
  return table


def _sample(source: TokenSource, length: int, console: Console) -> None:
  """Tokens around the start of the middle document, with the borders."""
  everything = np.arange(len(source))
  total = int(source.lengths.sum(dtype=np.int64))
  length = min(length, total)
  if length < 2:
    console.print("no sample: it has no two tokens")
    return
  plan = stream_plan(length, source.lengths, everything)
  border = int(plan.start_n[len(plan.document_n) // 2])
  begin = min(max(border - length // 2, 0), total - length)
  row = fill_pieces(source, *plan.pieces_at(np.array([begin])), (1, length))
  decode, note = decoder(source)
  text = Text()
  document_P, start_P, length_P, place_P = row.pieces
  for size, place in zip(length_P.tolist(), place_P.tolist(), strict=True):
    text.append(_BORDER if place else "", style="bold red")
    text.append(decode(row.tokens_RW[0, place : place + size].tolist()))
  console.print(
    f"\nsample: {length} tokens, documents {document_P[0]} to "
    f"{document_P[-1]}, from token {start_P[0]} of the first; {_BORDER} is a "
    f"border between documents{note}",
    highlight=False,
    soft_wrap=True,
  )
  console.print(text, soft_wrap=True)


def decoder(source: TokenSource) -> tuple[Decode, str]:
  """How to show tokens as text, and a note where that cannot be."""
  numbers = lambda tokens: " ".join(map(str, tokens))
  if not isinstance(source, PreparedSource):
    return numbers, "; the format has no tokenizer, so tokens are numbers"
  if source.sidecar["tokenizer"]["name"] == "bytes":
    return _decode_bytes, ""
  path = Path(source.path) / "tokenizer.json"
  try:
    from tokenizers import Tokenizer
  except ImportError:
    return numbers, "; without the package tokenizers, tokens are numbers"
  if not path.exists():
    return numbers, f"; there is no {path}, so tokens are numbers"
  return Tokenizer.from_file(str(path)).decode, ""


def _decode_bytes(tokens: Sequence[int]) -> str:
  """The text of bytes; what is no byte, as the end of text, is left out."""
  raw = bytes(token for token in tokens if token < 256)
  return raw.decode("utf-8", errors="replace")
