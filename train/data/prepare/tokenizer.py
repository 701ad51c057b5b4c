"""Text to tokens and back: bytes, or any Hugging Face `tokenizer.json`.

    bytes            token = byte, 0 … 255; end of text 256; vocabulary 257
    tokenizer.json   as its file says, but for three things: text that spells a
                     special token stays text; nothing is added around a
                     document; nothing is cut or padded

A document becomes its tokens and, where there is one, the end of text.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
from pathlib import Path
import typing

import numpy as np

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
# The names that published tokenizers give to it; "auto" takes the one found.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_LEAST_VOCABULARY = 257


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """What has to be the same for tokens to mean the same.

  Attributes:
    type: "bytes" or "file".
    name: "bytes", or the name of the file.
    sha256: of the file.
    vocab_size: one more than the largest token.
    eos: the token that ends a document, or None.
  """

  type: str
  name: str
  sha256: str
  vocab_size: int
  eos: int | None

  @property
  def dtype(self) -> np.dtype:
    """Little-endian uint16 if every token fits, else uint32."""
    return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


class Tokenizer(typing.Protocol):
  """What `load` gives."""

  spec: TokenizerSpec

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text, of `spec.dtype`, without an end of text.

    Raises:
      ValueError: a text cannot be encoded.
    """

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """The text; an end of text shows as its name."""


class ByteTokenizer:
  """UTF-8 bytes as tokens; nothing to install or to learn."""

  def __init__(self, eos: str = "auto"):
    end = None if eos == "none" else 256
    if eos not in ("auto", "none", END_OF_TEXT):
      raise ValueError(
        f"eos={eos!r}: the byte tokenizer has {END_OF_TEXT!r}, or 'none'"
      )
    sha256 = hashlib.sha256(b"bytes 257").hexdigest()
    self.spec = TokenizerSpec(BYTES, BYTES, sha256, 257, end)

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [
      np.frombuffer(text.encode(), np.uint8).astype("<u2") for text in texts
    ]

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    tokens = np.asarray(tokens)
    pieces = np.split(tokens, np.flatnonzero(tokens == 256))
    text = [
      bytes(piece[piece < 256].tolist()).decode(errors="replace")
      for piece in pieces
    ]
    return END_OF_TEXT.join(text)


class FileTokenizer:
  """A `tokenizer.json`, GPT-NeoX's or `train_bpe`'s for example."""

  def __init__(self, path: str | Path, eos: str = "auto"):
    tokenizers = _library()
    data = read_tokenizer_file(path)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # noqa: BLE001  # the library raises no other
      raise ValueError(f"{path}: no tokenizer.json: {error}") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    tokens = self._tokenizer.get_vocab(with_added_tokens=True)
    if not tokens:
      raise ValueError(f"{path}: expected a vocabulary, it has no token")
    self.spec = TokenizerSpec(
      type="file",
      name=Path(path).name,
      sha256=hashlib.sha256(data).hexdigest(),
      vocab_size=max(tokens.values()) + 1,
      eos=_end(tokens, eos, path),
    )

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    try:
      found = self._tokenizer.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except Exception as error:  # noqa: BLE001  # the library raises no other
      raise ValueError(f"the tokenizer failed: {error}") from error
    return [np.array(x.ids, self.spec.dtype) for x in found]

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    ids = np.asarray(tokens).tolist()
    return self._tokenizer.decode(ids, skip_special_tokens=False)


def load(name: str, eos: str = "auto") -> Tokenizer:
  """The tokenizer of a name.

  Args:
    name: "bytes", a `tokenizer.json`, or a folder that holds one.
    eos: the token that ends a document; "none" for none; "auto" for the one of
      the usual names.

  Raises:
    ValueError: there is no such file, it is no tokenizer, it lacks the token,
      or `tokenizers` is not installed.
  """
  if name == BYTES:
    return ByteTokenizer(eos)
  return FileTokenizer(file_of(name), eos)


def file_of(name: str) -> Path:
  """The file of a name: itself, or the tokenizer.json of a folder."""
  path = Path(name)
  return path / "tokenizer.json" if path.is_dir() else path


def load_recorded(folder: Path, recorded: Mapping[str, str]) -> Tokenizer:
  """The tokenizer that made a data set; it marks no end of a document.

  Args:
    folder: the data set.
    recorded: the "tokenizer" of its dataset.json.

  Raises:
    ValueError: its tokenizer.json is missing or another one, or `tokenizers`
      is not installed.
  """
  if recorded.get("type", recorded["name"]) == BYTES:
    return ByteTokenizer("none")
  path = folder / "tokenizer.json"
  tokenizer = FileTokenizer(path, "none")
  check_same(tokenizer, recorded["sha256"], str(path))
  return tokenizer


def check_same(tokenizer: Tokenizer, sha256: str, name: str) -> None:
  """Raises ValueError where a tokenizer is not the one of this SHA-256."""
  found = tokenizer.spec.sha256
  if found != sha256:
    raise ValueError(
      f"tokenizer={name!r}: its SHA-256 is {found[:16]}…: expected "
      f"{sha256[:16]}…, of the tokenizer that made the tokens"
    )


def read_tokenizer_file(path: str | Path) -> bytes:
  """The bytes of a `tokenizer.json`.

  Raises:
    ValueError: there is none.
  """
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise ValueError(
      f"tokenizer={str(path)!r}: expected 'bytes' or a tokenizer.json: "
      f"{error.strerror}"
    ) from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
  """Learns a byte-level BPE; the same texts give the same one.

  Args:
    texts: in any number; read once.
    vocab_size: at most this many tokens: the end of text, which is token 0,
      256 bytes, and the rest learnt. Fewer if the texts hold too few pairs.

  Returns:
    The content of a `tokenizer.json`. It loses nothing: any text decodes to
    itself.

  Raises:
    ValueError: vocab_size < 257.
  """
  if vocab_size < _LEAST_VOCABULARY:
    raise ValueError(
      f"vocab_size={vocab_size}: expected at least {_LEAST_VOCABULARY}, for "
      "256 bytes and the end of text"
    )
  tokenizers = _library()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    iter(texts),
    tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[END_OF_TEXT],
      initial_alphabet=sorted(alphabet),
      show_progress=False,
    ),
  )
  return tokenizer.to_str()


def _end(tokens: dict[str, int], eos: str, path: str | Path) -> int | None:
  if eos == "none":
    return None
  if eos != "auto":
    if eos not in tokens:
      raise ValueError(f"eos={eos!r}: {path} has no such token")
    return tokens[eos]
  found = [name for name in _ENDS if name in tokens]
  if len(found) != 1:
    raise ValueError(
      f"eos='auto': {path} has {found or 'none'} of {_ENDS}: name the token "
      "that ends a document, or 'none'"
    )
  return tokens[found[0]]


@functools.cache
def _library():
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
      "a tokenizer.json needs the package tokenizers: pip install "
      "'rebased-jax[text]'"
    ) from error
  return tokenizers
