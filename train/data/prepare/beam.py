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

from train.data.prepare.planned_tokenizer import Planned
from train.data.prepare.shard import DataError, Job, write_shard


def run_jobs(
  jobs: Sequence[Job], planned: Planned, options: Sequence[str]
) -> None:
  """Makes every shard.

  Args:
    jobs: which.
    planned: the tokenizer, which each worker loads.
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
  make = functools.partial(_make, planned=planned)
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


def _make(job: Job, *, planned: Planned) -> None:
  write_shard(job, _load(planned), lambda _: None, stop=lambda: False)


_load = functools.cache(Planned.load)  # once in a worker
