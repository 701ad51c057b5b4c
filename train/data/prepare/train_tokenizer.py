"""Train a BPE tokenizer on a sample of text."""

from collections.abc import Iterator, Sequence
import dataclasses
from pathlib import Path
from typing import Literal

from rebased_jax.atomic import write_text
from train.data.checks import check_local, require
from train.data.prepare import tokenizer
from train.data.prepare.input_files import TEXT_SUFFIXES, Source, find_sources
from train.data.prepare.read_documents import Changed, Fields, Problem, read
from train.data.prepare.shard import PrepareError
from train.data.prepare.tokenizer import TokenizerSpec


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
  """How a tokenizer is trained."""

  #: The tokenizer.json to write; it must not exist.
  out: str
  #: Train on a corpus that is on this machine instead of inputs: "stdlib" is
  #: the source code of Python's standard library.
  corpus: Literal["stdlib"] | None = None
  #: The largest number of tokens, with the end of text and 256 bytes.
  vocab_size: int = 8192
  #: The text to train on in MiB, the same share from each source.
  sample_mb: int = 256
  #: The field of a record that holds the text. A dot enters a nested record.
  text_field: str = "text"
  #: The suffixes of plain text files in a folder.
  text_suffixes: tuple[str, ...] = TEXT_SUFFIXES
  #: What to do with malformed text: "fail" stops with an error, "skip" counts
  #: it and continues.
  on_error: Literal["fail", "skip"] = "fail"


class TextSample:
  """The first texts of each source, the same number of bytes of each.

  Attributes:
    bytes: the size of the texts that were read.
    documents: how many they are.
    skipped: how many records could not be read.
  """

  def __init__(
    self, sources: tuple[Source, ...], config: TokenizerTraining
  ) -> None:
    self._sources = sources
    self._config = config
    self.bytes = self.documents = self.skipped = 0

  def __iter__(self) -> Iterator[str]:
    """Yield the texts.

    Raises:
      PrepareError: a text is malformed, unless `on_error` is "skip".
    """
    share = (self._config.sample_mb << 20) // len(self._sources)
    fields = Fields(text=self._config.text_field)
    for source in self._sources:
      left = share
      for found in read(source, fields, _ignore, _ignore):
        if isinstance(found, Problem):
          if self._config.on_error == "fail":
            raise PrepareError(f"{found}; --on-error skip continues")
          self.skipped += found.lost
          continue
        size = len(found.text.encode())
        self.bytes += size
        self.documents += 1
        yield found.text
        left -= size
        if left <= 0:
          break


def train_tokenizer(
  config: TokenizerTraining, inputs: Sequence[str]
) -> tuple[TokenizerSpec, TextSample]:
  """Train a tokenizer and write its file.

  Args:
    config: how.
    inputs: files and folders of text; none with `config.corpus`.

  Returns:
    What identifies the tokenizer, and the text that was read.

  Raises:
    ValueError: an argument is wrong; nothing was changed.
    PrepareError: the text is malformed, or there is none.
    OSError: a file cannot be read or written.
  """
  check_local("out", config.out)
  out = Path(config.out)
  name = "a name that ends in .json"
  require(out.suffix == ".json", "out", config.out, name)
  if out.exists():
    raise ValueError(f"out={config.out!r}: it exists: expected a new file")
  require(config.sample_mb >= 1, "sample_mb", config.sample_mb, "at least 1")
  found = find_sources(inputs, config.corpus, config.text_suffixes)
  sample = TextSample(found.sources, config)
  try:
    text = tokenizer.train_bpe(sample, config.vocab_size)
  except Changed as error:
    raise PrepareError(str(error)) from error
  if not sample.documents:
    raise PrepareError("no document was found")
  out.parent.mkdir(parents=True, exist_ok=True)
  write_text(out, text)
  return tokenizer.load(config.out).spec, sample


def _ignore(_: object) -> None:
  """Do nothing: no progress is shown and no hash is kept."""
