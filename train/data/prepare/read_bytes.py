"""Bytes of a compressed text file: in order, hashed, and cut into lines.

    file → HashedFile → chunks (none, gzip, zstd; any number of frames) → lines

A stream that is cut short or damaged gives the lines before the damage and
then one `Line` that holds the reason in place of its bytes. Memory is bounded
by the longest line allowed.
"""

from collections.abc import Callable, Iterator
import dataclasses
import gzip
import hashlib
from typing import Self
import zlib

READ_BYTES = 1 << 20
# One call may grow its input ten thousand times: zstd gets little at a time.
_ZSTD_READ_BYTES = 1 << 14
_ZSTD_WINDOW = 1 << 31  # as `zstd --ultra --long=31` writes
_BOM = b"\xef\xbb\xbf"


class StreamError(ValueError):
  """A compressed stream is damaged or ends too early; says why."""


class HashedFile:
  """Reads a file once from begin to end; a context manager.

  Attributes:
    bytes: how many were read.
  """

  def __init__(self, path: str, on_bytes: Callable[[int], None]):
    self._file = open(path, "rb", buffering=0)  # noqa: SIM115
    self._on_bytes = on_bytes
    self._hash = hashlib.sha256()
    self.bytes = 0

  def read(self, size: int = READ_BYTES) -> bytes:
    """At most `size` bytes; none at the end."""
    data = self._file.read(size)
    self._hash.update(data)
    self.bytes += len(data)
    self._on_bytes(len(data))
    return data

  def sha256(self) -> str:
    """Of the whole file: reads what is left."""
    while self.read():
      pass
    return self._hash.hexdigest()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._file.close()


@dataclasses.dataclass(frozen=True)
class Line:
  """A line without its end, or the reason why it could not be had.

  Attributes:
    number: from 1.
    offset: of its first byte in the uncompressed file.
    data: the bytes; None if there is a reason.
    reason: what is wrong with it, or with the stream from here on.
  """

  number: int
  offset: int
  data: bytes | None
  reason: str | None = None


def chunks(file: HashedFile, compression: str) -> Iterator[bytes]:
  """The uncompressed bytes.

  Args:
    file: at its begin.
    compression: "", "gz" or "zst".

  Raises:
    StreamError: after the last good bytes of a damaged stream.
    ImportError: zstandard is not installed.
  """
  match compression:
    case "":
      yield from iter(file.read, b"")
    case "gz":
      yield from _gzip(file)
    case "zst":
      yield from _zstd(file)
    case _:
      raise ValueError(f'compression={compression!r}: expected "", gz or zst')


def lines(stream: Iterator[bytes], limit: int) -> Iterator[Line]:
  """Cuts at b"\\n"; the last line need not end in one.

  Args:
    stream: `chunks`.
    limit: bytes; of a longer line only the reason is given, and the next line
      follows it.
  """
  number, offset, size = 1, 0, 0
  held: list[bytes] = []
  try:
    for chunk in stream:
      *whole, rest = chunk.split(b"\n")
      for piece in whole:
        size += len(piece)
        held.append(piece)
        yield _line(number, offset, size, held, limit)
        number, offset, size, held = number + 1, offset + size + 1, 0, []
      size += len(rest)
      if size > limit:
        held = []
      elif rest:
        held.append(rest)
  except StreamError as error:
    yield Line(number, offset, None, str(error))
    return
  if size:
    yield _line(number, offset, size, held, limit)


def _line(
  number: int, offset: int, size: int, held: list[bytes], limit: int
) -> Line:
  if size > limit:
    reason = f"the line has {size:,} bytes: expected at most {limit:,}"
    return Line(number, offset, None, reason)
  data = b"".join(held)
  return Line(number, offset, data.removeprefix(_BOM) if offset == 0 else data)


def _gzip(file: HashedFile) -> Iterator[bytes]:
  try:
    with gzip.GzipFile(fileobj=file, mode="rb") as stream:
      # In pieces: what comes before the damage is not lost with it.
      while data := stream.read1(READ_BYTES):
        yield data
  except (EOFError, OSError, zlib.error) as error:
    raise StreamError(
      f"damaged gzip stream near byte {file.bytes:,} of the file: {error}"
    ) from error
  if not file.bytes:
    raise StreamError("the file is empty: expected a gzip stream")


def _zstd(file: HashedFile) -> Iterator[bytes]:
  import zstandard

  decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
  frame, begun = decompressor.decompressobj(), False
  while data := file.read(_ZSTD_READ_BYTES):
    while data:
      try:
        out = frame.decompress(data)
      except (zstandard.ZstdError, MemoryError) as error:
        raise StreamError(
          f"damaged zstd stream near byte {file.bytes:,} of the file: {error}"
        ) from error
      if out:
        yield out
      begun, data = True, b""
      if frame.eof:
        data, begun = frame.unused_data, False
        frame = decompressor.decompressobj()
  if not file.bytes:
    raise StreamError("the file is empty: expected a zstd stream")
  if begun:
    raise StreamError(
      f"the zstd stream is cut short: it ends inside a frame at byte "
      f"{file.bytes:,} of the file"
    )
