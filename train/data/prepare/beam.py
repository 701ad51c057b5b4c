"""Make shards on a cluster with Apache Beam.

    Create(jobs) → Reshuffle → write_shard

The runner may retry a job as often as it likes: a shard file appears only when
it is complete, and each attempt makes the same bytes. The inputs, the tokenizer
and the output folder must have the same paths on every worker, as on a shared
file system. Only the submitting process holds the locks.
"""

from collections.abc import Sequence
import functools
import re

from train.data.prepare.shard import (
  Job,
  PlannedTokenizer,
  PrepareError,
  write_shard,
)


def run_jobs(
  jobs: Sequence[Job], planned: PlannedTokenizer, options: Sequence[str]
) -> None:
  """Make every shard.

  Args:
    jobs: the shards to make.
    planned: the tokenizer that each worker loads.
    options: Beam's pipeline options, such as "--runner=FlinkRunner".

  Raises:
    PrepareError: the text is malformed, or the pipeline failed.
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
  except (PrepareError, RuntimeError) as error:
    raise PrepareError(message(error)) from error


def message(error: Exception) -> str:
  """Return a worker's own message, without the text that runners add to it."""
  found = re.search(r"PrepareError: (.*)", str(error))
  return (found[1] if found else str(error)).partition(" [while running")[0]


def _make(job: Job, *, planned: PlannedTokenizer) -> None:
  write_shard(job, _load(planned), lambda _: None, stop=lambda: False)


# A worker makes many shards, and loads the tokenizer once.
_load = functools.cache(PlannedTokenizer.load)
