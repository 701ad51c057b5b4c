"""Read documents from raw files: JSON lines, Parquet and plain text.

A reader yields `Document`s and `Problem`s in the order of the file. Every part
of the file becomes one or the other, except blank lines. Text must be valid
UTF-8.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import json
import os
from typing import Any

from train.data.prepare.input_files import Source, TextFile, compression
from train.data.prepare.parquet_pages import largest_page, page_range
from train.data.prepare.read_lines import (
  READ_BYTES,
  HashedFile,
  Line,
  decompressed,
  lines,
  range_hash,
  without_beginning,
)

_ROWS = 256  # the most rows of Parquet that are decoded at a time
_BATCH_BYTES = 64 << 20  # the most memory for them, unless one row needs more
_PAGE_BYTES = 256 << 20  # the largest page of Parquet
_DOMAIN_LENGTH = 1024  # characters; the names of all domains are kept
_NAME_LENGTH = 40  # characters of a field's name that a message shows
_TOPICS = "pydoc_data/topics.py"


@dataclasses.dataclass(frozen=True)
class Document:
  """A text.

  Attributes:
    text: the text.
    where: the file, and the line or row, for messages.
    domain: the data set that the text comes from; None if it names none.
  """

  text: str
  where: str
  domain: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """A part of a file that cannot be read.

  Attributes:
    where: the file, and the line, row or byte in it.
    reason: what is wrong.
    lost: the number of records that are lost; 1 if it is unknown.
  """

  where: str
  reason: str
  lost: int = 1

  def __str__(self) -> str:
    return f"{self.where}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Fields:
  """Which fields of a record are read; a dot enters a nested record.

  Attributes:
    text: the field that holds the text.
    domain: the field that holds the name of its data set. It may be absent.
    most_bytes: the longest document in bytes; a longer one is a problem.
  """

  text: str = "text"
  domain: str = "meta.pile_set_name"
  most_bytes: int = 64 << 20


class Changed(ValueError):
  """A file changed while it was read."""


_Read = Iterator[Document | Problem]


class _Malformed(ValueError):
  """A record cannot be read; the message is the reason."""


def read(
  source: Source,
  fields: Fields,
  on_bytes: Callable[[int], None],
  on_hash: Callable[[str], None],
) -> _Read:
  """Read the documents of a source.

  Args:
    source: from `find_sources`.
    fields: which fields of a record are read.
    on_bytes: called with the number of bytes of the files that were read since
      the last call.
    on_hash: called with the SHA-256 of each file that was read completely.

  Yields:
    Documents and problems, in the order of the files.

  Raises:
    Changed: a file does not have the size that the source says.
    OSError: a file cannot be read.
  """
  if source.part is not None:
    yield from _read_part(source, fields, on_bytes, on_hash)
    return
  readers = {"jsonl": _jsonl, "text": _plain_text, "python": _python}
  for file in source.files:
    # pyarrow opens a Parquet file itself and reads it out of order. The file
    # is hashed first, and progress is counted by its rows.
    parquet = source.kind == "parquet"
    with HashedFile(file.path, _nothing if parquet else on_bytes) as raw:
      if parquet:
        on_hash(raw.sha256())
        yield from _parquet(file, fields, on_bytes, source.share)
      else:
        yield from readers[source.kind](file, fields, raw)
        on_hash(raw.sha256())
      _check_unchanged(file, raw.bytes)


def _read_part(
  source: Source,
  fields: Fields,
  on_bytes: Callable[[int], None],
  on_hash: Callable[[str], None],
) -> _Read:
  """Read a part of a file as `read` does; its hash is that of its share."""
  (file,), (begin, end) = source.files, source.share
  on_hash(range_hash(file.path, begin, end))
  if source.kind == "parquet":
    yield from _parquet(file, fields, on_bytes, source.share)
  else:
    yield from _part_of_jsonl(source, fields)
    on_bytes(end - begin)
  _check_unchanged(file, os.stat(file.path).st_size)


def _check_unchanged(file: TextFile, size: int) -> None:
  """Raise Changed unless a file still has the size that its source says."""
  if size != file.bytes:
    raise Changed(
      f"{file.name}: it has {size:,} bytes: expected {file.bytes:,}, its size "
      "when the run began"
    )


def _nothing(_: int) -> None:
  pass


def _jsonl(file: TextFile, fields: Fields, raw: HashedFile) -> _Read:
  """Read the records of a file of JSON lines."""
  found = False
  stream = decompressed(raw, compression(file.name), fields.most_bytes)
  for item in _records(lines(stream, fields.most_bytes), file.name, fields):
    found = True
    yield item
  if not found:
    yield Problem(file.name, "the file is empty: expected JSON lines")


def _part_of_jsonl(source: Source, fields: Fields) -> _Read:
  """Read the records that begin in a part of a file of JSON lines."""
  assert source.part is not None
  (file,), part = source.files, source.part
  begin, end = source.text_range
  first = max(begin - 1, 0)
  packed = compression(file.name)
  with HashedFile(file.path, _nothing, 0 if packed else first) as raw:
    stream = decompressed(raw, packed, fields.most_bytes)
    if packed:
      stream = without_beginning(stream, first)
    found = lines(stream, fields.most_bytes, begin, end)
    name = f"{file.name}, part {part.index + 1} of {part.count}"
    yield from _records(found, name, fields)


def _records(found: Iterator[Line], name: str, fields: Fields) -> _Read:
  """Read each line as a record; blank lines are left out."""
  for line in found:
    where = f"{name}, line {line.number}"
    if line.data is None:
      yield Problem(f"{where} (byte {line.offset})", line.reason or "")
    elif line.data.strip():
      try:
        yield _document(_record(line.data), fields, where)
      except _Malformed as error:
        yield Problem(f"{where} (byte {line.offset})", str(error))


def _record(data: bytes) -> object:
  """Parse one line of JSON; _Malformed if it is not valid."""
  try:
    return json.loads(data.decode())
  except UnicodeDecodeError as error:
    raise _Malformed(
      f"broken UTF-8 at byte {error.start} of the line: {error.reason}"
    ) from error
  except RecursionError as error:
    raise _Malformed("not JSON: too deeply nested") from error
  except ValueError as error:
    raise _Malformed(f"not JSON: {error}") from error


def _document(record: object, fields: Fields, where: str) -> Document:
  """Take the text and the domain from a record; _Malformed if it cannot."""
  if not isinstance(record, dict):
    raise _Malformed(f"expected an object, not {_type(record)}")
  found, text = _get(record, fields.text)
  if not found:
    raise _Malformed(
      f"there is no field {fields.text!r}; there are {_some(record)} "
      "(--text-field)"
    )
  if not isinstance(text, str):
    raise _Malformed(f"{fields.text} is {_type(text)}: expected a string")
  _, domain = _get(record, fields.domain)
  if not isinstance(domain, str | None):
    raise _Malformed(f"{fields.domain} is {_type(domain)}: expected a string")
  for name, value in ((fields.text, text), (fields.domain, domain or "")):
    try:
      size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
      raise _Malformed(
        f"{name} has half a surrogate pair at character {error.start}"
      ) from error
    _check_length(name, size, fields.most_bytes)
  if domain is not None and len(domain) > _DOMAIN_LENGTH:
    raise _Malformed(
      f"{fields.domain} has {len(domain):,} characters: expected the name of a "
      f"data set, at most {_DOMAIN_LENGTH:,}"
    )
  return Document(text, where, domain)


def _check_length(name: str, size: int, limit: int) -> None:
  """Raise _Malformed if a string of `size` bytes is too long."""
  if size > limit:
    raise _Malformed(f"{name} has {size:,} bytes: expected at most {limit:,}")


def _some(names: Iterable[str]) -> list[str]:
  """Return some field names for a message; a name may be of any length."""
  return [name[:_NAME_LENGTH] for name in sorted(names)[:8]]


def _get(record: dict, field: str) -> tuple[bool, object]:
  """Look up a dotted field; return whether it exists, and its value."""
  value: object = record
  for key in field.split("."):
    if not isinstance(value, dict) or key not in value:
      return False, None
    value = value[key]
  return True, value


def _type(value: object) -> str:
  """Return how a message describes the type of a value."""
  return "null" if value is None else f"of type {type(value).__name__}"


def _parquet(
  file: TextFile,
  fields: Fields,
  on_bytes: Callable[[int], None],
  share: tuple[int, int],
) -> _Read:
  """Read the row groups of a Parquet file that begin in a range of its bytes.

  A problem of the whole file belongs to the range that begins at 0.
  """
  import pyarrow as pa
  from pyarrow import parquet

  broken = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
  try:
    table = parquet.ParquetFile(
      file.path, buffer_size=READ_BYTES, page_checksum_verification=True
    )
    names = table.schema_arrow.names
  except broken as error:
    if share[0] == 0:
      yield Problem(file.name, f"not readable as Parquet: {_short(error)}")
    on_bytes(share[1] - share[0])
    return
  with table, open(file.path, "rb") as raw:
    try:
      columns = _columns(table, fields, names)
    except _Malformed as error:
      if share[0] == 0:
        yield Problem(file.name, str(error), max(table.metadata.num_rows, 1))
      on_bytes(share[1] - share[0])
      return
    if table.metadata.num_rows == 0 and share[0] == 0:
      yield Problem(file.name, "the file is empty: expected rows")
    first, told = 0, share[0]
    for group in range(table.metadata.num_row_groups):
      rows = table.metadata.row_group(group).num_rows
      begin, _ = page_range(table.metadata.row_group(group).column(columns[0]))
      # A wrong place must not leave the group without a part.
      if not share[0] <= min(max(begin, 0), file.bytes - 1) < share[1]:
        first += rows
        continue
      done = 0
      try:
        chunks = [table.metadata.row_group(group).column(x) for x in columns]
        size = max(largest_page(raw, chunk) for chunk in chunks)
        _check_page(size, fields)
        # Each row may be as long as a page.
        together = min(max(_BATCH_BYTES // max(size, 1), 1), _ROWS)
        paths = [chunk.path_in_schema for chunk in chunks]
        for batch in table.iter_batches(
          together, [group], paths, use_threads=False
        ):
          for index in range(batch.num_rows):
            where = f"{file.name}, row {first + done}"
            done += 1
            yield _row(batch, index, fields, where)
      except broken as error:
        where = f"{file.name}, row {first + done} (row group {group})"
        yield Problem(where, _short(error), max(rows - done, 1))
      first += rows
      place = file.bytes * first // max(table.metadata.num_rows, 1)
      place = min(max(place, told), share[1])
      on_bytes(place - told)
      told = place
    on_bytes(share[1] - told)


def _columns(table: Any, fields: Fields, names: list[str]) -> list[int]:
  """Return the columns of a Parquet file that hold the text and the domain.

  Args:
    table: the `pyarrow.parquet.ParquetFile`.
    fields: which fields of a record are read.
    names: the names of its outermost fields.

  Raises:
    _Malformed: there is no text, or a field is there twice or is no string.
  """
  leaves = [table.schema.column(i) for i in range(len(table.schema))]
  found = []
  for field, option in (
    (fields.text, "--text-field"),
    (fields.domain, "--domain-field"),
  ):
    own = [i for i, leaf in enumerate(leaves) if leaf.path == field]
    inside = [x for x in leaves if x.path.startswith(f"{field}.")]
    if len(own) > 1 or names.count(field.partition(".")[0]) > 1:
      raise _Malformed(
        f"the column {field!r} is there more than once: expected one ({option})"
      )
    if inside or any(
      leaves[i].max_repetition_level
      or leaves[i].physical_type == "FIXED_LEN_BYTE_ARRAY"
      for i in own
    ):
      raise _Malformed(f"{field} is no column of strings ({option})")
    if not own and field == fields.text:
      raise _Malformed(
        f"there is no column {field!r}; there are {_some(names)} ({option})"
      )
    found += own
  return sorted(set(found))


def _check_page(size: int, fields: Fields) -> None:
  """Raise _Malformed if a page of Parquet needs too much memory."""
  limit = max(_PAGE_BYTES, 4 * fields.most_bytes)
  if size > limit:
    raise _Malformed(
      f"a page needs {size:,} bytes of memory: expected at most {limit:,}; "
      "write smaller pages, or raise --max-document-mb"
    )


def _row(
  batch: Any, index: int, fields: Fields, where: str
) -> Document | Problem:
  """Read one row of a pyarrow record batch."""
  try:
    record = {
      name: batch.column(i)[index] for i, name in enumerate(batch.schema.names)
    }
    for field in (fields.text, fields.domain):
      _check_size(record, field, fields.most_bytes)
    record = {name: value.as_py() for name, value in record.items()}
    return _document(record, fields, where)
  except UnicodeDecodeError as error:
    return Problem(where, f"broken UTF-8 at byte {error.start}")
  except _Malformed as error:
    return Problem(where, str(error))


def _check_size(record: dict[str, Any], field: str, limit: int) -> None:
  """Raise _Malformed if a string of a row is too long, before it is copied.

  Args:
    record: pyarrow scalars by name.
    field: a dotted name.
    limit: the most bytes.
  """
  name, *inner = field.split(".")
  value = record.get(name)
  for key in inner:
    if value is None or not value.is_valid:
      return
    value = value[key]
  # Strings and bytes have a buffer; it is None for null.
  buffer = value.as_buffer() if hasattr(value, "as_buffer") else None
  if buffer is not None:
    _check_length(field, buffer.size, limit)


def _short(error: BaseException) -> str:
  """Return the first line of an error's message."""
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _plain_text(file: TextFile, fields: Fields, raw: HashedFile) -> _Read:
  """Read a plain text file as one document."""
  if file.bytes > fields.most_bytes:
    yield Problem(
      file.name,
      f"{file.bytes:,} bytes: expected at most {fields.most_bytes:,}",
    )
    return
  data = b"".join(decompressed(raw, "", fields.most_bytes))
  try:
    if (at := data.find(b"\0")) >= 0:
      raise _Malformed(f"a NUL at byte {at}: expected text")
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    yield Problem(file.name, f"broken UTF-8 at byte {error.start}")
  except _Malformed as error:
    yield Problem(file.name, str(error))
  else:
    yield Document(text, file.name)


def _python(file: TextFile, fields: Fields, raw: HashedFile) -> _Read:
  """Read a Python source file; each topic of pydoc is a document."""
  for found in _plain_text(file, fields, raw):
    if isinstance(found, Problem):
      yield found
    elif file.name.endswith(_TOPICS):
      # A dict of chapters of the language reference, which `help()` shows.
      tree = ast.parse(found.text)
      (topics,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign)
      )
      for name, text in ast.literal_eval(topics).items():
        where = f"{file.name}, topic {name}"
        yield Document(text, where, "python-documentation")
    else:
      yield dataclasses.replace(found, domain="python-source")
