"""The commands `rebased prepare` and `tokenizer train`; they load no jax."""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
import sys
from typing import Annotated, Literal

from rich.console import Console
import tyro

from train.console import say
from train.data.prepare import tokenizer
from train.data.prepare.input_files import TEXT_SUFFIXES, Source, find_sources
from train.data.prepare.read_documents import Changed, Fields, Problem, read
from train.data.prepare.prepare_dataset import PrepareConfig, prepare
from train.data.prepare.shard import PrepareError

_Inputs = Annotated[
  tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")
]


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
  """Tokenises text into a folder that training reads.

  The same command goes on where a stopped one was.
  """

  config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
  inputs: _Inputs = ()  # .jsonl, .jsonl.gz, .jsonl.zst, .parquet, text, folders


@dataclasses.dataclass(frozen=True)
class TokenizerArgs:
  """Learns a byte-level BPE tokenizer from text."""

  out: str  # the tokenizer.json to write
  inputs: _Inputs = ()  # .jsonl, .jsonl.gz, .jsonl.zst, .parquet, text, folders
  corpus: Literal["stdlib"] | None = None  # in place of inputs
  vocab_size: int = 8192  # tokens, the end of text and 256 bytes among them
  sample_mb: int = 256  # of text, from all inputs alike
  text_field: str = "text"  # of a record; a dot goes into a nested one
  text_suffixes: tuple[str, ...] = TEXT_SUFFIXES  # plain text in a folder
  on_error: Literal["fail", "skip"] = "fail"  # skipped ones are counted


def run_prepare(args: list[str]) -> int:
  """`rebased prepare`; returns the exit code."""
  parsed = tyro.cli(PrepareArgs, prog="rebased prepare", args=args)
  try:
    prepare(parsed.config, parsed.inputs, Console())
  except PrepareError as error:
    return _failed(error)
  return 0


def run_tokenizer(args: list[str]) -> int:
  """`rebased tokenizer train`; returns the exit code."""
  if not args or args[0] in ("-h", "--help"):
    print("usage: rebased tokenizer train INPUT … --out tokenizer.json")
    return 0 if args else 2
  if args[0] != "train":
    raise ValueError(f"there is no command tokenizer {args[0]!r}: only train")
  parsed = tyro.cli(
    TokenizerArgs, prog="rebased tokenizer train", args=args[1:]
  )
  try:
    return _train_tokenizer(parsed, Console())
  except (PrepareError, Changed) as error:
    return _failed(error)


def _failed(error: Exception) -> int:
  print(f"rebased: {error}", file=sys.stderr)
  return 1


class _Sample:
  """The first texts of every source, the same share of each."""

  def __init__(self, sources: tuple[Source, ...], args: TokenizerArgs):
    self._sources = sources
    self._args = args
    self.bytes = self.documents = self.skipped = 0

  def __iter__(self) -> Iterator[str]:
    share = (self._args.sample_mb << 20) // len(self._sources)
    fields = Fields(text=self._args.text_field)
    nothing = lambda _: None
    for source in self._sources:
      left = share
      for found in read(source, fields, nothing, nothing):
        if isinstance(found, Problem):
          if self._args.on_error == "fail":
            raise PrepareError(f"{found}; --on-error skip goes on")
          self.skipped += found.lost
          continue
        size = len(found.text.encode())
        self.bytes += size
        self.documents += 1
        yield found.text
        left -= size
        if left <= 0:
          break


def _train_tokenizer(args: TokenizerArgs, console: Console) -> int:
  out = Path(args.out)
  if out.suffix != ".json":
    raise ValueError(f"out={args.out!r}: expected a name that ends in .json")
  if out.exists():
    raise ValueError(f"out={args.out!r}: it exists: expected a new file")
  if args.sample_mb < 1:
    raise ValueError(f"sample_mb={args.sample_mb}: expected at least 1")
  found = find_sources(args.inputs, args.corpus, args.text_suffixes)
  sample = _Sample(found.sources, args)
  with console.status("reading, then merging"):
    text = tokenizer.train_bpe(sample, args.vocab_size)
  if not sample.documents:
    raise PrepareError("no document was found")
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_name(f"{out.name}.tmp")
  temporary.write_text(text)
  temporary.replace(out)
  spec = tokenizer.load(args.out).spec
  say(
    console,
    f"{out}: {spec.vocab_size:,} tokens, from {sample.documents:,} documents, "
    f"{sample.bytes / 1e6:,.1f} MB, {sample.skipped:,} skipped",
  )
  return 0
