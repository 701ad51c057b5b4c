"""The shards of `rebased prepare` on a cluster, by Apache Beam.

    Create(jobs) → Reshuffle → write_shard

Each job is retried by the runner as it likes: a shard appears whole, and the
same however often it is made. Inputs, tokenizer and OUT have to be the same
paths on every worker, as on a shared file system; locks are held by the one
process that submits.
"""

from collections.abc import Sequence
import functools
import re

from train.data import tokenize
from train.data.prepare_shard import DataError, Job, write_shard
from train.data.tokenize import Tokenizer, TokenizerSpec


def run_jobs(
  jobs: Sequence[Job],
  tokenizer: str,
  eos: str,
  spec: TokenizerSpec,
  options: Sequence[str],
) -> None:
  """Makes every shard.

  Args:
    jobs: which.
    tokenizer: its name, for `tokenize.load`, which each worker calls.
    eos: as `tokenize.load` takes it.
    spec: what the tokenizer has to be.
    options: Beam's own, as "--runner=FlinkRunner".

  Raises:
    DataError: malformed text, or the pipeline failed.
    ValueError: apache-beam is not installed.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ValueError(
      "runner='beam' needs apache-beam: pip install 'rebased-jax[beam]'"
    ) from error
  make = functools.partial(_make, tokenizer=tokenizer, eos=eos, spec=spec)
  try:
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
      _ = (
        pipeline
        | beam.Create(list(jobs))
        | beam.Reshuffle()
        | "write_shard" >> beam.Map(make)
      )
  except (DataError, RuntimeError) as error:
    raise DataError(message(error)) from error


def message(error: Exception) -> str:
  """What a worker said, without what runners put around it."""
  found = re.search(r"DataError: (.*)", str(error))
  return (found[1] if found else str(error)).partition(" [while running")[0]


def _make(job: Job, *, tokenizer: str, eos: str, spec: TokenizerSpec) -> None:
  write_shard(
    job, _load(tokenizer, eos, spec), lambda _: None, stop=lambda: False
  )


@functools.cache
def _load(name: str, eos: str, spec: TokenizerSpec) -> Tokenizer:
  try:
    found = tokenize.load(name, eos)
  except ValueError as error:
    raise DataError(str(error)) from error
  if found.spec != spec:
    raise DataError(f"{name}: the tokenizer is another one on this worker")
  return found
