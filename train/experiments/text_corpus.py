"""Collect a text corpus from the Python installation, without a download.

The corpus has every .py, .pyi, .rst and .md file of the standard library and of
the installed packages, but not of those on PYTHONPATH. Files are UTF-8, 200
bytes to 1 MB, without duplicates. Documents are sorted by their SHA-256, so the
same packages give the same corpus. The first hundredth is held out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent import futures
import dataclasses
import hashlib
from importlib import metadata
import json
import os
from pathlib import Path
import platform
import sysconfig
from typing import Any

SUFFIXES = (".py", ".pyi", ".rst", ".md")
LEAST, MOST = 200, 1_000_000  # bytes of a file
HELD_OUT, FEWEST = 100, 8  # one document in 100 is held out, at least 8
_SHOWN = 40  # packages that the result file lists
STDLIB = "the standard library"


@dataclasses.dataclass(frozen=True)
class Document:
  """A file's text, and the package that it belongs to."""

  package: str
  sha256: str
  text: str

  @property
  def bytes(self) -> int:
    """The size of the text in UTF-8."""
    return len(self.text.encode())


def find(packages: bool) -> list[tuple[str, Path]]:
  """List (package, file).

  Args:
    packages: include installed packages, not only the standard library.
  """
  paths = sysconfig.get_paths()
  found = [(STDLIB, path) for path in _walk(Path(paths["stdlib"]))]
  if packages:
    for site in sorted(
      {Path(paths[x]).resolve() for x in ("purelib", "platlib")}
    ):
      for path in _walk(site):
        found.append(
          (path.relative_to(site).parts[0].removesuffix(".py"), path)
        )
  return found


def _walk(root: Path) -> Iterator[Path]:
  for parent, folders, names in os.walk(root):
    folders[:] = sorted(
      x
      for x in folders
      if x not in ("site-packages", "dist-packages", "__pycache__")
    )
    for name in sorted(names):
      if name.endswith(SUFFIXES):
        yield Path(parent, name)


def _read(found: tuple[str, Path]) -> Document | None:
  package, path = found
  try:
    data = path.read_bytes()
    if not LEAST <= len(data) <= MOST:
      return None
    return Document(package, hashlib.sha256(data).hexdigest(), data.decode())
  except (OSError, UnicodeDecodeError):
    return None


def gather(packages: bool, most_bytes: int) -> list[Document]:
  """Return the documents, sorted by SHA-256, up to `most_bytes` in total."""
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    read = pool.map(_read, find(packages), chunksize=64)
    unique: dict[str, Document] = {}
    for document in read:
      if document is not None:
        unique.setdefault(document.sha256, document)
  documents, total = [], 0
  for _, document in sorted(unique.items()):
    total += document.bytes
    if total > most_bytes:
      break
    documents.append(document)
  return documents


def write(documents: Sequence[Document], folder: Path, shards: int) -> None:
  """Write JSON lines for `rebased prepare` to folder/train, folder/held-out."""
  held_out = documents[: max(len(documents) // HELD_OUT, FEWEST)]
  parts = {
    "held-out": (held_out, 1),
    "train": (documents[len(held_out) :], shards),
  }
  for name, (chosen, count) in parts.items():
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
      lines = (
        json.dumps({"text": x.text, "meta": {"pile_set_name": x.package}})
        for x in chosen[shard::count]
      )
      text = "".join(f"{line}\n" for line in lines)
      (place / f"{shard:03}.jsonl").write_text(text)


def describe(documents: Sequence[Document]) -> dict[str, Any]:
  """Return what the result file says about the corpus."""
  files, sizes = Counter(), Counter()
  total = hashlib.sha256()
  for document in documents:
    files[document.package] += 1
    sizes[document.package] += document.bytes
    total.update(document.sha256.encode())
  owners = metadata.packages_distributions()
  versions = {STDLIB: platform.python_version()}
  for name, owner in owners.items():
    versions[name] = metadata.version(owner[0])
  return {
    "files": len(documents),
    "bytes": sum(sizes.values()),
    "sha256": total.hexdigest(),
    "packages": len(sizes),
    "largest": {
      name: {"files": files[name], "bytes": size, "version": versions.get(name)}
      for name, size in sizes.most_common(_SHOWN)
    },
  }
