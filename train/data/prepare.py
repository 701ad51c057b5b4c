"""`rebased prepare`: raw text to token files, one source to one shard.

    OUT/dataset.json                what is in it; written last
    OUT/tokenizer.json              a copy of the tokenizer, unless it is bytes
    OUT/shard-00000.arrayrecord     one record a document (`prepare_shard.py`)
    OUT/shard-00000.lengths.npy     int64, tokens of each record, in order
    OUT/shard-00000.domains.npy     int16, into dataset.json's domain_names
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
from typing import Any, BinaryIO, Literal

import numpy as np
from rich.console import Console

from train.data import prepare_plan, tokenize
from train.data.atomic import WORK, sync, write_array, write_bytes, write_json
from train.data.prepare_plan import DATASET
from train.data.prepare_pool import run_jobs
from train.data.prepare_shard import NO_DOMAIN, DataError, Job, unchanged
from train.data.text import Fields
from train.data.text_sources import TEXT_SUFFIXES, find_sources
from train.data.tokenize import TokenizerSpec

_TOTALS = ("documents", "tokens", "skipped", "empty", "text_bytes")


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
  max_document_mb: int = 64  # a longer document is an error
  workers: int = 0  # processes; 0 is one a core
  shard: str = "0/1"  # i/n: every n-th source, from i = 0
  runner: Literal["pool", "beam"] = "pool"  # processes, or Apache Beam
  beam_options: tuple[str, ...] = ()  # Beam's own, without the dashes: runner=…

  def __post_init__(self) -> None:
    _require(bool(self.out), "out", self.out, "a folder")
    _require(self.workers >= 0, "workers", self.workers, "at least 0")
    _require(
      self.max_document_mb >= 1, "max_document_mb", self.max_document_mb, ">= 1"
    )
    for name in ("text_field", "domain_field"):
      value = getattr(self, name)
      _require(all(value.split(".")), name, value, "a name, or names and dots")
    _require(
      self.on_error in ("fail", "skip"), "on_error", self.on_error, "fail, skip"
    )
    _require(
      self.runner in ("pool", "beam"), "runner", self.runner, "pool or beam"
    )
    _require(
      self.runner == "beam" or not self.beam_options,
      "beam_options",
      self.beam_options,
      "none without runner='beam'",
    )
    part = self.part
    _require(part[0] < part[1], "shard", self.shard, "i/n with i < n")

  @property
  def part(self) -> tuple[int, int]:
    """i and n of the shard."""
    found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
    _require(bool(found), "shard", self.shard, "i/n, as 0/4")
    return int(found[1]), int(found[2])

  @property
  def fields(self) -> Fields:
    return Fields(
      self.text_field, self.domain_field, self.max_document_mb << 20
    )


def _require(ok: bool, field: str, value: object, expected: str) -> None:
  if not ok:
    raise ValueError(f"{field}={value!r}: expected {expected}")


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
    _say(console, f"left out: {count} files with {suffix}")
  spec = tokenize.load(config.tokenizer, config.eos).spec
  plan = prepare_plan.make_plan(found.sources, spec, config.fields)
  jobs = [
    Job(i, source, str(out), config.fields, config.on_error == "skip")
    for i, source in enumerate(found.sources)
  ]
  with prepare_plan.claimed(out, plan) as file:
    index, count = config.part
    mine = jobs[index::count]
    prepare_plan.lock(file, [job.index for job in mine])
    if not (out / DATASET).exists():
      _clean(out, {job.name for job in mine})
    todo = [job for job in mine if not _is_made(job)]
    _copy_tokenizer(out, spec, config)
    if todo:
      begin = time.perf_counter()
      _run(todo, spec, config, console)
      _report(todo, time.perf_counter() - begin, console)
    return _finish(file, out, jobs, spec, config, console)


def _run(
  jobs: Sequence[Job],
  spec: TokenizerSpec,
  config: PrepareConfig,
  console: Console,
) -> None:
  if config.runner == "beam":
    from train.data import beam

    options = [f"--{option.lstrip('-')}" for option in config.beam_options]
    beam.run_jobs(jobs, config.tokenizer, config.eos, spec, options)
  else:
    run_jobs(jobs, config.tokenizer, config.eos, spec, config.workers, console)


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
    path = Path(config.tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
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
  if not unchanged(job.source, record):
    raise ValueError(
      f"{job.source.name} changed since {job.name} was made of it: its SHA-256 "
      f"was {record['shard']['input']['sha256']}; choose another --out"
    )
  return (
    all(path.exists() for path in (records, *others))
    and records.stat().st_size == record["shard"]["bytes"]
  )


def _report(jobs: Sequence[Job], seconds: float, console: Console) -> None:
  records = [json.loads(job.record_file.read_text()) for job in jobs]
  for record in records:
    for problem in record["problems"]:
      _say(console, f"skipped: {problem}")
  size = sum(job.source.bytes for job in jobs) / 1e6
  total = _totals([record["shard"] for record in records])
  _say(
    console,
    f"{len(jobs)} shards in {seconds:.1f} s: {size:,.1f} MB "
    f"({size / seconds:.2f} MB/s), {total['documents']:,} documents, "
    f"{total['tokens']:,} tokens ({total['tokens'] / seconds / 1e3:,.0f}k/s), "
    f"{total['skipped']:,} skipped, {total['empty']:,} empty",
  )


def _totals(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
  return {name: sum(shard[name] for shard in shards) for name in _TOTALS}


def _finish(
  plan: BinaryIO,
  out: Path,
  jobs: Sequence[Job],
  spec: TokenizerSpec,
  config: PrepareConfig,
  console: Console,
) -> dict[str, Any] | None:
  missing = [job.name for job in jobs if not job.record_file.exists()]
  if missing:
    _say(
      console,
      f"{len(missing)} of {len(jobs)} shards are still to be made, "
      f"{missing[0]} the first: by the other --shard i/n",
    )
    return None
  with prepare_plan.finishing(plan):
    if (out / DATASET).exists():
      value = json.loads((out / DATASET).read_text())
    else:
      value = _write_dataset(out, jobs, spec, config)
  _say(
    console,
    f"{out}: {value['documents']:,} documents, {value['tokens']:,} tokens, "
    f"{value['skipped']:,} skipped, {value['empty']:,} empty",
  )
  return value


def _write_dataset(
  out: Path, jobs: Sequence[Job], spec: TokenizerSpec, config: PrepareConfig
) -> dict[str, Any]:
  records = [json.loads(job.record_file.read_text()) for job in jobs]
  shards = [record["shard"] for record in records]
  totals = _totals(shards)
  if not totals["documents"]:
    raise DataError(f"{out}: no document was found in {len(jobs)} inputs")
  names = sorted({name for shard in shards for name in shard["domains"]})
  if names == [NO_DOMAIN]:
    names = []
    shards = [dict(shard, domains={}) for shard in shards]
  for job, record in zip(jobs, records, strict=True):
    if names:
      local = np.load(out / WORK / f"{job.name}.domains.npy")
      own = [names.index(name) for name in record["domain_names"]]
      numbers = np.array(own, np.int16)[local]
      write_array(out / f"{job.name}.domains.npy", numbers, np.int16)
  value = dict(
    format="rebased-tokens",
    version=1,
    kind="documents",
    dtype=spec.dtype.name,
    vocab_size=spec.vocab_size,
    tokenizer=dict(type=spec.type, name=spec.name, sha256=spec.sha256),
    eos=spec.eos,
    text_field=config.text_field,
    domain_field=config.domain_field,
    domain_names=names,
    **totals,
    shards=shards,
  )
  for path in (out / WORK).glob("*.tmp-*"):
    path.unlink(missing_ok=True)
  sync(out)  # the names of the shards before the name that vouches for them
  write_json(out / DATASET, value)
  return value


def _say(console: Console, text: str) -> None:
  console.print(text, highlight=False, soft_wrap=True, markup=False)
