"""What a data set is going to be, claimed in its folder before any of it is.

    OUT/prepare/plan.json   tokenizer, fields, rows; every source with its size

A folder goes on with the plan that it has, or refuses and says what differs.
The plan's file also carries the locks: byte i is held by who makes shard i.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from train.atomic import WORK, temporary
from train.data.prepare.input_files import Source
from train.data.prepare.read_documents import Fields
from train.data.prepare.tokenizer import TokenizerSpec

DATASET = "dataset.json"
_PLAN = "plan.json"
_FINISH = 1 << 40  # the byte that is locked to finish a data set
_SHOWN = 5


def make_plan(
  sources: Sequence[Source],
  spec: TokenizerSpec,
  fields: Fields,
  row_length: int | None = None,
) -> dict[str, Any]:
  """All that the output depends on, but for the bytes of the sources."""
  return dict(
    format="rebased-tokens plan",
    version=1,
    tokenizer=dataclasses.asdict(spec),
    fields=dataclasses.asdict(fields),
    rows=dict(length=row_length),
    sources=[
      dict(
        name=source.name,
        kind=source.kind,
        files=[[file.name, file.bytes] for file in source.files],
      )
      for source in sources
    ],
  )


@contextlib.contextmanager
def claimed(out: Path, plan: dict[str, Any]) -> Iterator[BinaryIO]:
  """The plan's file, open for `lock`, when the folder is the plan's.

  Raises:
    ValueError: the folder holds other files, or another plan; it names what
      differs, and nothing was changed.
  """
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file: expected a folder")
  file = out / WORK / _PLAN
  if not file.exists():
    _claim(out, file, plan)
  with file.open("r+b") as opened:
    try:
      held = json.loads(opened.read())
    except ValueError as error:
      raise ValueError(f"{file} is damaged: {error}") from error
    changed = differences(held, plan)
    if changed:
      more = len(changed) - _SHOWN
      tail = f"; and {more} more" if more > 0 else ""
      raise ValueError(
        f"{out} holds another data set: {'; '.join(changed[:_SHOWN])}{tail}; "
        f"choose another --out{_or_delete(out)}"
      )
    yield opened


def lock(plan: BinaryIO, shards: Sequence[int]) -> None:
  """Holds these shards until the file is closed or the process ends.

  Raises:
    ValueError: another process makes one of them.
  """
  for shard in shards:
    try:
      fcntl.lockf(plan, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
    except (BlockingIOError, PermissionError) as error:
      raise ValueError(
        f"{Path(plan.name).parents[1]}: another process is making "
        f"shard-{shard:05d}; give each its own --shard i/n"
      ) from error


@contextlib.contextmanager
def finishing(plan: BinaryIO) -> Iterator[None]:
  """One process at a time."""
  fcntl.lockf(plan, fcntl.LOCK_EX, 1, _FINISH)
  try:
    yield
  finally:
    fcntl.lockf(plan, fcntl.LOCK_UN, 1, _FINISH)


def differences(held: dict[str, Any], plan: dict[str, Any]) -> list[str]:
  """What differs between two plans, field by field and file by file."""
  found = []
  for part in ("tokenizer", "fields", "rows"):
    for name, value in plan[part].items():
      was = held.get(part, {}).get(name)
      if was != value:
        found.append(f"{part}.{name} was {was!r}, is {value!r}")
  was, now = _files(held), _files(plan)
  found += [f"input {name} is gone" for name in was if name not in now]
  found += [f"input {name} is new" for name in now if name not in was]
  found += [
    f"input {name} had {was[name]:,} bytes, has {size:,}"
    for name, size in now.items()
    if name in was and was[name] != size
  ]
  if not found and held != plan:
    found.append("it was made by another version of this program")
  return found


def _files(plan: dict[str, Any]) -> dict[str, int]:
  return {
    name: size
    for source in plan.get("sources", ())
    for name, size in source["files"]
  }


def _or_delete(out: Path) -> str:
  """A hint where deleting the folder loses no shard."""
  if any((out / WORK).glob("shard-*.json")):
    return ""
  return ", or delete the folder: no shard of it is finished"


def _claim(out: Path, file: Path, plan: dict[str, Any]) -> None:
  if out.exists():
    found = {path.name for path in out.iterdir()} - {WORK}
    work = out / WORK
    if work.exists():
      found |= {
        path.name for path in work.iterdir() if ".tmp-" not in path.name
      }
    if found - {_PLAN}:
      raise ValueError(
        f"{out} is not empty: expected a folder that `rebased prepare` made, "
        "or a new one"
      )
  file.parent.mkdir(parents=True, exist_ok=True)
  with temporary(file.parent, file.name) as temp:
    temp.write_text(json.dumps(plan, indent=1) + "\n")
    # Unlike a rename it fails where another process was first.
    with contextlib.suppress(FileExistsError):
      os.link(temp, file)
