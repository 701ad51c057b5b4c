"""Read a text file, hash and decompress its bytes, and cut them into lines.

    file → HashedFile → decompressed (none, gzip, zstd; any number of frames)
         → lines

A truncated or damaged stream gives the lines before the damage, and then one
`Line` that holds the reason instead of bytes. Memory is bounded by the longest
line allowed.
"""

from collections.abc import Callable, Iterator
import dataclasses
import gzip
import hashlib
import os
from pathlib import Path
import stat
from typing import BinaryIO, Self
import zlib

from rebased_jax.atomic import named_errors

READ_BYTES = 1 << 20
# A call of zstd returns at most 128 KiB for every 4 bytes of its input: 32 MiB.
_ZSTD_READ_BYTES = 1 << 10
# The window, which zstd holds in memory. `zstd` itself needs --long for more.
_ZSTD_WINDOW = 128 << 20
_ZSTD_LARGEST_WINDOW = 1 << 31  # of the format, by `zstd --ultra --long=31`
_BOM = b"\xef\xbb\xbf"


class StreamError(ValueError):
  """A compressed stream is damaged or ends too early."""


def open_plain(path: str | Path) -> BinaryIO:
  """Open a plain file without a buffer, to read its bytes.

  Raises:
    OSError: it cannot be opened, or is a pipe, socket or device, which may
      block or never end.
  """
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(f"{path}: expected a plain file")
  return open(descriptor, "rb", buffering=0)


def range_hash(path: str, begin: int, end: int) -> str:
  """Return the SHA-256 of the bytes of a file from `begin` up to `end`."""
  digest = hashlib.sha256()
  with named_errors(path), open_plain(path) as file:
    file.seek(begin)
    while data := file.read(min(READ_BYTES, end - begin)):
      digest.update(data)
      begin += len(data)
  return digest.hexdigest()


class HashedFile:
  """Read a file once up to its end, and hash it; a context manager.

  Args:
    path: the file.
    on_bytes: called with the number of bytes of each read.
    begin: the first byte that is read and hashed.

  Attributes:
    bytes: the number of bytes read so far.

  Raises:
    OSError: the file cannot be opened, or is a pipe, socket or device.
  """

  def __init__(
    self, path: str, on_bytes: Callable[[int], None], begin: int = 0
  ) -> None:
    self._path = path
    self._file = open_plain(path)
    self._file.seek(begin)
    self._on_bytes = on_bytes
    self._hash = hashlib.sha256()
    self.bytes = 0

  def read(self, size: int = READ_BYTES) -> bytes:
    """Return the next bytes, at most `size`; b"" at the end."""
    with named_errors(self._path):
      data = self._file.read(size)
    self._hash.update(data)
    self.bytes += len(data)
    self._on_bytes(len(data))
    return data

  def sha256(self) -> str:
    """Read the rest of the file and return the SHA-256 of all of it."""
    while self.read():
      pass
    return self._hash.hexdigest()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._file.close()


@dataclasses.dataclass(frozen=True)
class Line:
  """A line without its line break, or the reason why it cannot be read.

  Attributes:
    number: the number of the line, from 1.
    offset: the place of its first byte in the uncompressed file.
    data: the bytes; None if there is a reason.
    reason: what is wrong with the line, or with the stream from here on.
  """

  number: int
  offset: int
  data: bytes | None
  reason: str | None = None


def decompressed(
  file: HashedFile, compression: str, window: int = _ZSTD_WINDOW
) -> Iterator[bytes]:
  """Yield the uncompressed bytes of a file, in pieces of at most 1 MiB.

  Args:
    file: a file of which nothing was read yet.
    compression: "", "gz" or "zst".
    window: how many bytes a zstd stream may keep in memory, if that is more
      than 128 MiB.

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
      yield from _zstd(file, max(window, _ZSTD_WINDOW))
    case _:
      raise ValueError(f'compression={compression!r}: expected "", gz or zst')


def without_beginning(stream: Iterator[bytes], count: int) -> Iterator[bytes]:
  """Yield a stream without its first `count` bytes."""
  for data in stream:
    if count < len(data):
      yield data[count:]
    count = max(count - len(data), 0)


def lines(
  stream: Iterator[bytes], limit: int, begin: int = 0, end: int | None = None
) -> Iterator[Line]:
  """Cut bytes into lines at each line feed; the last line need not end in one.

  Args:
    stream: from `decompressed`. With `begin` > 0 it starts at byte begin - 1 of
      the file, because only that byte tells whether a line begins at `begin`.
    limit: the longest line in bytes. A longer one is yielded as a reason, and
      the lines after it follow.
    begin: yield only lines that begin at this byte of the file or later.
    end: yield only lines that begin before this byte; None for all. The reason
      of a damaged stream is yielded in the place of the line that is cut.

  Yields:
    The lines in their order, numbered from 1.
  """
  number, offset, size = (0, begin - 1, 0) if begin else (1, 0, 0)
  held: list[bytes] = []
  try:
    for data in stream:
      *whole, rest = data.split(b"\n")
      for piece in whole:
        size += len(piece)
        held.append(piece)
        if offset >= begin:
          yield _line(number, offset, size, held, limit)
        number, offset, size, held = number + 1, offset + size + 1, 0, []
        if end is not None and offset >= end:
          return
      size += len(rest)
      if size > limit or offset < begin:
        held = []
      elif rest:
        held.append(rest)
  except StreamError as error:
    if offset >= begin:
      yield Line(number, offset, None, str(error))
    return
  if size and offset >= begin:
    yield _line(number, offset, size, held, limit)


def _line(
  number: int, offset: int, size: int, held: list[bytes], limit: int
) -> Line:
  """Join the pieces of a line of `size` bytes, unless it is too long."""
  if size > limit:
    reason = f"the line has {size:,} bytes: expected at most {limit:,}"
    return Line(number, offset, None, reason)
  data = b"".join(held)
  return Line(number, offset, data.removeprefix(_BOM) if offset == 0 else data)


def _gzip(file: HashedFile) -> Iterator[bytes]:
  """Yield the uncompressed bytes of a gzip file."""
  try:
    with gzip.GzipFile(fileobj=file, mode="rb") as stream:  # pyrefly: ignore[no-matching-overload]  # only `read` is called
      # Piece by piece, so that the bytes before a damage are not lost.
      while data := stream.read1(READ_BYTES):
        yield data
  except (EOFError, OSError, zlib.error) as error:
    raise StreamError(
      f"damaged gzip stream near byte {file.bytes:,} of the file: {error}"
    ) from error
  if not file.bytes:
    raise StreamError("the file is empty: expected a gzip stream")


def _zstd(file: HashedFile, window: int) -> Iterator[bytes]:
  """Yield the uncompressed bytes of a zstd file of any number of frames."""
  import zstandard

  window = min(window, _ZSTD_LARGEST_WINDOW)
  decompressor = zstandard.ZstdDecompressor(max_window_size=window)
  frame, begun = decompressor.decompressobj(), False
  while data := file.read(_ZSTD_READ_BYTES):
    while data:
      try:
        out = frame.decompress(data)
      except (zstandard.ZstdError, MemoryError) as error:
        where = f"near byte {file.bytes:,} of the file"
        if "requires too much memory" in str(error):
          raise StreamError(
            f"the zstd window {where} is above {window >> 20} MiB: raise "
            "--max-document-mb to its size, or compress without --long"
          ) from error
        raise StreamError(f"damaged zstd stream {where}: {error}") from error
      for begin in range(0, len(out), READ_BYTES):
        yield out[begin : begin + READ_BYTES]
      begun, data = True, b""
      if frame.eof:
        data, begun = frame.unused_data, False
        frame = decompressor.decompressobj()
  if not file.bytes:
    raise StreamError("the file is empty: expected a zstd stream")
  if begun:
    raise StreamError(
      f"the zstd stream is truncated: it ends inside a frame at byte "
      f"{file.bytes:,} of the file"
    )
