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
import json
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
import numpy as np

from train.data.batches import Fingerprint
from train.data.file_hashes import (
  array_hash,
  file_hash,
  sampled_hash,
  sizes_hash,
)
from train.data.text.token_source import DataError, Pieces, TokenSource

FORMAT, VERSION = "rebased-tokens", 1
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_TYPES: dict[str, type] = {
  "kind": str,
  "dtype": str,
  "vocab_size": int,
  "tokenizer": dict,
  "shards": list,
  "documents": int,
  "tokens": int,
}


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
  try:
    data = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise DataError(f"{path}: {error}") from error
  if not isinstance(data, dict) or data.get("format") != FORMAT:
    raise DataError(f"{path}: expected an object with format={FORMAT!r}")
  if data.get("version") != VERSION:
    raise DataError(
      f"{path}: version={data.get('version')!r}: expected {VERSION}"
    )
  for field, kind in _TYPES.items():
    if not isinstance(data.get(field), kind):
      raise DataError(
        f"{path}: {field}={data.get(field)!r}: expected {kind.__name__}"
      )
  _check_values(path, data)
  return data


def _check_values(path: Path, data: dict[str, Any]) -> None:
  """Raise DataError if a field of a dataset.json is out of range."""

  def check(ok: bool, field: str, expected: str) -> None:
    if not ok:
      value = data.get(field)
      raise DataError(f"{path}: {field}={value!r}: expected {expected}")

  rows = data["kind"] == "rows"
  check(rows or data["kind"] == "documents", "kind", "'documents' or 'rows'")
  if rows:
    length = data.get("length")
    check(type(length) is int and length >= 1, "length", "1 or more")
  counts = ("documents", "tokens", "rows") if rows else ("documents", "tokens")
  check(data["dtype"] in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}")
  limit = 2 ** min(8 * _DTYPES[data["dtype"]].itemsize, 31)
  fits = 1 <= data["vocab_size"] <= limit
  check(fits, "vocab_size", f"1 to {limit}, as {data['dtype']} holds them")
  check({"name", "sha256"} <= set(data["tokenizer"]), "tokenizer", "its hash")
  check(len(data["shards"]) > 0, "shards", "one or more")
  for i, shard in enumerate(data["shards"]):
    try:
      named = isinstance(shard["name"], str)
      counted = all(type(shard[x]) is int for x in counts)
    except (KeyError, TypeError):
      named = counted = False
    if not (named and counted and Path(shard["name"]).name == shard["name"]):
      raise DataError(
        f"{path}: shards[{i}]: expected name, {' and '.join(counts)}"
      )
  for field in counts:
    total = sum(shard[field] for shard in data["shards"])
    check(data.get(field) == total, field, f"{total}, the sum over its shards")


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
    self._readers: dict[int, ArrayRecordReader] = {}
    parts = [self._lengths(i) for i in range(len(self.shards))]
    self._lengths_n = np.concatenate(parts)
    self._lengths_n.flags.writeable = False

  def _lengths(self, shard: int) -> np.ndarray:
    """Return the lengths of a shard's records, checked with dataset.json."""
    path = self.shards[shard]
    if not path.exists():
      raise DataError(f"{path}: missing, though dataset.json lists it")
    lengths_n = self._array(shard, "lengths", np.int64)
    if lengths_n.size and lengths_n.min() < 0:
      bad = int(np.flatnonzero(lengths_n < 0)[0])
      raise DataError(
        f"{_beside(path, 'lengths')}: record {bad} has {lengths_n[bad]} "
        "tokens: expected 0 or more"
      )
    tokens = self.sidecar["shards"][shard]["tokens"]
    if self.row_length is not None:
      tokens = self._counts[shard] * (self.row_length + 1)
    if int(lengths_n.sum()) != tokens:
      raise DataError(
        f"{_beside(path, 'lengths')}: {lengths_n.sum()} tokens: expected "
        f"{tokens}, as dataset.json says"
      )
    return lengths_n

  def _array(self, shard: int, what: str, dtype: type) -> np.ndarray:
    """Read NAME.what.npy of a shard, which has one value for each record."""
    path = _beside(self.shards[shard], what)
    expected = self._counts[shard]
    try:
      array_n = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise DataError(f"{path}: cannot be read: {error}") from error
    if array_n.shape != (expected,) or array_n.dtype != dtype:
      raise DataError(
        f"{path}: {array_n.dtype}{list(array_n.shape)}: expected "
        f"{np.dtype(dtype)}[{expected}], as dataset.json says"
      )
    return array_n

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
    """The number of tokens of each document: int64 (n,), read-only."""
    return self._lengths_n

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
      "lengths": array_hash(self._lengths_n),
      "files": sizes_hash(self.shards),
      "blocks": sampled_hash(self.shards),
    }

  def __len__(self) -> int:
    """Return the number of documents."""
    return len(self._lengths_n)

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
    path, reader = self.shards[shard], self._reader(shard)
    try:
      records = reader.read((document_R - first).tolist())
    except (IndexError, RuntimeError, ValueError) as error:
      raise DataError(f"{path}: cannot be read: {error}") from error
    size, expected_R = (
      self._dtype.itemsize,
      self._lengths_n[document_R].tolist(),
    )
    for i, (record, length) in enumerate(zip(records, expected_R, strict=True)):
      if len(record) != size * length:
        raise DataError(
          f"{path}, record {document_R[i] - first}: {len(record)} bytes: "
          f"expected {size * length}, as {_beside(path, 'lengths').name} says"
        )
    columns = (record_P, pieces.start_P, pieces.length_P, pieces.place_P)
    rows = zip(*(x.tolist() for x in columns), strict=True)
    for record, start, length, place in rows:
      out_N[place : place + length] = np.frombuffer(
        records[record], self._dtype, length, size * start
      )

  def _reader(self, shard: int) -> ArrayRecordReader:
    """Open a shard, and check its number of records."""
    if shard not in self._readers:
      path = self.shards[shard]
      try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        count = reader.num_records()
      except (RuntimeError, ValueError) as error:
        raise DataError(f"{path}: not an ArrayRecord file: {error}") from error
      expected = self._counts[shard]
      if count != expected:
        raise DataError(
          f"{path}: {count} records: expected {expected}, as dataset.json says"
        )
      self._readers[shard] = reader
    return self._readers[shard]

  def verify(self) -> None:
    """Read every byte and compare the checksums.

    Raises:
      DataError: a shard changed since it was made.
    """
    for shard, path in enumerate(self.shards):
      expected = self.sidecar["shards"][shard].get("sha256")
      if expected is not None and file_hash(path) != expected:
        raise DataError(f"{path}: its SHA-256 is not the one in dataset.json")

  def __repr__(self) -> str:
    return f"PreparedSource({self.name!r})"

  def __reduce__(self) -> tuple:
    return PreparedSource, (self.path,)


def _beside(shard: Path, what: str) -> Path:
  """Return the path NAME.what.npy of a shard NAME.arrayrecord."""
  return shard.with_name(f"{shard.stem}.{what}.npy")
