"""Find out which shards are made, and whether their files are still whole.

A shard is made if its JSON record is there and each of its files has the
SHA-256 that the record says. Any other shard is made again.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
from typing import Any

from train.data.file_hashes import file_hash
from train.data.prepare.input_files import modification_times
from train.data.prepare.output_folder import WORK
from train.data.prepare.read_lines import range_hash
from train.data.prepare.shard import Job, read_record

_SHOWN = 5  # file names that a message lists


def missing_shards(jobs: Sequence[Job], workers: int) -> list[Job]:
  """Return the jobs whose shards are not made, or are damaged.

  Args:
    jobs: the jobs to look at.
    workers: the number of shards that are read at once; 0 for one on each core.

  Raises:
    ValueError: a file of a source changed since a shard was made from it.
    OSError: a file cannot be read.
  """
  pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
  try:
    made = list(pool.map(_is_made, jobs))
  finally:
    # After an error or Ctrl-C, no further shard is read.
    pool.shutdown(cancel_futures=True)
  return [job for job, is_made in zip(jobs, made, strict=True) if not is_made]


def _is_made(job: Job) -> bool:
  """Return whether a shard is complete and undamaged.

  Raises:
    ValueError: a file of its source changed since the shard was made.
  """
  record = read_record(job)
  if record is None:
    return False
  changed = _changed_files(job, record)
  if changed:
    more = len(changed) - _SHOWN
    tail = f" and {more} more" if more > 0 else ""
    raise ValueError(
      f"{', '.join(changed[:_SHOWN])}{tail} changed since {job.name} was made "
      "from it; choose another --out"
    )
  out = Path(job.out)
  # Records of earlier versions have no hashes of the two small files.
  hashes = {
    out / f"{job.name}.arrayrecord": record["shard"]["sha256"],
    out / f"{job.name}.lengths.npy": record.get("lengths_sha256"),
    out / WORK / f"{job.name}.domains.npy": record.get("domains_sha256"),
  }
  if not all(path.is_file() for path in hashes):
    return False
  return all(
    sha256 is None or file_hash(path) == sha256
    for path, sha256 in hashes.items()
  )


def _changed_files(job: Job, record: dict[str, Any]) -> list[str]:
  """Return the names of files that changed since a shard was made from them.

  A file whose modification time differs is read again and compared by its
  SHA-256.
  """
  if modification_times(job.source) == record["times"]:
    return []
  source = job.source
  return [
    file.name
    for file, sha256 in zip(source.files, record["hashes"], strict=True)
    if sha256
    != (
      file_hash(file.path)
      if source.part is None
      else range_hash(file.path, *source.share)
    )
  ]
