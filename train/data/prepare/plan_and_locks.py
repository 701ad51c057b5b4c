"""The plan of a data set, and the locks on its shards.

    OUT/prepare/plan.json   tokenizer, fields, rows; every source with its size

The plan is written before any shard. A later run with the same plan continues
the data set. A run with another plan is refused, and is told what differs.

The file also carries the locks: byte i is locked by the process that makes
shard i.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from rebased_jax.atomic import named_errors, temporary
from train.data.prepare.input_files import Source, part_of
from train.data.prepare.output_folder import WORK
from train.data.prepare.read_documents import Fields
from train.data.prepare.tokenizer import TokenizerSpec

_PLAN = "plan.json"
_FINISH = 1 << 40  # the byte that is locked while dataset.json is written
_SHOWN = 5  # differences that a message names


def make_plan(
  sources: Sequence[Source],
  spec: TokenizerSpec,
  fields: Fields,
  row_length: int | None = None,
) -> dict[str, Any]:
  """Return the plan of a data set, as JSON data.

  It holds everything that the output depends on, except the bytes of the
  sources.

  Args:
    sources: one for each shard, in their order.
    spec: identifies the tokenizer.
    fields: which fields of a record are read.
    row_length: the inputs of a row, if records are rows; None if they are
      documents.
  """
  return {
    "format": "rebased-tokens plan",
    "version": 1,
    "tokenizer": dataclasses.asdict(spec),
    "fields": dataclasses.asdict(fields),
    "rows": {"length": row_length},
    "sources": [
      {
        "name": source.name,
        "kind": source.kind,
        "files": [[file.name, file.bytes] for file in source.files],
        **part_of(source),
      }
      for source in sources
    ],
  }


@contextlib.contextmanager
def claimed(out: Path, plan: dict[str, Any]) -> Iterator[BinaryIO]:
  """Reserve a folder for a plan, and open the plan's file for `lock`.

  Args:
    out: the folder of the data set; it is created if it does not exist.
    plan: from `make_plan`.

  Yields:
    The open plan file. Closing it releases the locks.

  Raises:
    ValueError: the folder holds other files, or a data set of another plan.
      The message names what differs, and nothing was changed.
  """
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file: expected a folder")
  file = out / WORK / _PLAN
  if not file.exists():
    _write_plan(out, file, plan)
  with file.open("r+b") as opened:
    try:
      held = json.loads(opened.read())
      changed = differences(held, plan)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{file} is damaged: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f"{file} is damaged: expected a plan that `rebased prepare` wrote"
      ) from error
    if changed:
      more = len(changed) - _SHOWN
      tail = f"; and {more} more" if more > 0 else ""
      raise ValueError(
        f"{out} holds another data set: {'; '.join(changed[:_SHOWN])}{tail}; "
        f"choose another --out{_or_delete(out)}"
      )
    yield opened


def lock(plan_file: BinaryIO, shards: Sequence[int]) -> None:
  """Lock shards until the file is closed or the process ends.

  Args:
    plan_file: the open plan file.
    shards: the numbers of the shards.

  Raises:
    ValueError: another process has locked one of them.
  """
  for shard in shards:
    try:
      fcntl.lockf(plan_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
    except (BlockingIOError, PermissionError) as error:
      raise ValueError(
        f"{Path(plan_file.name).parents[1]}: another process is making "
        f"shard-{shard:05d}; give each process its own --shard i/n"
      ) from error


@contextlib.contextmanager
def finishing(plan_file: BinaryIO) -> Iterator[None]:
  """Hold the lock for writing dataset.json; wait while another process has it.

  Args:
    plan_file: the open plan file.
  """
  fcntl.lockf(plan_file, fcntl.LOCK_EX, 1, _FINISH)
  try:
    yield
  finally:
    fcntl.lockf(plan_file, fcntl.LOCK_UN, 1, _FINISH)


def differences(held: dict[str, Any], plan: dict[str, Any]) -> list[str]:
  """Return what differs between two plans, one message for each difference.

  Args:
    held: the plan that the folder has.
    plan: the plan of this run.
  """
  found = []
  for part in ("tokenizer", "fields", "rows"):
    for name, value in plan[part].items():
      was = held.get(part, {}).get(name)
      if was != value:
        found.append(f"{part}.{name} was {was!r}, is {value!r}")
  was, now = _file_sizes(held), _file_sizes(plan)
  found += [f"input {name} is gone" for name in was if name not in now]
  found += [f"input {name} is new" for name in now if name not in was]
  found += [
    f"input {name} had {was[name]:,} bytes, has {size:,}"
    for name, size in now.items()
    if name in was and was[name] != size
  ]
  was, now = _parts(held), _parts(plan)
  found += [
    f"input {name} was in {was[name]} parts, is in {parts}"
    for name, parts in now.items()
    if was.get(name, parts) != parts
  ]
  if not found and held != plan:
    found.append("it was made by another version of this program")
  return found


def _file_sizes(plan: dict[str, Any]) -> dict[str, int]:
  """Return the size in bytes of each input file of a plan, by its name."""
  return {
    name: size
    for source in plan.get("sources", ())
    for name, size in source["files"]
  }


def _parts(plan: dict[str, Any]) -> dict[str, int]:
  """Return the number of parts of each input file of a plan, by its name."""
  return {
    name: source.get("part", (0, 1))[1]
    for source in plan.get("sources", ())
    for name, _ in source["files"]
  }


def _or_delete(out: Path) -> str:
  """Return a hint to delete the folder if that loses no finished shard."""
  if any((out / WORK).glob("shard-*.json")):
    return ""
  return ", or delete the folder: no shard of it is finished"


def _write_plan(out: Path, file: Path, plan: dict[str, Any]) -> None:
  """Write the plan into a folder that is new or empty.

  Raises:
    ValueError: the folder holds other files.
  """
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
    with named_errors(file):
      temp.write_text(json.dumps(plan, indent=1) + "\n")
    # Unlike a rename, a link fails if another process has written the plan.
    with contextlib.suppress(FileExistsError):
      os.link(temp, file)
