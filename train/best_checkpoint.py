"""The best checkpoint of a run, by a held-out metric.

A checkpoint counts if its held-out metrics were measured at its step.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal

from etils import epath

from rebased_jax.model_files import is_exported
from train import metrics
from train.checkpoint.checkpoints import (
  CheckpointError,
  best_of,
  read_meta,
  saved_steps,
)
from train.config import RunConfig
from train.records.run_folder import RunFolder

#: The step of a checkpoint; None is the newest.
Step = int | Literal["best"] | None
#: What ranks the checkpoints of a run that does not say it.
DEFAULT = "loss"


def check(config: RunConfig) -> None:
  """Check that a run's `keep_best` is a metric that ranks checkpoints.

  Raises:
    ValueError: it is none.
  """
  known = metrics.ranking(
    text=config.data.perplexity,
    recall=config.data.recall is not None,
    averaged=config.ema is not None,
  )
  if config.keep_best not in (None, *known):
    raise ValueError(
      f"keep_best={config.keep_best!r}: expected a held-out metric of this run "
      f"that ranks checkpoints: {', '.join(known)}"
    )


def score_of(
  config: RunConfig,
) -> Callable[[int, Mapping[str, Any]], float | None] | None:
  """Return `score_by` of the run's `keep_best`; None if it has none."""
  return None if config.keep_best is None else score_by(config.keep_best)


def score_by(name: str) -> Callable[[int, Mapping[str, Any]], float | None]:
  """Return a function that scores a checkpoint by a held-out metric.

  Args:
    name: the metric.

  Returns:
    A function of the step and the `meta` of a checkpoint. The best has the
    lowest score. None: the checkpoint has no such metric of its step.
  """
  sign = -1 if metrics.better(name) == "higher" else 1

  def score(step: int, meta: Mapping[str, Any]) -> float | None:
    value = meta.get("held_out", {}).get(name)
    if value is None or math.isnan(value) or not _is_of_its_step(step, meta):
      return None
    return sign * value

  return score


def _is_of_its_step(step: int, meta: Mapping[str, Any]) -> bool:
  """Whether the held-out metrics of a checkpoint were measured at its step."""
  if "held_out_step" in meta:
    return meta["held_out_step"] == step
  # Of a run before that was noted.
  config = meta["config"]
  due = step % config["eval_every"] == 0 or step == config["steps"]
  return due and not meta.get("evaluation_due", False)


def find(run_dir: epath.PathLike, step: Step) -> int | None:
  """Return the step of a checkpoint, or None for the newest.

  Args:
    run_dir: the run's folder.
    step: the step, None, or "best": the best by the run's `keep_best`, or by
      the held-out loss if it has none.

  Raises:
    ValueError: `run_dir` is no run, or no checkpoint has such a metric.
    CheckpointError: the checkpoints cannot be listed.
  """
  if step != "best":
    return step
  if is_exported(run_dir):
    raise ValueError(
      f"step='best': {run_dir} is an exported model, which has no steps: "
      "expected no --step, or the folder of a run"
    )
  folder = RunFolder(run_dir)
  name = folder.read_config().keep_best or DEFAULT
  folder.check_checkpoints()
  best = best_of(read_scores(folder, name))
  if best is None:
    raise ValueError(
      f"step='best': no checkpoint of {run_dir} has a held-out {name} that was "
      "measured at its step: expected the number of a step; `rebased "
      "checkpoints` lists them"
    )
  return best


def read_scores(folder: RunFolder, name: str) -> dict[int, float | None]:
  """Return the score of every checkpoint by its step.

  Args:
    folder: the run's folder.
    name: the metric. A checkpoint that cannot be read has no score.
  """
  score, run = score_by(name), folder.run_id()
  found = {}
  for step in saved_steps(folder.checkpoints):
    try:
      found[step] = score(step, read_meta(folder.checkpoints, step, run=run)[1])
    except CheckpointError:
      found[step] = None
  return found
