"""One source becomes one shard: a pure function of its bytes and tokenizer.

Each file appears under its name when all of it is written, the record of the
shard last, so a shard is there as a whole or is made again:

    OUT/shard-00000.arrayrecord      one record a document, tokens and its end,
                                     or a row (`prepare_rows.py`)
    OUT/shard-00000.lengths.npy      int64, tokens of each record
    OUT/prepare/shard-00000.json     the record: what is in it, out of what
    OUT/prepare/shard-00000.domains.npy   int16, into the record's own names
"""

import array
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from train.atomic import WORK, sync, temporary, write_array, write_json
from train.data.checks import file_hash
from train.data.prepare import read_documents
from train.data.prepare.input_files import Source, source_sha256, times
from train.data.prepare.read_documents import Document, Fields, Problem
from train.data.prepare.row_cutter import RowCutter
from train.data.prepare.tokenizer import Tokenizer

NO_DOMAIN = "unknown"  # of a document that names none
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 256
_MOST_DOMAINS = 1 << 15  # int16
_PROBLEMS_KEPT = 20


class DataError(Exception):
  """The text is not what it has to be; names the file and the place."""


class Stopped(Exception):
  """Another shard failed."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A shard to make.

  Attributes:
    index: of the shard.
    source: its read_documents.
    out: the folder of the data set, which has a folder `prepare`.
    fields: what of a record is read.
    skip: whether a problem is counted and passed over, or a DataError.
    row_length: cut into rows of so many inputs; None keeps documents whole.
  """

  index: int
  source: Source
  out: str
  fields: Fields
  skip: bool = False
  row_length: int | None = None

  @property
  def name(self) -> str:
    return f"shard-{self.index:05d}"

  @property
  def record_file(self) -> Path:
    return Path(self.out, WORK, f"{self.name}.json")


@dataclasses.dataclass
class _Counts:
  skipped: int = 0
  empty: int = 0
  text_bytes: int = 0
  problems: list[str] = dataclasses.field(default_factory=list)
  lengths: array.array = dataclasses.field(  # of documents
    default_factory=lambda: array.array("q")
  )
  records: array.array = dataclasses.field(  # their lengths
    default_factory=lambda: array.array("q")
  )
  domains: array.array = dataclasses.field(
    default_factory=lambda: array.array("h")
  )
  domain_names: dict[str, int] = dataclasses.field(default_factory=dict)


def write_shard(
  job: Job,
  tokenizer: Tokenizer,
  on_bytes: Callable[[int], None],
  stop: Callable[[], bool],
) -> dict[str, Any]:
  """Makes the shard and returns its record.

  Args:
    job: which one.
    tokenizer: of its tokens.
    on_bytes: is told how many bytes of the source were read since last time.
    stop: whether to give up, asked once a batch.

  Raises:
    DataError: a problem in the text, unless `job.skip`; or a source changed.
    Stopped: `stop()`.
    OSError: a file cannot be read or written.
  """
  hashes: list[str] = []
  counts = _Counts()
  cutter = None if job.row_length is None else RowCutter(job.row_length)
  out = Path(job.out)
  before = times(job.source)
  with temporary(out / WORK, f"{job.name}.arrayrecord") as records:
    try:
      with _writer(records) as write:
        found = read_documents.read(
          job.source, job.fields, on_bytes, hashes.append
        )
        for documents in _batches(_good(found, job, counts)):
          if stop():
            raise Stopped
          for tokens in _added(documents, tokenizer, counts, job):
            for record in [tokens] if cutter is None else cutter.cut(tokens):
              write(record.tobytes())
              counts.records.append(record.size)
    except read_documents.Changed as error:
      raise DataError(str(error)) from error
    if times(job.source) != before:
      raise DataError(f"{job.source.name}: it changed while it was read")
    _check(records, len(counts.records))
    record = _record(job, counts, hashes, records, before)
    if cutter is not None:
      record["shard"] |= dict(rows=cutter.rows, left_over=cutter.left_over)
    sync(records)
    records.replace(out / f"{job.name}.arrayrecord")
  write_array(out / f"{job.name}.lengths.npy", counts.records, np.int64)
  domains = out / WORK / f"{job.name}.domains.npy"
  write_array(domains, counts.domains, np.int16)
  write_json(job.record_file, record)
  return record


def changed_files(source: Source, record: dict[str, Any]) -> list[str]:
  """The names of the files that are not what the record was made of.

  Files of another time but the same size are read again and compared.
  """
  if times(source) == record["times"]:
    return []
  return [
    file.name
    for file, sha256 in zip(source.files, record["hashes"], strict=True)
    if file_hash(file.path) != sha256
  ]


def _good(
  found: Iterator[Document | Problem], job: Job, counts: _Counts
) -> Iterator[Document]:
  for item in found:
    if isinstance(item, Document):
      if item.text:
        yield item
      else:
        counts.empty += 1
    else:
      _problem(item, job, counts)


def _problem(problem: Problem, job: Job, counts: _Counts) -> None:
  if not job.skip:
    raise DataError(f"{problem}; --on-error skip counts it and goes on")
  counts.skipped += problem.lost
  if len(counts.problems) < _PROBLEMS_KEPT:
    counts.problems.append(str(problem))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _added(
  documents: list[Document], tokenizer: Tokenizer, counts: _Counts, job: Job
) -> Iterator[np.ndarray]:
  """The tokens and the end of each document that has some; counts it."""
  spec = tokenizer.spec
  end = np.array([] if spec.eos is None else [spec.eos], spec.dtype)
  for document, tokens in _encoded(documents, tokenizer, counts, job):
    if not tokens.size:
      counts.empty += 1
      continue
    counts.lengths.append(tokens.size + end.size)
    counts.text_bytes += (
      len(document.text)
      if document.text.isascii()
      else len(document.text.encode())
    )
    name = NO_DOMAIN if document.domain is None else document.domain
    number = counts.domain_names.setdefault(name, len(counts.domain_names))
    if number == _MOST_DOMAINS:
      raise DataError(
        f"{document.where}: {job.fields.domain} has more than "
        f"{_MOST_DOMAINS:,} values: expected the name of a data set"
      )
    counts.domains.append(number)
    yield np.concatenate([tokens, end])


def _encoded(
  documents: list[Document], tokenizer: Tokenizer, counts: _Counts, job: Job
) -> Iterator[tuple[Document, np.ndarray]]:
  try:
    tokens = tokenizer.encode([document.text for document in documents])
    yield from zip(documents, tokens, strict=True)
  except ValueError as error:
    if len(documents) > 1:  # one by one, to know which
      for document in documents:
        yield from _encoded([document], tokenizer, counts, job)
    else:
      _problem(Problem(documents[0].where, str(error)), job, counts)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[bytes], None]]:
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = None
  try:
    path.touch()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    yield writer.write
    writer.close()
  except BaseException as error:
    with contextlib.suppress(RuntimeError):  # it says no more than the first
      if writer is not None:
        writer.close()
    if isinstance(error, RuntimeError):  # its only error: a full disk, say
      raise OSError(str(error)) from error
    raise


def _check(records: Path, documents: int) -> None:
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(records))
  found = reader.num_records()
  reader.close()
  if found != documents:  # a full disk, for example
    raise OSError(
      f"{records}: it holds {found:,} records: {documents:,} were written"
    )


def _record(
  job: Job,
  counts: _Counts,
  hashes: list[str],
  records: Path,
  before: list[int],
) -> dict[str, Any]:
  lengths = np.array(counts.lengths, np.int64)
  domains = np.array(counts.domains, np.int16)
  names = counts.domain_names
  documents = np.bincount(domains, minlength=len(names))
  tokens = np.bincount(domains, lengths, len(names))  # exact below 2**53
  shard = dict(
    name=f"{job.name}.arrayrecord",
    input=dict(
      name=job.source.name,
      bytes=job.source.bytes,
      files=len(job.source.files),
      sha256=source_sha256(job.source, hashes),
    ),
    documents=len(lengths),
    tokens=int(lengths.sum()),
    skipped=counts.skipped,
    empty=counts.empty,
    text_bytes=counts.text_bytes,
    bytes=records.stat().st_size,
    sha256=file_hash(records),
    domains={
      name: dict(documents=int(documents[i]), tokens=int(tokens[i]))
      for name, i in sorted(names.items())
    },
  )
  return dict(
    shard=shard,
    domain_names=list(names),
    hashes=hashes,
    problems=counts.problems,
    times=before,
  )
