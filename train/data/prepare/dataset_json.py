"""Write dataset.json, the description of a data set, when all shards are made.

The file is written last, so its presence marks a finished data set. Domains
are numbered only here, because their names are known only when every shard is
made.
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console

from rebased_jax.atomic import sync
from train.console import say
from train.data.prepare.output_folder import (
  DATASET,
  WORK,
  write_array,
  write_json,
)
from train.data.prepare.plan_and_locks import finishing
from train.data.prepare.shard import (
  NO_DOMAIN,
  Job,
  PrepareError,
  read_record,
)
from train.data.prepare.tokenizer import TokenizerSpec

_TOTALS = ("documents", "tokens", "skipped", "empty", "text_bytes")
_ROW_TOTALS = ("rows", "left_over")


@dataclasses.dataclass(frozen=True)
class Description:
  """The content of dataset.json besides its counts.

  Attributes:
    spec: identifies the tokenizer.
    row_length: the inputs of a row; None if records are documents.
    text_field: the field of a record that holds the text.
    domain_field: the field of a record that holds the domain.
  """

  spec: TokenizerSpec
  row_length: int | None
  text_field: str
  domain_field: str


def totals(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
  """Return the sum over shards of each count.

  Args:
    shards: the "shard" entries of the shards' records, one or more.
  """
  names = _TOTALS
  if "rows" in shards[0]:
    names += _ROW_TOTALS
  return {name: sum(shard[name] for shard in shards) for name in names}


def finish(
  plan_file: BinaryIO,
  out: Path,
  jobs: Sequence[Job],
  description: Description,
  console: Console,
) -> dict[str, Any] | None:
  """Write dataset.json if every shard is made, and print its counts.

  A file that has the right content already is left alone.

  Args:
    plan_file: the open plan file.
    out: the folder of the data set.
    jobs: the jobs of all shards, in their order.
    description: what the file says besides its counts.
    console: where the counts are printed.

  Returns:
    The content of dataset.json; None if a shard is missing.

  Raises:
    PrepareError: there is no document, or no row.
  """
  missing = [job.name for job in jobs if not job.record_file.exists()]
  if missing:
    say(
      console,
      f"{len(missing)} of {len(jobs)} shards are still to be made by the "
      f"other --shard i/n; the first is {missing[0]}",
    )
    return None
  with finishing(plan_file):
    value = _write_dataset(out, jobs, description)
  rows = f"{value['rows']:,} rows, " if "rows" in value else ""
  say(
    console,
    f"{out}: {value['documents']:,} documents, {value['tokens']:,} tokens, "
    f"{rows}{value['skipped']:,} skipped, {value['empty']:,} empty",
  )
  return value


def _write_dataset(
  out: Path, jobs: Sequence[Job], description: Description
) -> dict[str, Any]:
  """Number the domains, then write dataset.json and return its content."""
  records = [_record(job) for job in jobs]
  shards = [record["shard"] for record in records]
  total, length = totals(shards), description.row_length
  if not total["documents"]:
    raise PrepareError(f"{out}: no document was found in {len(jobs)} inputs")
  if length is not None and not total["rows"]:
    raise PrepareError(
      f"{out}: no row of row_length + 1 = {length + 1} tokens: the "
      f"{len(jobs)} shards have {total['tokens']:,} tokens"
    )
  names = sorted({name for shard in shards for name in shard["domains"]})
  if names == [NO_DOMAIN]:
    names = []
    shards = [dict(shard, domains={}) for shard in shards]
  if length is None and names:
    number = {name: i for i, name in enumerate(names)}
    for job, record in zip(jobs, records, strict=True):
      local = np.load(out / WORK / f"{job.name}.domains.npy")
      own = [number[name] for name in record["domain_names"]]
      numbers = np.array(own, np.int16)[local]
      write_array(out / f"{job.name}.domains.npy", numbers, np.int16)
  spec = description.spec
  kind = {"kind": "rows", "length": length} if length else {"kind": "documents"}
  value = {
    "format": "rebased-tokens",
    "version": 1,
    **kind,
    "dtype": spec.dtype.name,
    "vocab_size": spec.vocab_size,
    "tokenizer": {"type": spec.type, "name": spec.name, "sha256": spec.sha256},
    "eos": spec.eos,
    "text_field": description.text_field,
    "domain_field": description.domain_field,
    "domain_names": names,
    **total,
    "shards": shards,
  }
  if _held(out / DATASET) == value:
    return value
  for path in (out / WORK).glob("*.tmp-*"):
    path.unlink(missing_ok=True)
  # The shards' names must be on the disk before dataset.json vouches for them.
  sync(out)
  write_json(out / DATASET, value)
  return value


def _record(job: Job) -> dict[str, Any]:
  """Return the JSON record of a shard, or raise PrepareError."""
  record = read_record(job)
  if record is None:
    raise PrepareError(
      f"{job.record_file} is damaged: run the --shard i/n that made it again"
    )
  return record


def _held(path: Path) -> object:
  """Return the content of a JSON file; None if there is none."""
  try:
    return json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError, RecursionError):
    return None
