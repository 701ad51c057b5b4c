"""Make one shard of a data set from one source of text.

A shard depends only on the bytes of its source, the tokenizer and the fields
that are read. Each file appears under its name when it is complete, and the
shard's JSON record appears last. A killed process therefore leaves a whole
shard, or one that is made again:

    OUT/shard-00000.arrayrecord      one record for each document, its tokens
                                     and the end of text; or for each row
    OUT/shard-00000.lengths.npy      int64, tokens of each record
    OUT/prepare/shard-00000.json     what the shard holds, and its source
    OUT/prepare/shard-00000.domains.npy   int16, domain of each document, an
                                     index into the JSON record's domain_names

With a row length L the documents of a shard are concatenated, and cut into
rows of L + 1 tokens that share a token with their neighbours:

    stream = the tokens of all documents of the shard
    row r  = stream[r L : r L + L + 1]

Training cuts a stream in the same way (`train/data/text/packing.py`).
"""

import array
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from rebased_jax.atomic import sync, temporary
from train.data.file_hashes import file_hash
from train.data.prepare import read_documents, tokenizer as tokenizer_lib
from train.data.prepare.input_files import (
  Source,
  modification_times,
  part_of,
  source_sha256,
)
from train.data.prepare.output_folder import WORK, write_array, write_json
from train.data.prepare.read_documents import Document, Fields, Problem
from train.data.prepare.tokenizer import Tokenizer, TokenizerSpec

NO_DOMAIN = "unknown"  # the domain of a document that names none
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 256
_MOST_DOMAINS = 1 << 15  # domains are stored as int16
_OWN_HASH = "record_sha256"  # the key of the record's own SHA-256
_PROBLEMS_KEPT = 20  # messages kept in the record of a shard


class PrepareError(Exception):
  """Text cannot be prepared; the message names the file and the place."""


class Stopped(Exception):
  """The shard was given up because another one failed."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A shard to make.

  Attributes:
    index: the number of the shard.
    source: the text of the shard.
    out: the folder of the data set; it has a folder `prepare`.
    fields: which fields of a record are read.
    skip: count a problem in the text and continue; otherwise it is an error.
    row_length: the inputs of a row; None to keep documents whole.
  """

  index: int
  source: Source
  out: str
  fields: Fields
  skip: bool = False
  row_length: int | None = None

  @property
  def name(self) -> str:
    """The name of the shard's files, without a suffix."""
    return f"shard-{self.index:05d}"

  @property
  def record_file(self) -> Path:
    """The path of the shard's JSON record."""
    return Path(self.out, WORK, f"{self.name}.json")


@dataclasses.dataclass(frozen=True)
class PlannedTokenizer:
  """The tokenizer that every worker has to load.

  Attributes:
    name: for `tokenizer.load`.
    eos: for `tokenizer.load`.
    spec: identifies the tokenizer that the plan names.
  """

  name: str
  eos: str
  spec: TokenizerSpec

  def load(self) -> Tokenizer:
    """Load the tokenizer on this worker.

    Raises:
      PrepareError: it does not exist here, or it is not the planned one.
    """
    try:
      found = tokenizer_lib.load(self.name, self.eos)
    except ValueError as error:
      raise PrepareError(str(error)) from error
    if found.spec != self.spec:
      raise PrepareError(
        f"{self.name}: the tokenizer changed while it was used, or this worker "
        "has another one under that name"
      )
    return found


@dataclasses.dataclass
class RowCutter:
  """Cut a stream of documents into rows of `length` + 1 tokens.

  Attributes:
    length: L, the inputs of a row, 1 or more.
    rows: how many rows were returned so far.
  """

  length: int
  rows: int = 0
  _held: np.ndarray | None = None  # tokens from the last row's end on

  def cut(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Add the tokens of one document, and yield the rows that it completes.

    Args:
      tokens: the document, (length,).

    Yields:
      Rows (L + 1,) of the document's dtype.
    """
    L = self.length
    if self._held is not None:
      tokens = np.concatenate([self._held, tokens])
    count = max(tokens.size - 1, 0) // L
    self._held = tokens[count * L :].copy()
    for row in range(count):
      yield tokens[row * L : row * L + L + 1]
    self.rows += count

  @property
  def left_over(self) -> int:
    """The tokens after the last row, which are in no row: 0 to L."""
    held = 0 if self._held is None else self._held.size
    return held - (self.rows > 0)  # the last row shares its last token


@dataclasses.dataclass
class _Counts:
  """Counts that are taken while a shard is written."""

  skipped: int = 0
  empty: int = 0
  text_bytes: int = 0
  problems: list[str] = dataclasses.field(default_factory=list)
  # Tokens of each document, and of each record written.
  lengths: array.array = dataclasses.field(
    default_factory=lambda: array.array("q")
  )
  records: array.array = dataclasses.field(
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
  """Make a shard.

  Args:
    job: the shard.
    tokenizer: turns its text into tokens.
    on_bytes: called with the number of bytes of the source that were read
      since the last call.
    stop: called before each batch of documents; true gives the shard up.

  Returns:
    The content of the shard's JSON record.

  Raises:
    PrepareError: a problem in the text, unless `job.skip`; or the source
      changed while it was read.
    Stopped: `stop()` returned true.
    OSError: a file cannot be read or written.
  """
  hashes: list[str] = []
  counts = _Counts()
  cutter = None if job.row_length is None else RowCutter(job.row_length)
  out = Path(job.out)
  before = modification_times(job.source)
  with temporary(out / WORK, f"{job.name}.arrayrecord") as records:
    try:
      with _writer(records) as write:
        found = read_documents.read(
          job.source, job.fields, on_bytes, hashes.append
        )
        for documents in _batches(_good(found, job, counts)):
          if stop():
            raise Stopped
          for tokens in _tokens(documents, tokenizer, counts, job):
            for record in [tokens] if cutter is None else cutter.cut(tokens):
              write(record.tobytes())
              counts.records.append(record.size)
    except read_documents.Changed as error:
      raise PrepareError(str(error)) from error
    if modification_times(job.source) != before:
      raise PrepareError(f"{job.source.name}: it changed while it was read")
    _check_count(records, len(counts.records))
    record = _record(job, counts, hashes, records, before)
    if cutter is not None:
      record["shard"] |= {"rows": cutter.rows, "left_over": cutter.left_over}
    sync(records)
    records.replace(out / f"{job.name}.arrayrecord")
  lengths = out / f"{job.name}.lengths.npy"
  record["lengths_sha256"] = write_array(lengths, counts.records, np.int64)
  domains = out / WORK / f"{job.name}.domains.npy"
  record["domains_sha256"] = write_array(domains, counts.domains, np.int16)
  write_json(job.record_file, record | {_OWN_HASH: _hash(record)})
  return record


def read_record(job: Job) -> dict[str, Any] | None:
  """Return the JSON record of a shard; None if there is none or it is damaged.

  Args:
    job: the shard.
  """
  try:
    record = json.loads(job.record_file.read_bytes())
    # Earlier versions wrote no hash of the record.
    hashed = _OWN_HASH in record
    own_hash = record.pop(_OWN_HASH, None)
    whole = (not hashed or own_hash == _hash(record)) and (
      isinstance(record["shard"]["sha256"], str)
      and len(record["times"]) == len(job.source.files)
      and len(record["hashes"]) == len(job.source.files)
    )
  except FileNotFoundError:
    return None
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
    return None  # it holds something else
  return record if whole else None


def _hash(record: dict[str, Any]) -> str:
  """Return the SHA-256 of a shard's JSON record, without its own hash."""
  return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _good(
  found: Iterator[Document | Problem], job: Job, counts: _Counts
) -> Iterator[Document]:
  """Yield the documents that have text; count the others and the problems."""
  for item in found:
    if isinstance(item, Document):
      if item.text:
        yield item
      else:
        counts.empty += 1
    else:
      _count_problem(item, job, counts)


def _count_problem(problem: Problem, job: Job, counts: _Counts) -> None:
  """Count a problem if the job skips them, else raise PrepareError."""
  if not job.skip:
    raise PrepareError(f"{problem}; --on-error skip counts it and continues")
  counts.skipped += problem.lost
  if len(counts.problems) < _PROBLEMS_KEPT:
    counts.problems.append(str(problem))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
  """Group documents, because a tokenizer encodes many at once faster."""
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _tokens(
  documents: list[Document], tokenizer: Tokenizer, counts: _Counts, job: Job
) -> Iterator[np.ndarray]:
  """Yield the tokens and the end of text of each document that has tokens."""
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
      raise PrepareError(
        f"{document.where}: {job.fields.domain} has more than "
        f"{_MOST_DOMAINS:,} values: expected the name of a data set"
      )
    counts.domains.append(number)
    yield np.concatenate([tokens, end])


def _encoded(
  documents: list[Document], tokenizer: Tokenizer, counts: _Counts, job: Job
) -> Iterator[tuple[Document, np.ndarray]]:
  """Yield each document with its tokens; a failing one is a problem."""
  try:
    tokens = tokenizer.encode([document.text for document in documents])
    yield from zip(documents, tokens, strict=True)
  except ValueError as error:
    # The tokenizer does not say which document failed: try them one by one.
    if len(documents) > 1:
      for document in documents:
        yield from _encoded([document], tokenizer, counts, job)
    else:
      _count_problem(Problem(documents[0].where, str(error)), job, counts)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[bytes], None]]:
  """Open an ArrayRecord file, and yield the function that adds a record."""
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = None
  try:
    path.touch()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    yield writer.write
    writer.close()
  except BaseException as error:
    # An error of `close` would only repeat the first one.
    with contextlib.suppress(RuntimeError):
      if writer is not None:
        writer.close()
    # The library raises RuntimeError for all failures, such as a full disk.
    if isinstance(error, RuntimeError):
      raise OSError(str(error)) from error
    raise


def _check_count(records: Path, expected: int) -> None:
  """Check that the file holds all records that were written.

  Raises:
    OSError: it does not, for example because the disk was full.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(records))
  found = reader.num_records()
  reader.close()
  if found != expected:
    raise OSError(
      f"{records}: it holds {found:,} records: {expected:,} were written"
    )


def _record(
  job: Job,
  counts: _Counts,
  hashes: list[str],
  records: Path,
  before: list[int],
) -> dict[str, Any]:
  """Return the shard's JSON record.

  Args:
    job: the shard.
    counts: what was counted.
    hashes: the SHA-256 of each file of the source.
    records: the finished ArrayRecord file.
    before: the modification time of each file of the source.
  """
  lengths = np.array(counts.lengths, np.int64)
  domains = np.array(counts.domains, np.int16)
  names = counts.domain_names
  documents = np.bincount(domains, minlength=len(names))
  # bincount sums in float64, which is exact below 2**53 tokens.
  tokens = np.bincount(domains, lengths, len(names))
  shard = {
    "name": f"{job.name}.arrayrecord",
    "input": {
      "name": job.source.name,
      "bytes": job.source.bytes,
      "files": len(job.source.files),
      "sha256": source_sha256(job.source, hashes),
      **part_of(job.source),
    },
    "documents": len(lengths),
    "tokens": int(lengths.sum()),
    "skipped": counts.skipped,
    "empty": counts.empty,
    "text_bytes": counts.text_bytes,
    "bytes": records.stat().st_size,
    "sha256": file_hash(records),
    "domains": {
      name: {"documents": int(documents[i]), "tokens": int(tokens[i])}
      for name, i in sorted(names.items())
    },
  }
  return {
    "shard": shard,
    "domain_names": list(names),
    "hashes": hashes,
    "problems": counts.problems,
    "times": before,
  }
