"""SHA-256 hashes of files, which fingerprints of data are made of.

Large token files are not read whole. `sizes_hash` covers their names and
sizes, and `sampled_hash` covers 64 blocks of their bytes.
"""

from collections.abc import Sequence
import hashlib
from pathlib import Path

_BLOCKS = 64
_BLOCK_BYTES = 4096


def file_hash(path: Path | str) -> str:
  """Return the SHA-256 of a whole file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_hash(paths: Sequence[Path]) -> str:
  """Return the SHA-256 of 64 blocks of 4 KiB, spread evenly over all files.

  The first and the last block are always included. If the files have at most
  256 KiB together, all their bytes are hashed. A change between two blocks is
  not detected.

  Args:
    paths: the files, in their order.
  """
  sizes = [path.stat().st_size for path in paths]
  total = sum(sizes)
  if total <= _BLOCKS * _BLOCK_BYTES:
    places = list(range(0, total, _BLOCK_BYTES))
  else:
    last = total - _BLOCK_BYTES
    places = [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
  digest, first = hashlib.sha256(), 0
  for path, size in zip(paths, sizes, strict=True):
    with path.open("rb") as file:
      for place in places:
        begin, end = max(place, first), min(place + _BLOCK_BYTES, first + size)
        if begin < end:
          file.seek(begin - first)
          digest.update(file.read(end - begin))
    first += size
  return digest.hexdigest()


def sizes_hash(paths: Sequence[Path]) -> str:
  """Return the SHA-256 of the names and sizes of files, in their order."""
  text = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
  return hashlib.sha256(text.encode()).hexdigest()
