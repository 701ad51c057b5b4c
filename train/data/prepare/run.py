"""`rebased prepare`: raw text to token files, one source to one shard.

    OUT/dataset.json                what is in it; written last
    OUT/tokenizer.json              a copy of the tokenizer, unless it is bytes
    OUT/shard-00000.arrayrecord     one record a document, or a row
    OUT/shard-00000.lengths.npy     int64, tokens of each record, in order
    OUT/shard-00000.domains.npy     int16, into dataset.json's domain_names;
                                    where records are documents with domains
    OUT/prepare/                    plan and records; not needed to read

Killed at any moment, the same command goes on with the shards that are
missing, and the folder ends up the same to the byte. Machines that share the
folder take `--shard i/n`; whoever is last writes dataset.json.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
from pathlib import Path
import re
import time
from typing import Any, Literal

from rich.console import Console

from train.atomic import WORK, write_bytes
from train.console import say
from train.data.checks import require
from train.data.prepare import claim, tokenizer as tokenize
from train.data.prepare.claim import DATASET
from train.data.prepare.dataset import Ends, finish, totals
from train.data.prepare.input_files import TEXT_SUFFIXES, find_sources
from train.data.prepare.planned_tokenizer import Planned
from train.data.prepare.read_documents import Fields
from train.data.prepare.shard import Job, changed_files
from train.data.prepare.tokenizer import TokenizerSpec
from train.data.prepare.worker_pool import run_jobs

_SHOWN = 5  # names of files


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """Tokenises text into a folder that training reads."""

  out: str  # the folder of the data set: new, or one to go on with
  corpus: Literal["stdlib"] | None = None  # in place of inputs
  tokenizer: str = tokenize.BYTES  # or a tokenizer.json
  eos: str = "auto"  # the token that ends a document; none for none
  text_field: str = "text"  # of a record; a dot goes into a nested one
  domain_field: str = "meta.pile_set_name"  # where a record has it
  text_suffixes: tuple[str, ...] = TEXT_SUFFIXES  # plain text in a folder
  on_error: Literal["fail", "skip"] = "fail"  # skipped ones are counted
  row_length: int | None = None  # cut to rows of so many inputs, one token more
  max_document_mb: int = 64  # a longer document is an error
  workers: int = 0  # processes; 0 is one a core
  shard: str = "0/1"  # i/n: every n-th source, from i = 0
  runner: Literal["pool", "beam"] = "pool"  # processes, or Apache Beam
  beam_options: tuple[str, ...] = ()  # Beam's own, without the dashes: runner=…

  def __post_init__(self) -> None:
    require(bool(self.out), "out", self.out, "a folder")
    require(self.workers >= 0, "workers", self.workers, "at least 0")
    require(
      self.max_document_mb >= 1, "max_document_mb", self.max_document_mb, ">= 1"
    )
    require(
      self.row_length is None or self.row_length >= 1,
      "row_length",
      self.row_length,
      "at least 1, or none",
    )
    for name in ("text_field", "domain_field"):
      value = getattr(self, name)
      require(all(value.split(".")), name, value, "a name, or names and dots")
    require(
      self.on_error in ("fail", "skip"), "on_error", self.on_error, "fail, skip"
    )
    require(
      self.runner in ("pool", "beam"), "runner", self.runner, "pool or beam"
    )
    require(
      self.runner == "beam" or not self.beam_options,
      "beam_options",
      self.beam_options,
      "none without runner='beam'",
    )
    part = self.part
    require(part[0] < part[1], "shard", self.shard, "i/n with i < n")

  @property
  def part(self) -> tuple[int, int]:
    """i and n of the shard."""
    found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
    require(bool(found), "shard", self.shard, "i/n, as 0/4")
    return int(found[1]), int(found[2])

  @property
  def fields(self) -> Fields:
    return Fields(
      self.text_field, self.domain_field, self.max_document_mb << 20
    )


def prepare(
  config: PrepareConfig, inputs: Sequence[str], console: Console
) -> dict[str, Any] | None:
  """Makes the data set, or this machine's shards of it.

  Args:
    config: how.
    inputs: files and folders; none with `config.corpus`.
    console: shows progress, with MB of the files a second and the time left.

  Returns:
    What dataset.json holds; None while other machines have shards to make.

  Raises:
    ValueError: an argument is wrong, or the folder holds another data set, or
      an input changed since its shard was made. Nothing was changed.
    DataError: the text is malformed; what was made so far stays.
    OSError: a file cannot be read or written.
  """
  out = Path(config.out)
  _not_inside(out, inputs)
  found = find_sources(inputs, config.corpus, config.text_suffixes)
  for suffix, count in found.left_out:
    say(console, f"left out: {count} files with {suffix}")
  spec = tokenize.load(config.tokenizer, config.eos).spec
  plan = claim.make_plan(found.sources, spec, config.fields, config.row_length)
  skip = config.on_error == "skip"
  jobs = [
    Job(i, source, str(out), config.fields, skip, config.row_length)
    for i, source in enumerate(found.sources)
  ]
  with claim.claimed(out, plan) as file:
    index, count = config.part
    mine = jobs[index::count]
    claim.lock(file, [job.index for job in mine])
    if not (out / DATASET).exists():
      _clean(out, {job.name for job in mine})
    todo = [job for job in mine if not _is_made(job)]
    _copy_tokenizer(out, spec, config)
    if todo:
      begin = time.perf_counter()
      _run(todo, spec, config, console)
      _report(todo, time.perf_counter() - begin, console)
    ends = Ends(spec, config.row_length, config.text_field, config.domain_field)
    return finish(file, out, jobs, ends, console)


def _run(
  jobs: Sequence[Job],
  spec: TokenizerSpec,
  config: PrepareConfig,
  console: Console,
) -> None:
  planned = Planned(config.tokenizer, config.eos, spec)
  if config.runner == "beam":
    from train.data.prepare import beam

    options = [f"--{option.lstrip('-')}" for option in config.beam_options]
    beam.run_jobs(jobs, planned, options)
  else:
    run_jobs(jobs, planned, config.workers, console)


def _not_inside(out: Path, inputs: Sequence[str]) -> None:
  for name in inputs:
    folder = Path(name)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
      raise ValueError(
        f"out={str(out)!r}: it lies in the input folder {name}: expected a "
        "folder elsewhere"
      )


def _copy_tokenizer(
  out: Path, spec: TokenizerSpec, config: PrepareConfig
) -> None:
  copy = out / "tokenizer.json"
  if spec.type == "file" and not copy.exists():
    path = tokenize.file_of(config.tokenizer)
    data = tokenize.read_tokenizer_file(path)
    if hashlib.sha256(data).hexdigest() != spec.sha256:
      raise ValueError(f"{path}: it changed while it was read")
    write_bytes(copy, data)


def _clean(out: Path, names: set[str]) -> None:
  """Removes what a killed process left of these shards."""
  for path in (out / WORK).iterdir():
    if ".tmp-" in path.name and path.name.partition(".")[0] in names:
      path.unlink(missing_ok=True)


def _is_made(job: Job) -> bool:
  out = Path(job.out)
  records = out / f"{job.name}.arrayrecord"
  others = (
    out / f"{job.name}.lengths.npy",
    out / WORK / f"{job.name}.domains.npy",
  )
  if not job.record_file.exists():
    return False
  record = json.loads(job.record_file.read_text())
  changed = changed_files(job.source, record)
  if changed:
    more = f" and {len(changed) - _SHOWN} more" * (len(changed) > _SHOWN)
    raise ValueError(
      f"{', '.join(changed[:_SHOWN])}{more} changed since {job.name} was made "
      "of it; choose another --out"
    )
  return (
    all(path.exists() for path in (records, *others))
    and records.stat().st_size == record["shard"]["bytes"]
  )


def _report(jobs: Sequence[Job], seconds: float, console: Console) -> None:
  records = [json.loads(job.record_file.read_text()) for job in jobs]
  for record in records:
    for problem in record["problems"]:
      say(console, f"skipped: {problem}")
  size = sum(job.source.bytes for job in jobs) / 1e6
  total = totals([record["shard"] for record in records])
  say(
    console,
    f"{len(jobs)} shards in {seconds:.1f} s: {size:,.1f} MB "
    f"({size / seconds:.2f} MB/s), {total['documents']:,} documents, "
    f"{total['tokens']:,} tokens ({total['tokens'] / seconds / 1e3:,.0f}k/s), "
    f"{total['skipped']:,} skipped, {total['empty']:,} empty",
  )
