r"""Read data sets in Megatron's format, `.idx` and `.bin`, such as Pythia's.

The index is little-endian and has no padding, so its arrays are unaligned:

    offset             bytes  what
    0                  9      MMIDIDX\0\0
    9                  8      version, 1
    17                 1      dtype: 4 int32, 8 uint16
    18                 8      S, the number of sequences
    26                 8      D, the number of document starts, with the end
    34                 4 S    lengths in tokens, int32
    34 + 4 S           8 S    offsets in bytes into the data, int64
    34 + 12 S          8 D    the first sequence of each document, int64, then S

The data is NAME.bin, or NAME.bin cut into NAME-00000-of-0000N.bin, where N is
the *last* number. A sequence, and even a token, may lie in two of these files.

Sources: Megatron-LM's indexed data set and EleutherAI/pythia. Forks of Megatron
give the dtype codes 6 and 7 different meanings. Tokens are stored under codes 4
and 8, so every other code is refused.
"""

from collections.abc import Callable
import functools
import mmap
from pathlib import Path
import re
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from train.data.batches import Fingerprint
from train.data.file_hashes import file_hash, sampled_hash, sizes_hash
from train.data.text.open_files import (
  OpenFiles,
  RawFile,
  file_size,
  unreadable,
)
from train.data.text.token_source import DataError, Pieces, TokenSource

Unit = Literal["document", "sequence"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = 34
_DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_BLOCK = 1 << 20  # entries that are checked at a time
_CHECKED_BLOCKS = 64  # where tokens are compared with a vocabulary
_CHECKED_BYTES = 1 << 20
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.bin")


class Index(NamedTuple):
  """The contents of an index; the arrays are memory-mapped and unaligned.

  Attributes:
    dtype: the dtype of a stored token.
    lengths_S: the tokens of each sequence, int32.
    offsets_S: the place of each sequence in the data in bytes, int64.
    documents_D: the first sequence of each document, and S, int64.
    total_bytes: the size of the data.
  """

  dtype: np.dtype
  lengths_S: np.ndarray
  offsets_S: np.ndarray
  documents_D: np.ndarray
  total_bytes: int


def read_index(path: Path) -> Index:
  """Map an index into memory and check all of it.

  Args:
    path: NAME.idx.

  Raises:
    DataError: it is not an index, is truncated, or contradicts itself; the
      message names the file and the offset.
  """

  def wrong(offset: int, text: str) -> NoReturn:
    raise DataError(f"{path}, offset {offset}: {text}")

  size = file_size(path)
  if size < _HEADER:
    wrong(size, f"the file ends inside the header of {_HEADER} bytes")
  try:
    with path.open("rb") as file:
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise unreadable(path, error) from error
  content = np.frombuffer(mapped, np.uint8)

  def number(offset: int) -> int:
    return int.from_bytes(content[offset : offset + 8].tobytes(), "little")

  if content[:9].tobytes() != _MAGIC:
    wrong(0, f"{content[:9].tobytes()!r}: expected {_MAGIC!r}")
  if number(9) != 1:
    wrong(9, f"version {number(9)}: expected 1")
  code = int(content[17])
  if code not in _DTYPES:
    fork = " (float32 or float64, by the fork)" if code in (6, 7) else ""
    wrong(17, f"dtype code {code}{fork}: expected 4, int32, or 8, uint16")
  S, D = number(18), number(26)
  if S < 1:
    wrong(18, "no sequences: expected one or more")
  if D < 2:
    wrong(26, f"{D} document starts: expected two or more")
  pointers, starts = _HEADER + 4 * S, _HEADER + 12 * S
  if size != starts + 8 * D:
    wrong(
      min(size, starts + 8 * D),
      f"the file has {size} bytes: expected {starts + 8 * D} for {S} sequences "
      f"and {D} document starts",
    )
  index = Index(
    _DTYPES[code],
    content[_HEADER:pointers].view("<i4"),
    content[pointers:starts].view("<i8"),
    content[starts:].view("<i8"),
    0,
  )
  total = _check_sequences(index, pointers, wrong)
  _check_documents(index, starts, wrong)
  # From here on it is read at random places: do not read ahead at each.
  mapped.madvise(mmap.MADV_RANDOM)
  return index._replace(total_bytes=total)


def _check_sequences(
  index: Index, pointers: int, wrong: Callable[[int, str], NoReturn]
) -> int:
  """Check that the sequences follow each other; return their size in bytes."""
  expected, S = 0, len(index.lengths_S)
  for first in range(0, S, _BLOCK):
    length_C = index.lengths_S[first : first + _BLOCK].astype(np.int64)
    offset_C = index.offsets_S[first : first + _BLOCK]
    bad = np.flatnonzero(length_C < 0)
    if bad.size:
      i = first + int(bad[0])
      wrong(
        _HEADER + 4 * i,
        f"sequence {i} has {index.lengths_S[i]} tokens: expected 0 or more",
      )
    end_C = expected + np.cumsum(length_C) * index.dtype.itemsize
    begin_C = np.concatenate([[expected], end_C[:-1]])
    bad = np.flatnonzero(begin_C != offset_C)
    if bad.size:
      i = first + int(bad[0])
      wrong(
        pointers + 8 * i,
        f"sequence {i} begins at byte {index.offsets_S[i]}: expected "
        f"{begin_C[bad[0]]}, from the lengths before it",
      )
    expected = int(end_C[-1])
  return expected


def _check_documents(
  index: Index, starts: int, wrong: Callable[[int, str], NoReturn]
) -> None:
  """Check that the documents' starts go from 0 to the number of sequences.

  Megatron-LM writes the same start twice where a document has no sequence: it
  is empty.
  """
  S, D = len(index.lengths_S), len(index.documents_D)
  if index.documents_D[0] != 0:
    wrong(
      starts,
      f"document 0 begins at sequence {index.documents_D[0]}: expected 0",
    )
  for first in range(0, D - 1, _BLOCK):
    start_C = index.documents_D[first : first + _BLOCK + 1]
    bad = np.flatnonzero(start_C[1:] < start_C[:-1])
    if bad.size:
      i = first + int(bad[0]) + 1
      wrong(
        starts + 8 * i,
        f"document {i} begins at sequence {index.documents_D[i]}: expected "
        f"{index.documents_D[i - 1]} or more, where the one before begins",
      )
  if index.documents_D[-1] != S:
    wrong(
      starts + 8 * (D - 1),
      f"the documents end at sequence {index.documents_D[-1]}: expected {S}",
    )


def find_shards(index: Path) -> list[Path]:
  """Return the data files of an index, in their order.

  Args:
    index: NAME.idx.

  Raises:
    DataError: there is none, one is missing, or there are two sets of files.
  """
  stem = index.with_suffix("")
  merged = stem.with_name(stem.name + ".bin")
  found: dict[int, dict[int, Path]] = {}
  for path in index.parent.glob("*.bin"):
    match = _SHARD.fullmatch(path.name[len(stem.name) :])
    if match and path.name.startswith(stem.name):
      shard, last = (int(x) for x in match.groups())
      if shard in found.setdefault(last, {}):
        raise DataError(f"{path} and {found[last][shard]}: expected one")
      found[last][shard] = path
  if len(found) + merged.exists() != 1:
    sets = [f"{stem}-*-of-{last}.bin" for last in sorted(found)]
    if merged.exists():
      sets.append(str(merged))
    raise DataError(
      f"{index}: expected {merged.name} or {stem.name}-00000-of-0000N.bin "
      f"beside it, one of them; found {', '.join(sets) or 'neither'}"
    )
  if merged.exists():
    return [merged]
  ((last, shards),) = found.items()
  absent = [i for i in range(last + 1) if i not in shards]
  if absent or len(shards) != last + 1:
    raise DataError(
      f"{stem}-*-of-{last}.bin: expected the shards 0 to {last}, the last "
      f"included; missing {absent[:5]}, found {len(shards)}"
    )
  return [shards[i] for i in range(last + 1)]


class MegatronSource(TokenSource):
  """The documents of a Megatron index.

  It pickles as its path, so that each process maps the files itself.

  Args:
    path: NAME.idx.
    unit: what counts as a document: the index's documents, or its sequences,
      which are rows if the data was shuffled before.

  Attributes:
    path: NAME.idx.
    unit: "document" or "sequence".
    shards: the paths of the data files.

  Raises:
    DataError: the index or a data file is missing or damaged.
  """

  def __init__(self, path: Path | str, unit: Unit = "document") -> None:
    self.path, self.unit = Path(path), unit
    self._index = read_index(self.path)
    self.shards = find_shards(self.path)
    self._sizes = [file_size(shard) for shard in self.shards]
    if sum(self._sizes) != self._index.total_bytes:
      raise DataError(
        f"{self.shards[-1]}, offset {self._sizes[-1]}: the data of {self.path} "
        f"ends after {sum(self._sizes)} bytes in {len(self._sizes)} files: "
        f"expected {self._index.total_bytes}"
      )
    self._ends = np.cumsum(self._sizes)
    self._open = OpenFiles[RawFile]()

  @property
  def name(self) -> str:
    """The path of the index."""
    return str(self.path)

  def starts(self, document_n: np.ndarray) -> np.ndarray:
    """Return the place of documents in the data in bytes, int64 (n,).

    Args:
      document_n: the numbers of the documents; their number itself stands for
        the end of the data.
    """
    first_n = document_n
    if self.unit == "document":
      first_n = self._index.documents_D[document_n]
    # A document without sequences may begin where the data ends.
    offsets_S, last = self._index.offsets_S, self.sequences - 1
    return np.where(
      first_n > last,
      self._index.total_bytes,
      offsets_S[np.minimum(first_n, last)],
    )

  @property
  def lengths(self) -> np.ndarray:
    """The number of tokens of each document (n,).

    It is int32, or int64 if a document has 2³¹ tokens or more.
    """
    if self.unit == "sequence":
      return self._index.lengths_S
    size, count = self._index.dtype.itemsize, len(self)
    length_n = np.empty(count, np.int32)
    for first in range(0, count, _BLOCK):
      stop = min(first + _BLOCK, count)
      length_C = np.diff(self.starts(np.arange(first, stop + 1))) // size
      if length_C.max() >= 2**31:
        length_n = length_n.astype(np.int64)
      length_n[first:stop] = length_C
    return length_n

  def length_of(self, document: int) -> int:
    """Return the number of tokens of a document."""
    begin, end = self.starts(np.array([document, document + 1])).tolist()
    return (end - begin) // self._index.dtype.itemsize

  @property
  def sequences(self) -> int:
    """The number of sequences, which make up the documents."""
    return len(self._index.lengths_S)

  @property
  def dtype(self) -> np.dtype:
    """The dtype of a stored token."""
    return self._index.dtype

  @property
  def vocab_size(self) -> None:
    """None: the format does not say."""
    return None

  @functools.cached_property
  def fingerprint(self) -> Fingerprint:
    """Hashes of the index and of the data files."""
    return {
      "kind": "megatron",
      "unit": self.unit,
      "index": file_hash(self.path),
      "files": sizes_hash(self.shards),
      "blocks": sampled_hash(self.shards),
    }

  def __len__(self) -> int:
    """Return the number of documents."""
    if self.unit == "sequence":
      return self.sequences
    return len(self._index.documents_D) - 1

  def check_tokens(self, vocab_size: int) -> None:
    """Look for tokens outside a vocabulary in 64 blocks of 1 MiB.

    The blocks are spread evenly over the data, with its first and last bytes.
    Data of at most 64 MiB is checked as a whole.

    Args:
      vocab_size: the vocabulary size V of the model.

    Raises:
      DataError: some token is not in [0, V).
    """
    dtype, size = self.dtype, self.dtype.itemsize
    if np.iinfo(dtype).min >= 0 and np.iinfo(dtype).max < vocab_size:
      return
    total = self._index.total_bytes
    last = max(total - _CHECKED_BYTES, 0)
    blocks = min(_CHECKED_BLOCKS, -(-total // _CHECKED_BYTES))
    for i in range(blocks):
      begin = last * i // max(blocks - 1, 1) // size * size
      end = min(begin + _CHECKED_BYTES, total)
      shard = int(np.searchsorted(self._ends, begin, side="right"))
      token_N = np.frombuffer(self._bytes(begin, end, shard), dtype)
      bad_N = np.flatnonzero((token_N < 0) | (token_N >= vocab_size))
      if bad_N.size:
        self._raise_outside(begin + size * int(bad_N[0]), vocab_size)

  def verify(self) -> NoReturn:
    """Raise DataError, because the format has no checksums."""
    raise DataError(
      f"{self.name}: Megatron's format has no checksums to verify"
    )

  def _raise_outside(self, place: int, vocab_size: int) -> NoReturn:
    """Raise DataError about the token at a place of the data in bytes."""
    start_n = self.starts(np.arange(len(self)))
    document = int(np.searchsorted(start_n, place, side="right")) - 1
    shard = int(np.searchsorted(self._ends, place, side="right"))
    size = self.dtype.itemsize
    value = np.frombuffer(self._bytes(place, place + size, shard), self.dtype)
    raise DataError(
      f"{self.name}: document {document}, token "
      f"{(place - int(start_n[document])) // size} (in {self.shards[shard]}): "
      f"the token is {value[0]}: expected 0 to {vocab_size - 1}, the model's "
      "vocabulary; correct the data or set a larger --model.vocab-size"
    )

  def fill(self, pieces: Pieces, out_N: np.ndarray) -> None:
    """Write the tokens of pieces to their places; see `TokenSource.fill`."""
    size = self._index.dtype.itemsize
    first_P = self.starts(pieces.document_P) + size * pieces.start_P
    shard_P = np.searchsorted(self._ends, first_P, side="right")
    columns = (first_P, shard_P, pieces.length_P, pieces.place_P)
    rows = zip(*(x.tolist() for x in columns), strict=True)
    for first, shard, length, place in rows:
      raw = self._bytes(first, first + size * length, shard)
      out_N[place : place + length] = np.frombuffer(raw, self._index.dtype)

  def _bytes(self, begin: int, end: int, shard: int) -> bytes:
    """Return the bytes begin..end-1 of the data; `shard` holds the first."""
    parts = []
    while True:
      base = int(self._ends[shard]) - self._sizes[shard]
      low, high = max(begin - base, 0), min(end - base, self._sizes[shard])
      path, file = self.shards[shard], self._open.get(shard, self._open_shard)
      try:
        part = file.read(low, high - low)
      except OSError as error:
        raise unreadable(path, error) from error
      if len(part) != high - low:
        raise DataError(
          f"{path}, offset {low + len(part)}: the file ends: expected "
          f"{self._sizes[shard]:,} bytes, as when it was opened"
        )
      parts.append(part)
      if end - base <= self._sizes[shard]:
        return b"".join(parts)
      shard += 1

  def _open_shard(self, shard: int) -> RawFile:
    try:
      return RawFile(self.shards[shard])
    except OSError as error:
      raise unreadable(self.shards[shard], error) from error

  def __repr__(self) -> str:
    return f"MegatronSource({self.name!r}, {self.unit!r})"

  def __reduce__(self) -> tuple:
    return MegatronSource, (self.path, self.unit)
