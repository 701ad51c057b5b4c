"""The losses of whole documents: by position, per document and per source.

    loss          = Σ nll / predicted tokens        in nats
    perplexity    = exp(loss)
    bits per byte = Σ nll / (ln 2 · bytes)          bytes of the text in UTF-8

A model reads each document from its beginning, in pieces with the state carried
if it is long. Where documents follow each other in the training rows (packing
"stream"), the end of text comes first, so that the first token is predicted,
too. Otherwise nothing was before it in training, and it is not predicted. Every
document ends with the end of text if the data set's documents do.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import math
from pathlib import Path

import numpy as np

from rebased_jax import LM
from rebased_jax.evaluate import longest_text, token_losses
from train.data.prepare.input_files import find_sources
from train.data.prepare.read_documents import Fields, Problem, read
from train.data.prepare.tokenizer import Tokenizer
from train.data.text.token_source import TokenSource

#: Documents that are held in memory and sorted by length.
_MOST_DOCUMENTS, _MOST_TOKENS = 4096, 1 << 22
#: The longest document of a file, in bytes.
_LONGEST = 1 << 40


@dataclasses.dataclass(frozen=True)
class Document:
  """A document as a model reads it."""

  #: The name in messages and records.
  name: str
  #: The data set or file that it comes from.
  source: str
  #: int32 (length,).
  tokens: np.ndarray
  #: The bytes of text that the predicted tokens stand for. None: unknown.
  bytes: int | None


@dataclasses.dataclass
class Sums:
  """Sums over predicted tokens."""

  #: Σ −log p in nats.
  nll: float = 0.0
  #: The number of predicted tokens.
  tokens: int = 0
  #: The bytes of their text. None: unknown.
  bytes: int | None = None

  def add(self, nll: float, tokens: int, size: int | None = None) -> None:
    """Add the sums of more tokens."""
    self.nll += nll
    self.tokens += tokens
    if size is not None:
      self.bytes = (self.bytes or 0) + size

  @property
  def loss(self) -> float:
    """The mean loss in nats."""
    return self.nll / self.tokens

  @property
  def perplexity(self) -> float:
    """exp(loss), or infinity where that is beyond floats."""
    return math.exp(self.loss) if not self.loss >= 700 else math.inf

  @property
  def bits_per_byte(self) -> float | None:
    """Σ nll / (ln 2 · bytes); None if the bytes are unknown."""
    return self.nll / math.log(2) / self.bytes if self.bytes else None

  def record(self) -> dict[str, float | int | None]:
    """Return the numbers, as JSON has them."""
    return {
      "loss": self.loss,
      "perplexity": self.perplexity,
      "bits_per_byte": self.bits_per_byte,
      "tokens": self.tokens,
      "bytes": self.bytes,
    }


@dataclasses.dataclass
class Found:
  """The losses of some documents."""

  #: Documents with a predicted token.
  documents: int = 0
  #: Documents without one, such as empty ones.
  left_out: int = 0
  #: Sums over all predicted tokens.
  total: Sums = dataclasses.field(default_factory=Sums)
  #: Sums by the name of the source.
  sources: dict[str, Sums] = dataclasses.field(default_factory=dict)
  #: Sums by place: entry i has the tokens that 2^i to 2^(i+1) − 1 others
  #: precede.
  positions: dict[int, Sums] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ends:
  """The tokens around a document."""

  #: Comes before each document. None: nothing.
  before: int | None = None
  #: Comes after the text of a file. None: nothing.
  after: int | None = None


def documents_of_files(
  paths: Sequence[str], tokenizer: Tokenizer, ends: Ends
) -> Iterator[Document]:
  """Yield the documents of files that `rebased prepare` can read.

  Plain text is one document a file, whatever its suffix; JSON lines and
  Parquet are one a record.

  Args:
    paths: the files.
    tokenizer: turns text into tokens.
    ends: the tokens around each document.

  Raises:
    ValueError: a file is missing, empty, no UTF-8 or no text, or the tokenizer
      fails on it.
    OSError: a file cannot be read.
  """
  for path in paths:
    if Path(path).is_dir():
      raise ValueError(f"{path} is a folder: expected files of text")
  for source in find_sources(paths).sources:
    for found in read(source, Fields(most_bytes=_LONGEST), _drop, _drop):
      if isinstance(found, Problem):
        hint = "" if "expected" in found.reason else ": expected text in UTF-8"
        raise ValueError(f"{found}{hint}")
      name = found.where
      file = name if source.kind == "text" else source.name
      if not found.text:
        raise ValueError(f"{name} is empty: expected some text")
      try:
        (tokens_T,) = tokenizer.encode([found.text])
      except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
      if not len(tokens_T):
        kind = tokenizer.spec.name
        raise ValueError(f"{name}: {kind} has no token for its text")
      size = len(found.text.encode())
      after = () if ends.after is None else (ends.after,)
      tokens_T = np.concatenate([tokens_T, np.array(after, tokens_T.dtype)])
      yield _document(
        name, found.domain or file, tokens_T, size, tokenizer, ends
      )


def documents_of_sources(
  sources: Iterable[TokenSource],
  tokenizer: Tokenizer | None,
  ends: Ends,
  end_of_text: int | None,
) -> Iterator[Document]:
  """Yield the documents of data sets, in their order.

  Args:
    sources: the data sets.
    tokenizer: counts the bytes of the text. None: they stay unknown.
    ends: `before` comes before each document. The end is in the data.
    end_of_text: the token that ends documents; it stands for no bytes.

  Raises:
    DataError: a file cannot be read.
  """
  for source in sources:
    domains = getattr(source, "domains", None)
    names = source.sidecar["domain_names"] if domains is not None else ()
    for i in range(len(source)):
      tokens_T, size = source[i], None
      if tokenizer is not None:
        text_T = tokens_T[tokens_T != end_of_text]
        size = _bytes(tokenizer, text_T)
      kind = names[domains[i]] if names else source.name
      yield _document(
        f"{source.name}, document {i}", kind, tokens_T, size, tokenizer, ends
      )


def evaluate(
  model: LM,
  documents: Iterable[Document],
  *,
  rows: int = 8,
  piece: int = 1024,
  on_piece: Callable[[], None] = lambda: None,
  on_document: Callable[[Document, Sums], None] = lambda document, sums: None,
) -> Found:
  """Return the losses of documents.

  Args:
    model: the language model.
    documents: the documents, of any lengths.
    rows: documents of a batch.
    piece: the most tokens of a document that run at a time.
    on_piece: called after each batch.
    on_document: called with each document that has a predicted token, in order.

  Raises:
    ValueError: a token is outside the model's vocabulary, a document is longer
      than the model can read, or there is no token to predict.
  """
  found = Found()
  for group in _groups(model, documents):
    sums = [Sums() for _ in group]
    texts = [document.tokens for document in group]
    for part in token_losses(model, texts, rows=rows, piece=piece):
      nll_N = part.nll_N.astype(np.float64)
      sums[part.text].add(float(nll_N.sum()), len(nll_N))
      _add_positions(found.positions, part.start, nll_N)
      on_piece()
    for document, each in zip(group, sums, strict=True):
      if not each.tokens:
        found.left_out += 1
        continue
      each.bytes = document.bytes
      found.documents += 1
      found.total.add(each.nll, each.tokens, each.bytes)
      source = found.sources.setdefault(document.source, Sums())
      source.add(each.nll, each.tokens, each.bytes)
      on_document(document, each)
  if not found.total.tokens:
    raise ValueError(
      f"no token to predict in {found.left_out} documents: expected a document "
      "of two tokens or more"
    )
  return found


def _document(
  name: str,
  source: str,
  tokens_T: np.ndarray,
  size: int | None,
  tokenizer: Tokenizer | None,
  ends: Ends,
) -> Document:
  """Return a document with what comes before it.

  Without such a token its first token is not predicted, and the bytes of that
  token do not count.
  """
  tokens_T = tokens_T.astype(np.int32)
  if ends.before is not None:
    tokens_T = np.concatenate([np.array([ends.before], np.int32), tokens_T])
  elif size is not None and tokenizer is not None:
    size = max(size - _bytes(tokenizer, tokens_T[:1]), 0)
  return Document(name, source, tokens_T, size)


def _bytes(tokenizer: Tokenizer, tokens_T: np.ndarray) -> int:
  """Return the bytes that tokens stand for."""
  return len(tokenizer.decode(tokens_T).encode())


def _groups(
  model: LM, documents: Iterable[Document]
) -> Iterator[list[Document]]:
  """Yield checked documents in groups that fit memory."""
  V, longest = model.config.vocab_size, longest_text(model)
  group, tokens = [], 0
  for document in documents:
    tokens_T = document.tokens
    wrong = np.flatnonzero((tokens_T < 0) | (tokens_T >= V))
    if wrong.size:
      raise ValueError(
        f"{document.name}: token {wrong[0]} is {tokens_T[wrong[0]]}: expected "
        f"one of the model's vocabulary, 0 to {V - 1}"
      )
    if longest is not None and len(tokens_T) > longest:
      raise ValueError(
        f"{document.name}: {len(tokens_T):,} tokens: expected at most "
        f"{longest:,}, which this model can read: cut the text, or train a "
        "model with --model.positions None"
      )
    if group and tokens + len(tokens_T) > _MOST_TOKENS:
      yield group
      group, tokens = [], 0
    group.append(document)
    tokens += len(tokens_T)
    if len(group) == _MOST_DOCUMENTS:
      yield group
      group, tokens = [], 0
  if group:
    yield group


def _add_positions(
  positions: dict[int, Sums], start: int, nll_N: np.ndarray
) -> None:
  """Add the losses of neighbouring tokens, of which the first is at `start`."""
  bin_N = np.frexp(np.arange(start, start + len(nll_N)))[1] - 1
  count = np.bincount(bin_N)
  nll = np.bincount(bin_N, weights=nll_N)
  for i in np.flatnonzero(count).tolist():
    positions.setdefault(i, Sums()).add(float(nll[i]), int(count[i]))


def _drop(value: object) -> None:
  """Take what `read` reports and nobody needs."""
