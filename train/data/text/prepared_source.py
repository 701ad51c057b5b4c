"""Read the data sets that `rebased prepare` makes.

A data set is a folder:

    dataset.json                written last, so it marks a finished data set
    tokenizer.json              unless the tokenizer is "bytes"
    shard-00000.arrayrecord     a record is a document, or a row of "length" + 1
                                tokens; tokens are little-endian
    shard-00000.lengths.npy     int64, the number of tokens of each record
    shard-00000.domains.npy     int16, the domain of each record, an index into
                                "domain_names"; only if there are domains

Documents are numbered over all shards. If the "kind" is "rows", each row counts
as a document.
"""

import functools
import hashlib
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader
import numpy as np

from train.data.batches import Fingerprint
from train.data.file_hashes import file_hash, sampled_hash, sizes_hash
from train.data.text.open_files import OpenFiles, file_size, unreadable
from train.data.text.token_source import DataError, Pieces, TokenSource

FORMAT, VERSION = "rebased-tokens", 1
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_MOST = 2**53  # the largest count that is believed

# The fields of dataset.json that are read, and those that may be left out.
_FIELDS: dict[str, type] = {
  "kind": str,
  "dtype": str,
  "vocab_size": int,
  "tokenizer": dict,
  "shards": list,
  "documents": int,
  "tokens": int,
}
_OPTIONAL: dict[str, type] = {
  "length": int,
  "rows": int,
  "left_over": int,
  "skipped": int,
  "empty": int,
  "text_bytes": int,
  "domain_names": list,
}
_OPTIONAL_OF_SHARD: dict[str, type] = {
  "bytes": int,
  "sha256": str,
  "domains": dict,
}
# What np.save writes before an array of one axis.
_NPY = re.compile(
  rb"\x93NUMPY\x01\x00(?s:..)\{'descr': '([<>|=]?[biufc]\d{1,2})', "
  rb"'fortran_order': (?:False|True), 'shape': \((\d*),\), \} *\n"
)
_NPY_HEADER = 512  # longer than any such header


def read_sidecar(folder: Path) -> dict[str, Any]:
  """Read and check the dataset.json of a finished data set.

  Args:
    folder: the data set.

  Raises:
    DataError: there is none, or it is not of this format.
  """
  path = folder / "dataset.json"
  if not path.exists():
    raise DataError(
      f"{folder}: no dataset.json, so it is not a data set, or an unfinished "
      "one; `rebased prepare` makes or finishes it"
    )
  file_size(path)
  try:
    data = json.loads(path.read_text("utf-8"))
  except OSError as error:
    raise unreadable(path, error) from error
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path}: not JSON: {error}") from error
  if not isinstance(data, dict) or data.get("format") != FORMAT:
    raise DataError(f"{path}: expected an object with format={FORMAT!r}")
  if data.get("version") != VERSION or data["version"] is True:
    raise DataError(
      f"{path}: version={data.get('version')!r}: expected {VERSION}"
    )
  _check_fields(path, data)
  for i, shard in enumerate(data["shards"]):
    _check_shard(path, i, shard, data)
  names = [shard["name"] for shard in data["shards"]]
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise DataError(f"{path}: shards: {twice!r} is there twice: expected once")
  for field in _counts_of(data):
    total = sum(shard[field] for shard in data["shards"])
    if data.get(field) != total:
      raise DataError(
        f"{path}: {field}={data.get(field)!r}: expected {total}, the sum over "
        "its shards"
      )
  return data


def _check(ok: bool, path: Path, field: str, value: Any, expected: str) -> None:
  """Raise DataError if a field of a dataset.json is wrong."""
  if not ok:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    raise DataError(f"{path}: {field}={shown}: expected {expected}")


def _is(value: Any, kind: type) -> bool:
  """Whether a value has this type; a count is from 0 to 2**53."""
  if kind is int:
    return type(value) is int and 0 <= value <= _MOST
  return isinstance(value, kind)


def _check_kinds(
  path: Path, prefix: str, data: dict, kinds: dict[str, type], needed: bool
) -> None:
  """Check the types of fields, which may be absent unless `needed`."""
  for field, kind in kinds.items():
    if needed or field in data:
      value = data.get(field)
      expected = "a count" if kind is int else kind.__name__
      _check(_is(value, kind), path, prefix + field, value, expected)


def _counts_of(data: dict[str, Any]) -> tuple[str, ...]:
  """Return the counts that a data set and each of its shards have."""
  rows = data["kind"] == "rows"
  return ("documents", "tokens", "rows") if rows else ("documents", "tokens")


def _check_fields(path: Path, data: dict[str, Any]) -> None:
  """Raise DataError if a field is wrong; the shards are checked later."""

  def check(ok: bool, field: str, expected: str) -> None:
    _check(ok, path, field, data.get(field), expected)

  _check_kinds(path, "", data, _FIELDS, needed=True)
  _check_kinds(path, "", data, _OPTIONAL, needed=False)
  kinds = "documents", "rows"
  check(data["kind"] in kinds, "kind", f"one of {kinds}")
  rows = data["kind"] == "rows"
  if rows:
    length = data.get("length")
    check(type(length) is int and length >= 1, "length", "1 or more")
  check(data["dtype"] in _DTYPES, "dtype", f"one of {tuple(_DTYPES)}")
  limit = 2 ** min(8 * _DTYPES[data["dtype"]].itemsize, 31)
  fits = 1 <= data["vocab_size"] <= limit
  check(fits, "vocab_size", f"1 to {limit}, as {data['dtype']} holds them")
  tokenizer = data["tokenizer"]
  hashed = all(isinstance(tokenizer.get(x), str) for x in ("name", "sha256"))
  check(hashed, "tokenizer", "its name and its hash")
  eos = data.get("eos")
  known = eos is None or (_is(eos, int) and eos < data["vocab_size"])
  check(known, "eos", f"a token below {data['vocab_size']}, or null")
  names = data.get("domain_names", [])
  named = all(isinstance(name, str) for name in names)
  check(named, "domain_names", "a list of names")
  check(len(data["shards"]) > 0, "shards", "one or more")


def _check_shard(
  path: Path, number: int, shard: Any, data: dict[str, Any]
) -> None:
  """Raise DataError if the entry of a shard is wrong."""
  where, counts = f"shards[{number}]", _counts_of(data)
  if not (
    isinstance(shard, dict)
    and isinstance(shard.get("name"), str)
    and all(_is(shard.get(field), int) for field in counts)
  ):
    raise DataError(f"{path}: {where}: expected name, {' and '.join(counts)}")
  name = shard["name"]
  # A name with a slash would lead out of the folder; "" is the folder itself.
  plain = name not in ("", ".", "..") and name.isprintable() and "/" not in name
  expected = "the name of a file in this folder"
  _check(plain, path, f"{where}.name", name, expected)
  _check_kinds(path, f"{where}.", shard, _OPTIONAL_OF_SHARD, needed=False)
  for domain, found in shard.get("domains", {}).items():
    field = f"{where}.domains[{domain!r}]"
    counted = isinstance(found, dict) and all(
      _is(found.get(x, 0), int) for x in ("documents", "tokens")
    )
    _check(counted, path, field, found, "documents and tokens")


class _Shard(NamedTuple):
  """An open shard.

  Attributes:
    reader: reads its records.
    lengths_R: the number of tokens of each record, in the smallest dtype.
  """

  reader: ArrayRecordReader
  lengths_R: np.ndarray


class PreparedSource(TokenSource):
  """The documents of a prepared data set.

  It pickles as its path, so that each process opens the files itself.

  Args:
    path: the folder.

  Attributes:
    path: the folder.
    sidecar: the content of dataset.json.
    shards: the paths of the ArrayRecord files.

  Raises:
    DataError: the data set is unfinished, or a file is missing or does not
      match dataset.json.
  """

  def __init__(self, path: Path | str) -> None:
    self.path = Path(path)
    self.sidecar = read_sidecar(self.path)
    self._dtype = _DTYPES[self.sidecar["dtype"]]
    rows = self.row_length is not None
    counted = "rows" if rows else "documents"
    self._counts = [shard[counted] for shard in self.sidecar["shards"]]
    self._ends = np.cumsum(self._counts)
    self.shards = [self.path / s["name"] for s in self.sidecar["shards"]]
    self._open = OpenFiles[_Shard]()
    lengths = hashlib.sha256()
    for shard in range(len(self.shards)):
      self._check_size(shard)
      lengths.update(self._lengths(shard))
    self._lengths_hash = lengths.hexdigest()

  def _check_size(self, shard: int) -> None:
    """Check that a shard is there and has the size that dataset.json says."""
    path = self.shards[shard]
    size, expected = file_size(path), self.sidecar["shards"][shard].get("bytes")
    if expected not in (None, size):
      raise DataError(
        f"{path}: {size:,} bytes: expected {expected:,}, as dataset.json says; "
        "the file is truncated or replaced: copy or prepare it again"
      )

  def _lengths(self, shard: int) -> np.ndarray:
    """Return the lengths of a shard's records, checked with dataset.json."""
    path = self.shards[shard]
    lengths_n = self._array(shard, "lengths", np.int64)
    tokens = self.sidecar["shards"][shard]["tokens"]
    if self.row_length is not None:
      tokens = self._counts[shard] * (self.row_length + 1)
    bad = np.flatnonzero(lengths_n < 0)
    if bad.size:
      raise DataError(
        f"{_beside(path, 'lengths')}: record {bad[0]} has {lengths_n[bad[0]]} "
        "tokens: expected 0 or more"
      )
    total = int(lengths_n.sum())
    # A sum of wrong lengths may overflow to the right one.
    if total != tokens or lengths_n.max(initial=0) > tokens:
      raise DataError(
        f"{_beside(path, 'lengths')}: {total} tokens: expected {tokens}, as "
        "dataset.json says"
      )
    return lengths_n

  def _array(self, shard: int, what: str, dtype: type) -> np.ndarray:
    """Read NAME.what.npy of a shard, which has one value for each record."""
    return _read_array(
      _beside(self.shards[shard], what), np.dtype(dtype), self._counts[shard]
    )

  @property
  def name(self) -> str:
    """The path of the folder."""
    return str(self.path)

  @property
  def row_length(self) -> int | None:
    """L if the documents are rows of L + 1 tokens; None if they are not."""
    return (
      self.sidecar.get("length") if self.sidecar["kind"] == "rows" else None
    )

  @property
  def lengths(self) -> np.ndarray:
    """The number of tokens of each document (n,), read from the files.

    The array is not kept, because it takes 4 bytes a document in each process.
    It is int32, or int64 if a shard has 2³¹ tokens or more.
    """
    most = max(shard["tokens"] for shard in self.sidecar["shards"])
    length_n = np.empty(len(self), np.int32 if most < 2**31 else np.int64)
    for shard, end in enumerate(self._ends.tolist()):
      length_n[end - self._counts[shard] : end] = self._lengths(shard)
    return length_n

  @property
  def vocab_size(self) -> int:
    """The vocabulary size of the tokenizer."""
    return self.sidecar["vocab_size"]

  @functools.cached_property
  def domains(self) -> np.ndarray | None:
    """The domain of each document, int16 (n,), an index into `domain_names`.

    None if the documents name no domains, or if they are rows, which may come
    from several domains.

    Raises:
      DataError: a file is missing, or holds a number that is no domain's.
    """
    names = self.sidecar.get("domain_names")
    if not names or self.row_length is not None:
      return None
    shards = range(len(self.shards))
    domains_n = np.concatenate(
      [self._array(i, "domains", np.int16) for i in shards]
    )
    if domains_n.size and not (
      domains_n.min() >= 0 and domains_n.max() < len(names)
    ):
      raise DataError(
        f"{self.path}: a domain is outside of its {len(names)} names"
      )
    return domains_n

  @functools.cached_property
  def fingerprint(self) -> Fingerprint:
    """Hashes of dataset.json, the lengths, the files and the tokenizer."""
    return {
      "kind": "prepared",
      "index": file_hash(self.path / "dataset.json"),
      "tokenizer": self.sidecar["tokenizer"]["sha256"],
      "lengths": self._lengths_hash,
      "files": sizes_hash(self.shards),
      "blocks": sampled_hash(self.shards),
    }

  def __len__(self) -> int:
    """Return the number of documents."""
    return int(self._ends[-1])

  def length_of(self, document: int) -> int:
    """Return the number of tokens of a document."""
    shard = int(np.searchsorted(self._ends, document, side="right"))
    lengths_R = self._shard(shard).lengths_R
    return int(lengths_R[document - int(self._ends[shard])])

  def fill(self, pieces: Pieces, out_N: np.ndarray) -> None:
    """Write the tokens of pieces to their places; see `TokenSource.fill`."""
    shard_P = np.searchsorted(self._ends, pieces.document_P, side="right")
    for shard in np.unique(shard_P).tolist():
      which_Q = np.flatnonzero(shard_P == shard)
      self._fill_from(shard, Pieces(*(x[which_Q] for x in pieces)), out_N)

  def _fill_from(self, shard: int, pieces: Pieces, out_N: np.ndarray) -> None:
    """Fill pieces of one shard; each record is read once."""
    first = int(self._ends[shard]) - self._counts[shard]
    document_R, record_P = np.unique(pieces.document_P, return_inverse=True)
    number_R = document_R - first
    path, opened = self.shards[shard], self._shard(shard)
    try:
      records = opened.reader.read(number_R.tolist())
    except (IndexError, RuntimeError, ValueError) as error:
      raise DataError(f"{path}: cannot be read: {error}") from error
    size, expected_R = self._dtype.itemsize, opened.lengths_R[number_R].tolist()
    for i, (record, length) in enumerate(zip(records, expected_R, strict=True)):
      if len(record) != size * length:
        raise DataError(
          f"{path}, record {number_R[i]}: {len(record)} bytes: expected "
          f"{size * length}, as {_beside(path, 'lengths').name} says"
        )
    columns = (record_P, pieces.start_P, pieces.length_P, pieces.place_P)
    rows = zip(*(x.tolist() for x in columns), strict=True)
    for record, start, length, place in rows:
      out_N[place : place + length] = np.frombuffer(
        records[record], self._dtype, length, size * start
      )

  def _shard(self, shard: int) -> _Shard:
    """Return an open shard.

    Raises:
      DataError: it cannot be opened, or does not match dataset.json.
    """
    return self._open.get(shard, self._open_shard)

  def _open_shard(self, shard: int) -> _Shard:
    """Open a shard, and check its size and its number of records."""
    path = self.shards[shard]
    self._check_size(shard)
    try:
      reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
      if not reader.ok():
        # The reader does not say why it has no records. The system may.
        path.open("rb").close()
        raise DataError(
          f"{path}: not an ArrayRecord file, or damaged: no record can be "
          f"read: expected {self._counts[shard]}"
        )
      count = reader.num_records()
    except OSError as error:
      raise unreadable(path, error) from error
    except (RuntimeError, ValueError) as error:
      raise DataError(f"{path}: not an ArrayRecord file: {error}") from error
    expected = self._counts[shard]
    if count != expected:
      raise DataError(
        f"{path}: {count} records: expected {expected}, as dataset.json says"
      )
    lengths_R = self._lengths(shard)
    most = int(lengths_R.max(initial=0))
    return _Shard(reader, lengths_R.astype(np.min_scalar_type(most)))

  def verify(self) -> None:
    """Read every byte and compare the checksums.

    Raises:
      DataError: a shard changed since it was made, or has no checksum.
    """
    for shard, path in enumerate(self.shards):
      expected = self.sidecar["shards"][shard].get("sha256")
      if expected is None:
        raise DataError(
          f"{path}: dataset.json has no SHA-256 of it to compare with"
        )
      try:
        found = file_hash(path)
      except OSError as error:
        raise unreadable(path, error) from error
      if found != expected:
        raise DataError(
          f"{path}: its SHA-256 is not the one in dataset.json: the file is "
          "damaged: copy or prepare it again"
        )

  def __repr__(self) -> str:
    return f"PreparedSource({self.name!r})"

  def __reduce__(self) -> tuple:
    return PreparedSource, (self.path,)


def _beside(shard: Path, what: str) -> Path:
  """Return the path NAME.what.npy of a shard NAME.arrayrecord."""
  return shard.with_name(f"{shard.stem}.{what}.npy")


def _read_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
  """Read an .npy file of one axis.

  NumPy evaluates the header as Python, and reserves the memory that it names.
  Here only a header of the expected form is accepted, before memory is taken.

  Args:
    path: the file.
    dtype: the expected dtype.
    count: the expected number of values.

  Raises:
    DataError: the file is missing, damaged, or has another dtype or size.
  """
  if not path.exists():
    raise DataError(f"{path}: cannot be read: it is missing")
  size = file_size(path)
  try:
    with path.open("rb") as file:
      header = _NPY.match(file.read(_NPY_HEADER))
      if header is None:
        raise DataError(
          f"{path}: cannot be read: expected a NumPy file of one axis"
        )
      found = _dtype_name(header[1].decode("latin-1"))
      if (found, int(header[2] or 0)) != (dtype.name, count):
        raise DataError(
          f"{path}: {found}[{header[2].decode()}]: expected "
          f"{dtype.name}[{count}], as dataset.json says"
        )
      expected = header.end() + count * dtype.itemsize
      if size != expected:
        raise DataError(
          f"{path}: cannot be read: {size:,} bytes: expected {expected:,}, as "
          "its header says"
        )
      file.seek(header.end())
      array_n = np.fromfile(file, dtype, count)
  except OSError as error:
    raise unreadable(path, error) from error
  if len(array_n) != count:
    raise DataError(f"{path}: cannot be read: it was cut while it was read")
  return array_n


def _dtype_name(text: str) -> str:
  """Return the name of a dtype that a file names; the text if it is none."""
  try:
    return np.dtype(text).name
  except TypeError:
    return text
