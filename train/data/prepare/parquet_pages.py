"""Find out how much memory the pages of a Parquet file need, before reading.

A column chunk is a sequence of pages: a header, then compressed values. The
header, a struct in Thrift's compact protocol, says how many bytes the page has
when it is decompressed. pyarrow allocates that many, and does not tell them
before. A value is never longer than its page or dictionary, but a dictionary or
a common prefix can make many long values from few bytes.
"""

from typing import Any, BinaryIO

_DEPTH = 8  # structs and lists inside each other; a page header has 3
# Fields of a page header.
_BYTES, _COMPRESSED, _DICTIONARY = 2, 3, 7
_VALUES = 1  # the field of each of these structs that counts values
_KINDS = (5, 8, _DICTIONARY)  # data page, its version 2, dictionary page


class PageError(ValueError):
  """The pages of a column chunk cannot be walked."""


def largest_page(file: BinaryIO, chunk: Any) -> int:
  """Return the most memory in bytes that one page of a column chunk needs.

  Args:
    file: the Parquet file, opened with a buffer.
    chunk: a `pyarrow.parquet.ColumnChunkMetaData`.

  Raises:
    PageError: a page header is damaged.
    OSError: the file cannot be read.
  """
  place, end = page_range(chunk)
  seen = largest = 0
  while place < end and seen < chunk.num_values:
    try:
      file.seek(place)
      header = _struct(file, 0)
      (kind,) = set(_KINDS) & header.keys()
      values = header[kind][_VALUES]
      size, compressed = header[_BYTES], header[_COMPRESSED]
      if min(size, compressed, values) < 0:
        raise ValueError("a negative size")
    except (IndexError, KeyError, TypeError, ValueError) as error:
      raise PageError(f"damaged page header at byte {place:,}") from error
    # pyarrow holds up to 8 bytes for each value beside the page itself.
    largest = max(largest, size, 8 * values)
    if kind != _DICTIONARY:
      seen += values
    place = file.tell() + compressed
  return largest


def page_range(chunk: Any) -> tuple[int, int]:
  """Return the first byte of a column chunk, and the one after its last.

  Args:
    chunk: a `pyarrow.parquet.ColumnChunkMetaData`.
  """
  start = chunk.data_page_offset
  dictionary = chunk.dictionary_page_offset
  if dictionary is not None and 0 < dictionary < start:
    start = dictionary
  return start, start + chunk.total_compressed_size


def _struct(file: BinaryIO, depth: int) -> dict[int, Any]:
  """Read a struct; return its numbers and structs by field, None for others."""
  fields: dict[int, Any] = {}
  field = 0
  while head := file.read(1)[0]:
    step, kind = head >> 4, head & 15
    field = field + step if step else _signed(_varint(file))
    fields[field] = None if kind in (1, 2) else _value(file, kind, depth + 1)
  return fields


def _value(file: BinaryIO, kind: int, depth: int) -> Any:
  """Read a value of a type of the compact protocol."""
  if depth > _DEPTH:
    raise ValueError("too deeply nested")
  match kind:
    case 1 | 2 | 3:  # a boolean in a list, or a byte
      return file.read(1)[0]
    case 4 | 5 | 6:
      return _signed(_varint(file))
    case 7:
      file.seek(8, 1)
    case 8:  # bytes, such as the least value of a page
      file.seek(_varint(file), 1)
    case 9 | 10:  # list, set
      head = file.read(1)[0]
      count = head >> 4 if head >> 4 < 15 else _varint(file)
      for _ in range(count):
        _value(file, head & 15, depth + 1)
    case 12:
      return _struct(file, depth)
    case _:  # also maps, which a page header does not have
      raise ValueError(f"type {kind}")
  return None


def _varint(file: BinaryIO) -> int:
  """Read a number of at most 64 bits, 7 in each byte."""
  value = 0
  for shift in range(0, 70, 7):
    byte = file.read(1)[0]
    value |= (byte & 127) << shift
    if byte < 128:
      return value
  raise ValueError("a number of more than 10 bytes")


def _signed(value: int) -> int:
  """Return the number that a zigzag code means."""
  return -(value >> 1) - 1 if value & 1 else value >> 1
