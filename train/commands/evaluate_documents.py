"""`rebased evaluate RUN --text FILE`, and on other data than the run's.

Both read whole documents, each from its beginning, whatever their lengths.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import IO

from rich import table
from rich.console import Console
from rich.text import Text

from rebased_jax import model_files
from train import console, text_completion, text_evaluation
from train.data.prepare.tokenizer import Tokenizer
from train.data.text.rows import open_source
from train.data.text.token_source import TokenSource
from train.text_completion import ModelSource
from train.text_evaluation import Document, Ends, Found, Sums
from train.watchdog import Watchdog

#: The most documents that a table shows.
_MOST_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Request:
  """The documents to evaluate, and how.

  Attributes:
    run_dir: the folder of a run, or an exported model.
    source: which checkpoint and tokenizer are used.
    text: files of text. Empty: `paths` has the documents.
    paths: prepared data sets and Megatron indices.
    rows: documents of a batch.
    piece: the most tokens of a document that run at a time.
    out: a file for the losses as JSON lines. None: no file.
  """

  run_dir: str
  source: ModelSource
  text: tuple[str, ...] = ()
  paths: tuple[str, ...] = ()
  rows: int = 8
  piece: int = 1024
  out: str | None = None


def is_other_data(
  paths: tuple[str, ...], run_dir: str, step: int | None
) -> bool:
  """Whether data sets are not the training data of a run, even if moved.

  Args:
    paths: the data sets.
    run_dir: the folder of a run, or an exported model, which knows no data.
    step: the step of the checkpoint that knows the data. None: the newest.

  Raises:
    ValueError: the run is not on text, or a data set cannot be read.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  if model_files.is_exported(run_dir):
    return True
  _, data, meta = text_completion.read_run(run_dir, step)
  if len(paths) != len(data.path):
    return True
  for i, path in enumerate(paths):
    start = f"path{i}." if len(paths) > 1 else ""
    for field, value in open_source(path, data.packing).fingerprint.items():
      if meta["data"].get(start + field) != value:
        return True
  return False


def run(request: Request, watch: Watchdog) -> int:
  """Evaluate documents, print the losses, and return 0.

  Args:
    request: what is to be evaluated.
    watch: is told of every batch.

  Raises:
    ValueError: the text, the data or the model does not fit.
    CheckpointError: there is no such checkpoint, or it is unreadable.
    OSError: a file cannot be read or written.
  """
  documents = _documents(request)
  source = request.source
  model = model_files.load(request.run_dir, source.step, weights=source.weights)
  shown: list[tuple[str, Sums]] = []
  with contextlib.ExitStack() as stack:
    file = None
    if request.out is not None:
      file = stack.enter_context(Path(request.out).open("w"))

    def note(document: Document, sums: Sums) -> None:
      if len(shown) <= _MOST_SHOWN:
        shown.append((document.name, sums))
      _write(file, "document", document.name, sums, source=document.source)

    found = text_evaluation.evaluate(
      model,
      documents,
      rows=request.rows,
      piece=request.piece,
      on_piece=lambda: watch.beat("evaluation"),
      on_document=note,
    )
    for name, sums in found.sources.items():
      _write(file, "source", name, sums)
    for name, sums in _by_position(found):
      _write(file, "position", name, sums)
    _write(file, "total", request.run_dir, found.total)
  _print(request, found, shown)
  return 0


def _documents(request: Request) -> Iterable[Document]:
  """Return the documents of a request; nothing of the text is read yet."""
  run_dir, source = request.run_dir, request.source
  data = None
  if not model_files.is_exported(run_dir):
    _, data, meta = text_completion.read_run(run_dir, source.step)
    known = text_completion.recorded_tokenizers(meta["data"])
    if request.paths and not known and source.tokenizer is None:
      # Data in Megatron's format: only the bytes of the text stay unknown.
      sources = [open_source(path) for path in request.paths]
      return text_evaluation.documents_of_sources(sources, None, Ends(), None)
  _, tokenizer, eos = text_completion.read_text_model(run_dir, source)
  follow_each_other = data is None or data.packing == "stream"
  ends = Ends(before=eos if follow_each_other else None, after=eos)
  if request.text:
    return text_evaluation.documents_of_files(request.text, tokenizer, ends)
  sources = [open_source(path) for path in request.paths]
  for each in sources:
    _check_tokenizer(each, tokenizer)
  return text_evaluation.documents_of_sources(sources, tokenizer, ends, eos)


def _check_tokenizer(source: TokenSource, tokenizer: Tokenizer) -> None:
  """Raise ValueError if another tokenizer made a data set."""
  sha256 = source.fingerprint.get("tokenizer")
  if sha256 is not None and sha256 != tokenizer.spec.sha256:
    raise ValueError(
      f"{source.name}: its tokenizer's SHA-256 is {str(sha256)[:16]}…: "
      f"expected {tokenizer.spec.sha256[:16]}…, that of the model's tokenizer "
      f"{tokenizer.spec.name}: prepare the text again with it"
    )


def _write(
  file: IO[str] | None, kind: str, name: str, sums: Sums, **more: str
) -> None:
  """Write one line of JSON, if there is a file."""
  if file is not None:
    record = {"kind": kind, "name": name, **more, **sums.record()}
    file.write(json.dumps(record) + "\n")


def _by_position(found: Found) -> list[tuple[str, Sums]]:
  """Return the losses by the number of tokens before, with the range."""
  names = {i: f"{1 << i:,} to {(2 << i) - 1:,}" for i in found.positions}
  names[0] = "1"
  return [(names[i], found.positions[i]) for i in sorted(found.positions)]


def _print(
  request: Request, found: Found, shown: list[tuple[str, Sums]]
) -> None:
  """Print the tables."""
  out = Console()
  total = found.total
  values = {
    "loss": f"{total.loss:.4f}",
    "perplexity": f"{total.perplexity:.4f}",
    "bits per byte": _bits(total),
    "predicted tokens": f"{total.tokens:,}",
    "documents": f"{found.documents:,}",
  }
  if found.left_out:
    values["documents without a predicted token"] = f"{found.left_out:,}"
  title = f"{request.run_dir} on {', '.join(request.text or request.paths)}"
  out.print(console.rows(title, values))
  out.print(_table("tokens before", _by_position(found)))
  if len(found.sources) > 1:
    out.print(_table("source", list(found.sources.items())))
  if 1 < len(shown) <= _MOST_SHOWN:
    out.print(_table("document", shown))


def _table(name: str, entries: list[tuple[str, Sums]]) -> table.Table:
  """Return a table of losses."""
  result = table.Table()
  result.add_column(name, overflow="fold")
  has_bytes = any(sums.bytes for _, sums in entries)
  columns = ["tokens", "loss", "perplexity"]
  columns += ["bits per byte"] * has_bytes
  for column in columns:
    result.add_column(column, justify="right")
  for title, sums in entries:
    numbers = [f"{sums.tokens:,}", f"{sums.loss:.4f}", f"{sums.perplexity:.2f}"]
    result.add_row(Text(title), *numbers, *[_bits(sums)] * has_bytes)
  return result


def _bits(sums: Sums) -> str:
  bits = sums.bits_per_byte
  return "unknown" if bits is None else f"{bits:.4f}"
