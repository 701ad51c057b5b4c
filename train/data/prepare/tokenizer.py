"""Tokenizers: raw bytes, or any Hugging Face `tokenizer.json`.

    bytes            token = byte, 0 … 255; end of text 256; vocabulary 257
    tokenizer.json   as the file says, with four exceptions: control tokens in
                     the text are not parsed, but tokenised as ordinary
                     characters (`markers_in_text`); no tokens are added around
                     a document; nothing is truncated or padded; and BPE has no
                     dropout, so that the same text gives the same tokens

A document becomes its tokens, followed by the end-of-text token if the
tokenizer has one.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
from pathlib import Path
import types
import typing
from typing import Any

import numpy as np

from train.data.prepare.markers_in_text import without_markers
from train.data.prepare.read_lines import open_plain

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
# Names of this token in published tokenizers; "auto" takes the one it finds.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_LEAST_VOCABULARY = 257
_LARGEST_VOCABULARY = 1 << 24  # the library reserves memory for all of it


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """The identity of a tokenizer: with equal specs, tokens mean the same.

  Attributes:
    type: "bytes" or "file".
    name: "bytes", or the name of the file.
    sha256: the SHA-256 of the file, in hexadecimal.
    vocab_size: one more than the largest token.
    eos: the token that ends a document; None if no token does.
  """

  type: str
  name: str
  sha256: str
  vocab_size: int
  eos: int | None

  @property
  def dtype(self) -> np.dtype:
    """The dtype of stored tokens: "<u2" if every token fits, else "<u4"."""
    return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


class Tokenizer(typing.Protocol):
  """Abstract: turns text into tokens and back."""

  spec: TokenizerSpec

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the tokens of each text, without an end of text.

    Args:
      texts: the texts.

    Returns:
      One array of `spec.dtype` for each text.

    Raises:
      ValueError: a text cannot be encoded.
    """
    ...

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """Return the text of tokens; an end of text is shown by its name.

    Args:
      tokens: token numbers (length,).
    """
    ...


class ByteTokenizer:
  """Use UTF-8 bytes as tokens; nothing has to be installed or trained."""

  def __init__(self, eos: str = "auto"):
    end = None if eos == "none" else 256
    if eos not in ("auto", "none", END_OF_TEXT):
      raise ValueError(
        f"eos={eos!r}: the byte tokenizer has {END_OF_TEXT!r}, or 'none'"
      )
    sha256 = hashlib.sha256(b"bytes 257").hexdigest()
    self.spec = TokenizerSpec(BYTES, BYTES, sha256, 257, end)

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the UTF-8 bytes of each text, as little-endian uint16."""
    return [
      np.frombuffer(text.encode(), np.uint8).astype("<u2") for text in texts
    ]

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """Return the text of tokens; invalid UTF-8 becomes U+FFFD."""
    tokens = np.asarray(tokens)
    pieces = np.split(tokens, np.flatnonzero(tokens == 256))
    text = [
      bytes(piece[piece < 256].tolist()).decode(errors="replace")
      for piece in pieces
    ]
    return END_OF_TEXT.join(text)


class FileTokenizer:
  """Use a `tokenizer.json`, such as GPT-NeoX's or one from `train_bpe`.

  Args:
    path: the file.
    eos: the text of the token that ends a document; "none" for none; "auto"
      for the one under a usual name.

  Raises:
    ValueError: the file is no tokenizer, or lacks the token.
  """

  def __init__(self, path: str | Path, eos: str = "auto"):
    self.path = Path(path)
    data = read_tokenizer_file(path)
    try:
      self._tokenizer = _parsed(data.decode())
      tokens = self._tokenizer.get_vocab(with_added_tokens=True)
      encoding = without_markers(data, {*_ENDS, eos} & tokens.keys())
      self._encoder = self._tokenizer if encoding is None else _parsed(encoding)
    except BaseException as error:
      _raise_unless_library(error)
      raise ValueError(f"{path}: no tokenizer.json: {error}") from error
    self._encoder.no_truncation()
    self._encoder.no_padding()
    if hasattr(self._encoder.model, "dropout"):  # it draws tokens at random
      self._encoder.model.dropout = None
    self._encoder.encode_special_tokens = True
    if not tokens:
      raise ValueError(f"{path}: its vocabulary is empty: expected tokens")
    self.spec = TokenizerSpec(
      type="file",
      name=Path(path).name,
      sha256=hashlib.sha256(data).hexdigest(),
      vocab_size=max(tokens.values()) + 1,
      eos=_end(tokens, eos, path),
    )

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the tokens of each text; ValueError if one cannot be encoded."""
    try:
      found = self._encoder.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except BaseException as error:
      _raise_unless_library(error)
      raise ValueError(f"the tokenizer failed: {error}") from error
    tokens = [np.array(x.ids, self.spec.dtype) for x in found]
    eos = self.spec.eos
    if eos is not None and any((x == eos).any() for x in tokens):
      raise ValueError(
        f"a part of the text becomes token {eos}, which ends a document: "
        "expected other tokens; choose another --eos"
      )
    return tokens

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """Return the text of tokens, special tokens by their names.

    Raises:
      ValueError: the tokenizer cannot decode them.
    """
    ids = np.asarray(tokens).tolist()
    try:
      return self._tokenizer.decode(ids, skip_special_tokens=False)
    except BaseException as error:
      _raise_unless_library(error)
      raise ValueError(f"the tokenizer failed: {error}") from error


def load(name: str, eos: str = "auto") -> Tokenizer:
  """Load a tokenizer.

  Args:
    name: "bytes", a `tokenizer.json`, or a folder that holds one.
    eos: the text of the token that ends a document; "none" for none; "auto"
      for the one under a usual name.

  Raises:
    ValueError: there is no such file, it is no tokenizer, it lacks the token,
      or the package `tokenizers` is not installed.
  """
  if name == BYTES:
    return ByteTokenizer(eos)
  return FileTokenizer(file_of(name), eos)


def file_of(name: str) -> Path:
  """Return the path of a tokenizer.json, given the file or its folder."""
  path = Path(name)
  return path / "tokenizer.json" if path.is_dir() else path


def load_recorded(folder: Path, recorded: Mapping[str, str]) -> Tokenizer:
  """Load the tokenizer that made a data set; it marks no end of a document.

  Args:
    folder: the data set.
    recorded: the entry "tokenizer" of its dataset.json.

  Raises:
    ValueError: the data set's tokenizer.json is missing or was replaced, or
      the package `tokenizers` is not installed.
  """
  if recorded.get("type", recorded["name"]) == BYTES:
    return ByteTokenizer("none")
  path = folder / "tokenizer.json"
  tokenizer = FileTokenizer(path, "none")
  check_same(tokenizer, recorded["sha256"], str(path))
  return tokenizer


def check_same(tokenizer: Tokenizer, sha256: str, name: str) -> None:
  """Check that a tokenizer has this SHA-256.

  Args:
    tokenizer: the tokenizer to check.
    sha256: the expected hash, in hexadecimal.
    name: what the message calls the tokenizer.

  Raises:
    ValueError: it has another hash.
  """
  found = tokenizer.spec.sha256
  if found != sha256:
    raise ValueError(
      f"tokenizer={name!r}: its SHA-256 is {found[:16]}…: expected "
      f"{sha256[:16]}…, the hash of the tokenizer that made the tokens"
    )


def read_tokenizer_file(path: str | Path) -> bytes:
  """Return the bytes of a `tokenizer.json`.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    with open_plain(path) as file:
      return file.read()
  except OSError as error:
    raise ValueError(
      f"tokenizer={str(path)!r}: expected 'bytes' or a tokenizer.json: "
      f"{error.strerror or 'it is no plain file'}"
    ) from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
  """Train a byte-level BPE tokenizer; the same texts give the same result.

  Args:
    texts: the training texts, read once.
    vocab_size: the largest number of tokens. Token 0 is the end of text, 256
      tokens are the bytes, and the others are learnt. The result has fewer
      tokens if the texts hold too few pairs.

  Returns:
    The content of a `tokenizer.json`. It is lossless: every text decodes to
    itself.

  Raises:
    ValueError: vocab_size is below 257 or above 2²⁴, or the package
      `tokenizers` is not installed or failed.
  """
  if not _LEAST_VOCABULARY <= vocab_size <= _LARGEST_VOCABULARY:
    raise ValueError(
      f"vocab_size={vocab_size}: expected at least {_LEAST_VOCABULARY}, for "
      f"256 bytes and the end of text, and at most {_LARGEST_VOCABULARY}"
    )
  tokenizers = _library()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=sorted(alphabet),
    show_progress=False,
  )
  try:
    tokenizer.train_from_iterator(iter(texts), trainer)
  except BaseException as error:
    if _is_panic(error):
      raise ValueError(f"the training failed: {error}") from error
    raise
  return tokenizer.to_str()


def _end(tokens: dict[str, int], eos: str, path: str | Path) -> int | None:
  """Return the token that ends a document, as `load` describes `eos`."""
  if eos == "none":
    return None
  if eos != "auto":
    if eos not in tokens:
      raise ValueError(f"eos={eos!r}: {path} has no such token")
    return tokens[eos]
  found = [name for name in _ENDS if name in tokens]
  if len(found) != 1:
    raise ValueError(
      f"eos='auto': {path} has {found or 'none'} of {_ENDS}: expected exactly "
      "one; name the token that ends a document, or 'none'"
    )
  return tokens[found[0]]


def _parsed(content: str) -> Any:
  """Return the library's tokenizer for the content of a `tokenizer.json`."""
  return _library().Tokenizer.from_str(content)


def _raise_unless_library(error: BaseException) -> None:
  """Raise an error again unless the library `tokenizers` can be its cause."""
  if not isinstance(error, Exception) and not _is_panic(error):
    raise error


def _is_panic(error: BaseException) -> bool:
  """Return whether an error is a bug in the library.

  Its class is no Exception, and cannot be imported.
  """
  return type(error).__name__ == "PanicException"


@functools.cache
def _library() -> types.ModuleType:
  """Import the package `tokenizers`, which is optional."""
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
      "a tokenizer.json needs the package tokenizers: pip install "
      "'rebased-jax[text]'"
    ) from error
  return tokenizers
