"""Find the files that hold text, and group them into sources.

A source becomes one shard. It is one file of JSON lines or Parquet, a part of a
large one, or a group of plain text files, each of which is one document. The
names of files are relative to the folder that all inputs share, so that they
are the same on every machine.

The parts of a file follow from its size alone, so every machine agrees on them:

    JSON lines              equal shares of the file's bytes; a line belongs to
                            the part where it begins
    compressed JSON lines   equal sizes of decompressed text; the last part has
                            the rest. Each part decompresses the file from its
                            beginning
    Parquet                 equal shares of the file's bytes; a row group
                            belongs to the part where it begins
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import os
from pathlib import Path
import platform
import sysconfig

from train.data.checks import check_local

_JSON = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
# Never read as plain text. Suffixes are compared in lower case.
_BINARY = (
  *(".gz", ".zst", ".bz2", ".xz", ".lz4", ".br", ".7z", ".zip", ".tar", ".tgz"),
  *(".arrayrecord", ".bin", ".idx", ".npy", ".npz"),
)
_SMALLEST_GROUP, _LARGEST_GROUP = 4 << 20, 256 << 20  # bytes
_GROUPS = 64  # groups of plain text, unless their sizes forbid it
_EXPANSION = 4  # text for each byte of a compressed file, about
_CORPORA = ("stdlib",)
_NOT_STDLIB = (
  *("site-packages", "dist-packages", "__pycache__"),
  *("test", "tests", "idle_test"),
)


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A file of text.

  Attributes:
    name: what the plan and messages call it.
    path: where it is.
    bytes: its size.
  """

  name: str
  path: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a large file.

  Attributes:
    index: the number of the part, from 0.
    count: the number of parts of the file.
    bytes: the size of a part in bytes of text. Only the parts of compressed
      JSON lines have it exactly.
  """

  index: int
  count: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Source:
  """The text of one shard.

  Attributes:
    name: the name of the file; of a group, the name of its first file and the
      number of the others.
    kind: "jsonl", "parquet", "text" or "python".
    files: one file, or a group of plain text files.
    part: the part of the file; None for all of it.
  """

  name: str
  kind: str
  files: tuple[TextFile, ...]
  part: Part | None = None

  @property
  def bytes(self) -> int:
    """The size of all files together, or this part's share of the file."""
    begin, end = self.share
    return end - begin

  @property
  def share(self) -> tuple[int, int]:
    """The first byte of this part's share of the file, and the one after it.

    The shares are about equal, and make up the file.
    """
    size = sum(file.bytes for file in self.files)
    if self.part is None:
      return 0, size
    index, count = self.part.index, self.part.count
    return size * index // count, size * (index + 1) // count

  @property
  def text_range(self) -> tuple[int, int | None]:
    """The place in the decompressed file where this part's lines begin.

    It is the first byte and the one after the last; None for no last one.
    """
    if self.part is None:
      return 0, None
    if not compression(self.name):
      return self.share
    index, count, size = dataclasses.astuple(self.part)
    return index * size, None if index == count - 1 else (index + 1) * size


@dataclasses.dataclass(frozen=True)
class Found:
  """The result of `find_sources`.

  Attributes:
    sources: the sources, in their order.
    left_out: suffixes, and the number of files with each that were left out.
  """

  sources: tuple[Source, ...]
  left_out: tuple[tuple[str, int], ...] = ()


def find_sources(
  inputs: Sequence[str],
  corpus: str | None = None,
  text_suffixes: Sequence[str] = TEXT_SUFFIXES,
  part_bytes: int | None = None,
) -> Found:
  """Find the sources in files and folders, or in a corpus.

  Args:
    inputs: files and folders. A file's format follows from its suffix; any
      other suffix means plain text. Folders are searched for JSON lines,
      Parquet and plain text. Links are followed, and hidden files (.name) are
      left out.
    corpus: "stdlib", the source code of Python's standard library, instead of
      inputs.
    text_suffixes: the suffixes of plain text files in a folder.
    part_bytes: split files of records with more text than this, 1 or more. A
      compressed file is taken to have 4 times its size. None: do not split.

  Raises:
    ValueError: an input does not exist or is not text, or there is no text; or
      a folder would be read twice, under its own name and through a link.
  """
  if corpus is not None:
    if inputs:
      raise ValueError(
        f"corpus={corpus!r} and inputs={tuple(inputs)}: expected one of them"
      )
    if corpus not in _CORPORA:
      raise ValueError(f"corpus={corpus!r}: expected one of {_CORPORA}")
    return Found(_stdlib())
  if not inputs:
    raise ValueError("inputs=(): expected files, folders or --corpus stdlib")
  left_out: Counter[str] = Counter()
  paths: set[Path] = set()
  seen: dict[tuple[int, int], Path] = {}
  roots = []
  for name in inputs:
    check_local("inputs", name)
    path = Path(name).absolute()
    if path.is_dir():
      roots.append(path)
      for file in _walk(path, seen):
        if not file.is_file():
          left_out["a broken link or not a regular file"] += 1
        elif _is_taken_from_folder(file.name, text_suffixes):
          paths.add(file)
        else:
          left_out[file.suffix.lower() or "no suffix"] += 1
    elif path.is_file():
      if _kind(path.name) == "text" and path.name.lower().endswith(_BINARY):
        raise ValueError(
          f"{name}: expected .jsonl, .jsonl.gz, .jsonl.zst, .parquet or plain "
          "text"
        )
      roots.append(path.parent)
      paths.add(path)
    else:
      found = ", but a pipe, socket or device" if path.exists() else ""
      raise ValueError(f"{name}: there is no such plain file or folder{found}")
  if not paths:
    seen = ", ".join(f"{n} with {x}" for x, n in left_out.most_common(5))
    raise ValueError(
      f"inputs={tuple(inputs)}: expected .jsonl, .parquet or "
      f"{', '.join(text_suffixes)} files, found {seen or 'none'}; name other "
      "suffixes of plain text by --text-suffixes"
    )
  return Found(
    _sources(sorted(paths), Path(os.path.commonpath(roots)), part_bytes),
    tuple(sorted(left_out.items())),
  )


def compression(name: str) -> str:
  """Return the compression that a file's suffix means: "gz", "zst" or ""."""
  name = name.lower()
  return name.rpartition(".")[2] if name.endswith(_COMPRESSED) else ""


def source_sha256(source: Source, hashes: list[str]) -> str:
  """Return the SHA-256 of a source.

  Args:
    source: the source.
    hashes: the SHA-256 of each of its files. The result is the hash of the only
      file, or a hash of the names and hashes of a group.
  """
  if len(hashes) == 1:
    return hashes[0]
  lines = [
    f"{file.name}\0{sha256}\n"
    for file, sha256 in zip(source.files, hashes, strict=True)
  ]
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def part_of(source: Source) -> dict[str, list[int]]:
  """Return what JSON says of a source's part; nothing if it has none."""
  if source.part is None:
    return {}
  return {"part": list(dataclasses.astuple(source.part))}


def modification_times(source: Source) -> list[int]:
  """Return when each file was last modified, in nanoseconds."""
  return [os.stat(file.path).st_mtime_ns for file in source.files]


def _kind(name: str) -> str:
  """Return the format that a file's name means."""
  name = name.lower()
  if name.endswith(".parquet"):
    return "parquet"
  stem = name
  for suffix in _COMPRESSED:
    stem = stem.removesuffix(suffix)
  return "jsonl" if stem.endswith(_JSON) else "text"


def _is_taken_from_folder(name: str, text_suffixes: Sequence[str]) -> bool:
  """Return whether a file found in a folder is read."""
  name = name.lower()
  if _kind(name) == "text":
    return name.endswith(tuple(x.lower() for x in text_suffixes))
  # A .json file in a folder is usually a config, not JSON lines.
  return not name.endswith(".json")


def _walk(folder: Path, seen: dict[tuple[int, int], Path]) -> Iterable[Path]:
  """Yield all files under a folder that are not hidden; follow links.

  Args:
    folder: the folder.
    seen: the folders that were read so far, by device and inode; it grows.

  Raises:
    ValueError: a link leads to a folder that was read before, or around in a
      circle.
  """
  for parent, folders, files in os.walk(
    folder, onerror=_fail, followlinks=True
  ):
    status = os.stat(parent)
    first = seen.setdefault((status.st_dev, status.st_ino), Path(parent))
    if first != Path(parent):
      raise ValueError(
        f"{parent} and {first} are the same folder: expected each folder once, "
        "or its text would be read twice; remove the link or the input"
      )
    folders[:] = sorted(x for x in folders if not x.startswith("."))
    for name in files:
      path = Path(parent, name)
      if not name.startswith("."):
        yield path


def _fail(error: OSError) -> None:
  raise error


def _sources(
  paths: Sequence[Path], root: Path, part_bytes: int | None
) -> tuple[Source, ...]:
  """Group and split files into sources; names are relative to `root`."""
  records, texts = [], []
  for path in paths:
    name = path.relative_to(root).as_posix()
    if not name.isascii() and name != name.encode(errors="replace").decode():
      raise ValueError(f"{name!r}: expected a name in UTF-8")
    file = TextFile(name, str(path), path.stat().st_size)
    kind = _kind(name)
    if kind == "text":
      texts.append(file)
    else:
      records += _parts(Source(name, kind, (file,)), part_bytes)
  return (*records, *_groups(texts, "text"))


def _parts(source: Source, part_bytes: int | None) -> list[Source]:
  """Split a source into parts, if it has more text than `part_bytes`."""
  if part_bytes is None:
    return [source]
  compressed = source.kind == "parquet" or compression(source.name)
  text = source.bytes * (_EXPANSION if compressed else 1)
  count = -(-text // part_bytes)
  if count < 2:
    return [source]
  return [
    dataclasses.replace(source, part=Part(index, count, part_bytes))
    for index in range(count)
  ]


def _groups(files: Sequence[TextFile], kind: str) -> tuple[Source, ...]:
  """Group plain text files, in their order, into sources of similar size."""
  total = sum(file.bytes for file in files)
  most = min(max(total // _GROUPS, _SMALLEST_GROUP), _LARGEST_GROUP)
  groups: list[list[TextFile]] = []
  size = 0
  for file in files:
    if not groups or size + file.bytes > most:
      groups.append([])
      size = 0
    groups[-1].append(file)
    size += file.bytes
  return tuple(
    Source(
      group[0].name
      if len(group) == 1
      else f"{group[0].name} +{len(group) - 1}",
      kind,
      tuple(group),
    )
    for group in groups
  )


def _stdlib() -> tuple[Source, ...]:
  """Return the sources of Python's standard library, without its tests."""
  root = Path(sysconfig.get_paths()["stdlib"])
  files = []
  for parent, folders, names in os.walk(root):
    folders[:] = sorted(
      name
      for name in folders
      if name not in _NOT_STDLIB and not name.startswith("config-")
    )
    for name in sorted(names):
      path = Path(parent, name)
      if name.endswith(".py"):
        label = f"python-{platform.python_version()}/{path.relative_to(root)}"
        files.append(TextFile(label, str(path), path.stat().st_size))
  return _groups(files, "python")
