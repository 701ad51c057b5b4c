"""Which files hold the text: found, named, ordered and grouped.

A source is what becomes one shard: one file of JSON lines or Parquet, or a
group of plain text files, each of them one document. Names are relative to
the folder that all inputs share, so they are the same on every machine.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import os
from pathlib import Path
import platform
import sysconfig

_JSON = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
# No plain text, whatever the user says. All are found in any case (.TXT).
_BINARY = (".gz", ".zst", ".arrayrecord", ".bin", ".idx", ".npy", ".zip")
_LEAST_GROUP, _LARGEST_GROUP, _GROUPS = 4 << 20, 256 << 20, 64
_CORPORA = ("stdlib",)
_NOT_STDLIB = (
  *("site-packages", "dist-packages", "__pycache__"),
  *("test", "tests", "idle_test"),
)


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A file: its name in messages, its path, its size in bytes."""

  name: str
  path: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class Source:
  """What becomes one shard.

  Attributes:
    name: of the file, or of the first of a group and how many follow.
    kind: "jsonl", "parquet", "text" or "python".
    files: one, or a group of plain text.
  """

  name: str
  kind: str
  files: tuple[TextFile, ...]

  @property
  def bytes(self) -> int:
    return sum(file.bytes for file in self.files)


@dataclasses.dataclass(frozen=True)
class Found:
  """The sources in order, and how many files were left out, by suffix."""

  sources: tuple[Source, ...]
  left_out: tuple[tuple[str, int], ...] = ()


def find_sources(
  inputs: Sequence[str],
  corpus: str | None = None,
  text_suffixes: Sequence[str] = TEXT_SUFFIXES,
) -> Found:
  """The sources of files and folders, or of a corpus.

  Args:
    inputs: files, taken by their suffix and else as plain text; folders,
      searched for JSON lines, Parquet and text. Links to folders are not
      followed, and what is hidden (.name) is left out.
    corpus: "stdlib", Python's own standard library, in place of inputs.
    text_suffixes: what is plain text in a folder.

  Raises:
    ValueError: nothing there, an input that does not exist, or no text.
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
  roots = []
  for name in inputs:
    path = Path(name).absolute()
    if path.is_dir():
      roots.append(path)
      for file in _walk(path):
        if not file.is_file():
          left_out["a broken link or no plain file"] += 1
        elif _is_text_of_a_folder(file.name, text_suffixes):
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
      raise ValueError(f"{name}: there is no such plain file or folder")
  if not paths:
    seen = ", ".join(f"{n} with {x}" for x, n in left_out.most_common(5))
    raise ValueError(
      f"inputs={tuple(inputs)}: no .jsonl, .parquet or "
      f"{', '.join(text_suffixes)} file is in there, but {seen or 'nothing'}; "
      "--text-suffixes says what else is plain text"
    )
  return Found(
    _sources(sorted(paths), Path(os.path.commonpath(roots))),
    tuple(sorted(left_out.items())),
  )


def compression(name: str) -> str:
  """ "gz", "zst" or "", by the suffix."""
  name = name.lower()
  return name.rpartition(".")[2] if name.endswith(_COMPRESSED) else ""


def source_sha256(source: Source, hashes: list[str]) -> str:
  """Of one file its SHA-256, of a group that of its names and SHA-256s."""
  if len(hashes) == 1:
    return hashes[0]
  lines = [
    f"{file.name}\0{sha256}\n"
    for file, sha256 in zip(source.files, hashes, strict=True)
  ]
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def times(source: Source) -> list[int]:
  """When each file was last changed, in nanoseconds."""
  return [os.stat(file.path).st_mtime_ns for file in source.files]


def _kind(name: str) -> str:
  name = name.lower()
  if name.endswith(".parquet"):
    return "parquet"
  stem = name
  for suffix in _COMPRESSED:
    stem = stem.removesuffix(suffix)
  return "jsonl" if stem.endswith(_JSON) else "text"


def _is_text_of_a_folder(name: str, text_suffixes: Sequence[str]) -> bool:
  name = name.lower()
  if _kind(name) == "text":
    return name.endswith(tuple(x.lower() for x in text_suffixes))
  return not name.endswith(".json")  # most often no lines but a config


def _walk(folder: Path) -> Iterable[Path]:
  for parent, folders, files in os.walk(folder, onerror=_fail):
    folders[:] = sorted(x for x in folders if not x.startswith("."))
    for name in files:
      path = Path(parent, name)
      if not name.startswith("."):
        yield path


def _fail(error: OSError) -> None:
  raise error


def _sources(paths: Sequence[Path], root: Path) -> tuple[Source, ...]:
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
      records.append(Source(name, kind, (file,)))
  return (*records, *_groups(texts, "text"))


def _groups(files: Sequence[TextFile], kind: str) -> tuple[Source, ...]:
  total = sum(file.bytes for file in files)
  most = min(max(total // _GROUPS, _LEAST_GROUP), _LARGEST_GROUP)
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
