"""Make a data set of tokens from text: one shard for each source.

    OUT/dataset.json                what the data set holds; written last
    OUT/tokenizer.json              a copy of the tokenizer, unless it is bytes
    OUT/shard-00000.arrayrecord     one record for each document, or each row
    OUT/shard-00000.lengths.npy     int64, tokens of each record, in order
    OUT/shard-00000.domains.npy     int16, domain of each record, an index into
                                    dataset.json's domain_names; only where
                                    records are documents that name a domain
    OUT/prepare/                    the plan and the shards' JSON records;
                                    training does not read them

A run that was killed at any moment continues with the missing shards when the
same command is repeated. The folder ends up byte for byte as if nothing had
happened. Machines that share the folder each take `--shard i/n`; the last one
to finish writes dataset.json.
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

from rebased_jax.config_checks import is_positive_integer
from rebased_jax.field_types import fits
from train.console import say
from train.data.checks import check_local, require
from train.data.file_hashes import file_hash
from train.data.prepare import tokenizer as tokenizer_lib
from train.data.prepare.dataset_json import Description, finish, totals
from train.data.prepare.input_files import TEXT_SUFFIXES, find_sources
from train.data.prepare.made_shards import missing_shards
from train.data.prepare.output_folder import DATASET, WORK, write_bytes
from train.data.prepare.plan_and_locks import claimed, lock, make_plan
from train.data.prepare.read_documents import Fields
from train.data.prepare.shard import Job, PlannedTokenizer
from train.data.prepare.tokenizer import TokenizerSpec
from train.data.prepare.worker_pool import run_jobs


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """How text is turned into a data set of tokens."""

  #: The folder of the data set: a new one, or one to continue.
  out: str
  #: Prepare a corpus that is on this machine instead of inputs: "stdlib" is
  #: the source code of Python's standard library.
  corpus: Literal["stdlib"] | None = None
  #: "bytes", a tokenizer.json, or a folder that holds one.
  tokenizer: str = tokenizer_lib.BYTES
  #: The token that ends a document, by its text. "auto" finds it under its
  #: usual names; "none" marks no end.
  eos: str = "auto"
  #: The field of a record that holds the text. A dot enters a nested record.
  text_field: str = "text"
  #: The field of a record that names its domain. Records may lack it.
  domain_field: str = "meta.pile_set_name"
  #: The suffixes of plain text files in a folder.
  text_suffixes: tuple[str, ...] = TEXT_SUFFIXES
  #: What to do with malformed text: "fail" stops with an error, "skip" counts
  #: it and continues.
  on_error: Literal["fail", "skip"] = "fail"
  #: Concatenate the documents and cut them into rows of this many inputs, plus
  #: one token. None keeps documents whole.
  row_length: int | None = None
  #: The longest document in MiB. A longer one is malformed.
  max_document_mb: int = 64
  #: Split files of records with more text than this in MiB, one shard for each
  #: part. A compressed file is taken to expand to 4 times its size.
  part_mb: int = 1024
  #: The number of worker processes; 0 for one on each core.
  workers: int = 0
  #: Seconds in which no worker reads or finishes anything, after which the
  #: command fails. None: never.
  timeout: float | None = 1800.0
  #: The part of the shards to make here, "i/n": every n-th, starting at i.
  shard: str = "0/1"
  #: What runs the workers: "pool" for processes of this machine, "beam" for
  #: Apache Beam.
  runner: Literal["pool", "beam"] = "pool"
  #: Options for Beam without their dashes, such as runner=FlinkRunner.
  beam_options: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    require(bool(self.out), "out", self.out, "a folder")
    check_local("out", self.out)
    check_local("tokenizer", self.tokenizer)
    for name in ("part_mb", "max_document_mb", "row_length"):
      value = getattr(self, name)
      unset = name == "row_length" and value is None
      some = unset or is_positive_integer(value)
      require(some, name, value, "an integer ≥ 1")
    some = fits(self.workers, int) and self.workers >= 0
    require(some, "workers", self.workers, "an integer ≥ 0")
    some = self.timeout is None or self.timeout > 0
    expected = "None or a number of seconds above 0"
    require(some, "timeout", self.timeout, expected)
    for name in ("text_field", "domain_field"):
      value = getattr(self, name)
      require(all(value.split(".")), name, value, "names joined by dots")
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
    index, count = self.part
    require(index < count, "shard", self.shard, "i/n with i < n")

  @property
  def part(self) -> tuple[int, int]:
    """The numbers i and n of `shard`."""
    found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
    if found is None:
      raise ValueError(f"shard={self.shard!r}: expected i/n, such as 0/4")
    return int(found[1]), int(found[2])

  @property
  def fields(self) -> Fields:
    """Which fields of a record are read."""
    return Fields(
      self.text_field, self.domain_field, self.max_document_mb << 20
    )


def prepare(
  config: PrepareConfig, inputs: Sequence[str], console: Console
) -> dict[str, Any] | None:
  """Make a data set, or the shards of it that this machine has to make.

  Args:
    config: how.
    inputs: files and folders of text; none with `config.corpus`.
    console: shows the progress, in MB of the input files a second, and the
      time left.

  Returns:
    The content of dataset.json; None if other machines still make shards.

  Raises:
    ValueError: an argument is wrong, or the folder holds another data set, or
      an input changed since its shard was made. Nothing was changed.
    PrepareError: the text is malformed; finished shards stay.
    OSError: a file cannot be read or written.
  """
  out = Path(config.out)
  _check_outside(out, inputs)
  found = find_sources(
    inputs, config.corpus, config.text_suffixes, config.part_mb << 20
  )
  for suffix, count in found.left_out:
    say(console, f"left out: {count} files with {suffix}")
  spec = tokenizer_lib.load(config.tokenizer, config.eos).spec
  plan = make_plan(found.sources, spec, config.fields, config.row_length)
  skip = config.on_error == "skip"
  jobs = [
    Job(i, source, str(out), config.fields, skip, config.row_length)
    for i, source in enumerate(found.sources)
  ]
  with claimed(out, plan) as plan_file:
    index, count = config.part
    mine = jobs[index::count]
    lock(plan_file, [job.index for job in mine])
    if not (out / DATASET).exists():
      _remove_temporary(out, {job.name for job in mine})
    todo = missing_shards(mine, config.workers)
    for job in todo:
      if job.record_file.exists():
        say(console, f"{job.name} is damaged and is made again")
    _copy_tokenizer(out, spec, config)
    if todo:
      begin = time.perf_counter()
      _run(todo, spec, config, console)
      _report(todo, time.perf_counter() - begin, console)
    description = Description(
      spec, config.row_length, config.text_field, config.domain_field
    )
    return finish(plan_file, out, jobs, description, console)


def _run(
  jobs: Sequence[Job],
  spec: TokenizerSpec,
  config: PrepareConfig,
  console: Console,
) -> None:
  """Make shards with the configured runner."""
  planned = PlannedTokenizer(config.tokenizer, config.eos, spec)
  if config.runner == "beam":
    from train.data.prepare import beam

    options = [f"--{option.lstrip('-')}" for option in config.beam_options]
    beam.run_jobs(jobs, planned, options)
  else:
    run_jobs(jobs, planned, config.workers, console, config.timeout)


def _check_outside(out: Path, inputs: Sequence[str]) -> None:
  """Raise ValueError if the output folder lies inside an input folder."""
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
  """Copy the tokenizer.json into the data set, unless it is there, whole."""
  copy = out / "tokenizer.json"
  if spec.type == "file" and not (
    copy.exists() and file_hash(copy) == spec.sha256
  ):
    path = tokenizer_lib.file_of(config.tokenizer)
    data = tokenizer_lib.read_tokenizer_file(path)
    if hashlib.sha256(data).hexdigest() != spec.sha256:
      raise ValueError(f"{path}: it changed while it was read")
    write_bytes(copy, data)


def _remove_temporary(out: Path, names: set[str]) -> None:
  """Remove the temporary files that a killed process left of these shards."""
  for path in (out / WORK).iterdir():
    if ".tmp-" in path.name and path.name.partition(".")[0] in names:
      path.unlink(missing_ok=True)


def _report(jobs: Sequence[Job], seconds: float, console: Console) -> None:
  """Print the problems that were skipped, and what was made how fast."""
  records = [json.loads(job.record_file.read_text()) for job in jobs]
  for record in records:
    for problem in record["problems"]:
      say(console, f"skipped: {problem}")
  size = sum(job.source.bytes for job in jobs) / 1e6
  total = totals([record["shard"] for record in records])
  say(
    console,
    f"{len(jobs)} {'shard' if len(jobs) == 1 else 'shards'} "
    f"in {seconds:.1f} s: {size:,.2f} MB "
    f"({size / seconds:.2f} MB/s), {total['documents']:,} documents, "
    f"{total['tokens']:,} tokens ({total['tokens'] / seconds / 1e3:,.0f}k/s), "
    f"{total['skipped']:,} skipped, {total['empty']:,} empty",
  )
