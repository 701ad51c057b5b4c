"""The end of `rebased prepare`: from the records of all shards to dataset.json.

It is written last, so that it marks a finished data set; only then do records
carry numbers of domains, since only then all their names are known.
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console

from train.atomic import WORK, sync, write_array, write_json
from train.console import say
from train.data.prepare import claim
from train.data.prepare.claim import DATASET
from train.data.prepare.shard import NO_DOMAIN, DataError, Job
from train.data.prepare.tokenizer import TokenizerSpec

_TOTALS = ("documents", "tokens", "skipped", "empty", "text_bytes")
_ROW_TOTALS = ("rows", "left_over")


@dataclasses.dataclass(frozen=True)
class Ends:
  """What dataset.json says beside its counts.

  Attributes:
    spec: the tokenizer.
    row_length: of rows; None for documents.
    text_field, domain_field: where text and domain were read.
  """

  spec: TokenizerSpec
  row_length: int | None
  text_field: str
  domain_field: str


def totals(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
  """The sums over shards of what they count."""
  names = _TOTALS + _ROW_TOTALS * ("rows" in shards[0])
  return {name: sum(shard[name] for shard in shards) for name in names}


def finish(
  plan: BinaryIO, out: Path, jobs: Sequence[Job], ends: Ends, console: Console
) -> dict[str, Any] | None:
  """Writes dataset.json where every shard is there; None where one is not.

  Raises:
    DataError: there is no document, or no row.
  """
  missing = [job.name for job in jobs if not job.record_file.exists()]
  if missing:
    say(
      console,
      f"{len(missing)} of {len(jobs)} shards are still to be made, "
      f"{missing[0]} the first: by the other --shard i/n",
    )
    return None
  with claim.finishing(plan):
    if (out / DATASET).exists():
      value = json.loads((out / DATASET).read_text())
    else:
      value = _write_dataset(out, jobs, ends)
  rows = f"{value['rows']:,} rows, " if "rows" in value else ""
  say(
    console,
    f"{out}: {value['documents']:,} documents, {value['tokens']:,} tokens, "
    f"{rows}{value['skipped']:,} skipped, {value['empty']:,} empty",
  )
  return value


def _write_dataset(
  out: Path, jobs: Sequence[Job], ends: Ends
) -> dict[str, Any]:
  records = [json.loads(job.record_file.read_text()) for job in jobs]
  shards = [record["shard"] for record in records]
  total, length = totals(shards), ends.row_length
  if not total["documents"]:
    raise DataError(f"{out}: no document was found in {len(jobs)} inputs")
  if length is not None and not total["rows"]:
    raise DataError(
      f"{out}: no row of row_length + 1 = {length + 1} tokens: the "
      f"{len(jobs)} shards have {total['tokens']:,} tokens"
    )
  names = sorted({name for shard in shards for name in shard["domains"]})
  if names == [NO_DOMAIN]:
    names = []
    shards = [dict(shard, domains={}) for shard in shards]
  if length is None and names:
    for job, record in zip(jobs, records, strict=True):
      local = np.load(out / WORK / f"{job.name}.domains.npy")
      own = [names.index(name) for name in record["domain_names"]]
      numbers = np.array(own, np.int16)[local]
      write_array(out / f"{job.name}.domains.npy", numbers, np.int16)
  spec = ends.spec
  value = dict(
    format="rebased-tokens",
    version=1,
    **(dict(kind="rows", length=length) if length else dict(kind="documents")),
    dtype=spec.dtype.name,
    vocab_size=spec.vocab_size,
    tokenizer=dict(type=spec.type, name=spec.name, sha256=spec.sha256),
    eos=spec.eos,
    text_field=ends.text_field,
    domain_field=ends.domain_field,
    domain_names=names,
    **total,
    shards=shards,
  )
  for path in (out / WORK).glob("*.tmp-*"):
    path.unlink(missing_ok=True)
  sync(out)  # the names of the shards before the name that vouches for them
  write_json(out / DATASET, value)
  return value
