"""Documents out of raw files: JSON lines, Parquet, plain text.

A reader gives, in the order of the file, `Document`s and `Problem`s: nothing
that is in the file is passed over without one or the other, except blank
lines. What is read is UTF-8, and strictly so.
"""

import ast
from collections.abc import Callable, Iterator
import dataclasses
import json

from train.data.prepare.input_files import Source, TextFile, compression
from train.data.prepare.read_bytes import HashedFile, chunks, lines

_ROWS = 256  # of Parquet at a time
_TOPICS = "pydoc_data/topics.py"


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, where it stands, and the data set that it says it comes from."""

  text: str
  where: str
  domain: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """What could not be read.

  Attributes:
    where: the file, and the line, row or byte in it.
    reason: what is wrong.
    lost: how many records; 1 for a tail of unknown length.
  """

  where: str
  reason: str
  lost: int = 1

  def __str__(self) -> str:
    return f"{self.where}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Fields:
  """What of a record is read; a dot goes into a nested record.

  Attributes:
    text: the field of the text.
    domain: the field of the data set's name; a record may lack it.
    most_bytes: of a document; a longer one is a problem.
  """

  text: str = "text"
  domain: str = "meta.pile_set_name"
  most_bytes: int = 64 << 20


class Changed(ValueError):
  """A file changed while it was read."""


_Read = Iterator[Document | Problem]


class _Malformed(ValueError):
  pass


def read(
  source: Source,
  fields: Fields,
  on_bytes: Callable[[int], None],
  on_hash: Callable[[str], None],
) -> _Read:
  """The documents of a source.

  Args:
    source: of `find_sources`.
    fields: what of a record is read.
    on_bytes: is told how many bytes of the files were read since last time.
    on_hash: is told each file's SHA-256, when all of it was read.

  Raises:
    Changed: a file has not the size that the source says.
    OSError: a file cannot be read.
  """
  readers = dict(
    jsonl=_jsonl, parquet=_parquet, text=_plain_text, python=_python
  )
  reader = readers[source.kind]
  for file in source.files:
    # Parquet is read out of order, so its bytes are counted by its rows.
    silent = source.kind == "parquet"
    with HashedFile(file.path, _nothing if silent else on_bytes) as raw:
      if silent:
        on_hash(raw.sha256())
        yield from reader(file, fields, on_bytes)
      else:
        yield from reader(file, fields, raw)
        on_hash(raw.sha256())
      if raw.bytes != file.bytes:
        raise Changed(
          f"{file.name}: it has {raw.bytes:,} bytes: expected {file.bytes:,}, "
          "as when it was found"
        )


def _nothing(_: int) -> None:
  pass


def _jsonl(file: TextFile, fields: Fields, raw: HashedFile) -> _Read:
  found = False
  for line in lines(chunks(raw, compression(file.name)), fields.most_bytes):
    where = f"{file.name}, line {line.number}"
    if line.data is None:
      found = True
      yield Problem(f"{where} (byte {line.offset})", line.reason)
    elif line.data.strip():
      found = True
      try:
        yield _document(_record(line.data), fields, where)
      except _Malformed as error:
        yield Problem(f"{where} (byte {line.offset})", str(error))
  if not found:
    yield Problem(file.name, "the file is empty: expected JSON lines")


def _record(data: bytes) -> object:
  try:
    return json.loads(data.decode())
  except UnicodeDecodeError as error:
    raise _Malformed(
      f"broken UTF-8 at byte {error.start} of the line: {error.reason}"
    ) from error
  except RecursionError as error:
    raise _Malformed("no JSON: too deeply nested") from error
  except ValueError as error:
    raise _Malformed(f"no JSON: {error}") from error


def _document(record: object, fields: Fields, where: str) -> Document:
  if not isinstance(record, dict):
    raise _Malformed(f"expected an object, not {_type(record)}")
  found, text = _get(record, fields.text)
  if not found:
    raise _Malformed(
      f"there is no field {fields.text!r}; there are {sorted(record)[:8]} "
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
    if size > fields.most_bytes:
      raise _Malformed(
        f"{name} has {size:,} bytes: expected at most {fields.most_bytes:,}"
      )
  return Document(text, where, domain)


def _get(record: dict, field: str) -> tuple[bool, object]:
  value: object = record
  for key in field.split("."):
    if not isinstance(value, dict) or key not in value:
      return False, None
    value = value[key]
  return True, value


def _type(value: object) -> str:
  return "null" if value is None else f"of type {type(value).__name__}"


def _parquet(
  file: TextFile, fields: Fields, on_bytes: Callable[[int], None]
) -> _Read:
  import pyarrow as pa
  from pyarrow import parquet

  broken = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
  try:
    table = parquet.ParquetFile(file.path, page_checksum_verification=True)
    names = set(table.schema_arrow.names)
  except broken as error:
    yield Problem(file.name, f"no readable Parquet: {_short(error)}")
    on_bytes(file.bytes)
    return
  with table:
    text = fields.text.partition(".")[0]
    if text not in names:
      yield Problem(
        file.name,
        f"there is no column {text!r}; there are {sorted(names)[:8]} "
        "(--text-field)",
        max(table.metadata.num_rows, 1),
      )
      on_bytes(file.bytes)
      return
    if table.metadata.num_rows == 0:
      yield Problem(file.name, "the file is empty: expected rows")
    columns = sorted({text, fields.domain.partition(".")[0]} & names)
    first = told = 0
    for group in range(table.metadata.num_row_groups):
      rows = table.metadata.row_group(group).num_rows
      done = 0
      try:
        for batch in table.iter_batches(
          _ROWS, [group], columns, use_threads=False
        ):
          for index in range(batch.num_rows):
            where = f"{file.name}, row {first + done}"
            done += 1
            yield _row(batch, index, fields, where)
      except broken as error:
        where = f"{file.name}, row {first + done} (row group {group})"
        yield Problem(where, _short(error), max(rows - done, 1))
      first += rows
      share = file.bytes * first // max(table.metadata.num_rows, 1)
      on_bytes(share - told)
      told = share
    on_bytes(file.bytes - told)


def _row(batch, index: int, fields: Fields, where: str) -> Document | Problem:
  try:
    record = {
      name: batch.column(name)[index].as_py() for name in batch.schema.names
    }
    return _document(record, fields, where)
  except UnicodeDecodeError as error:
    return Problem(where, f"broken UTF-8 at byte {error.start}")
  except _Malformed as error:
    return Problem(where, str(error))


def _short(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _plain_text(file: TextFile, fields: Fields, raw: HashedFile) -> _Read:
  if file.bytes > fields.most_bytes:
    yield Problem(
      file.name,
      f"{file.bytes:,} bytes: expected at most {fields.most_bytes:,}",
    )
    return
  data = b"".join(chunks(raw, ""))
  try:
    if (at := data.find(b"\0")) >= 0:
      raise _Malformed(f"a NUL at byte {at}: this is no text")
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    yield Problem(file.name, f"broken UTF-8 at byte {error.start}")
  except _Malformed as error:
    yield Problem(file.name, str(error))
  else:
    yield Document(text, file.name)


def _python(file: TextFile, fields: Fields, raw: HashedFile) -> _Read:
  for found in _plain_text(file, fields, raw):
    if isinstance(found, Problem):
      yield found
    elif file.name.endswith(_TOPICS):
      # The chapters of the language reference that `help()` shows.
      tree = ast.parse(found.text)
      (topics,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign)
      )
      for name, text in ast.literal_eval(topics).items():
        where = f"{file.name}, topic {name}"
        yield Document(text, where, "python-documentation")
    else:
      yield dataclasses.replace(found, domain="python-source")
