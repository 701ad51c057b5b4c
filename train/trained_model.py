"""Load a trained model out of its run folder."""

from typing import Any, get_args

from etils import epath
from flax import nnx

from rebased_jax import LM, import_trainer
from rebased_jax.model_files import Shardings, abstract_lm
from rebased_jax.which_weights import Weights
from train import best_checkpoint
from train.best_checkpoint import Step
from train.checkpoint.checkpoints import restore_params
from train.compiled_steps import from_dicts, to_dicts
from train.config import RunConfig
from train.data.checks import require
from train.records.run_folder import RunFolder


def load(
  run_dir: epath.PathLike,
  step: Step = None,
  *,
  weights: Weights = "trained",
  sharding: Shardings | None = None,
) -> LM:
  """Return the model of a run, with the parameters of a checkpoint.

  Args:
    run_dir: the run's folder.
    step: the checkpoint's step. "best" takes the best by the run's
      `keep_best`, or else by the held-out loss. None takes the newest readable
      one.
    weights: "trained", or "ema" for the average that a run with `ema` keeps.
    sharding: where the parameters go; see `rebased_jax.load`. None: to one
      device.

  Raises:
    ValueError: `run_dir` is not a run folder, its config cannot be read, its
      checkpoints are gone, or it keeps no average.
    CheckpointError: there is no such checkpoint, it is unreadable, or it is
      of another run.
  """
  with import_trainer():  # where `train` is a user's own module
    config, _, arrays = load_params(
      run_dir, step, weights=weights, sharding=sharding
    )
    graph, _ = abstract_lm(config.model)
    return nnx.merge(graph, arrays)


def part_of_state(config: RunConfig, weights: Weights) -> str:
  """Return the part of a checkpoint that has the weights.

  Args:
    config: the run.
    weights: which of its weights.

  Raises:
    ValueError: the run keeps no average.
  """
  known = get_args(Weights)
  require(weights in known, "weights", weights, f"one of {known}")
  require(
    weights == "trained" or config.ema is not None,
    "weights",
    weights,
    "'trained', because the run keeps no average: --ema trains with one",
  )
  return "params" if weights == "trained" else "ema"


def load_params(
  run_dir: epath.PathLike,
  step: Step = None,
  *,
  weights: Weights = "trained",
  sharding: Shardings | None = None,
) -> tuple[RunConfig, int, dict[str, Any]]:
  """Return (config, step, parameters) of a run.

  Args and Raises: see `load`.
  """
  folder = RunFolder(run_dir)
  config = folder.read_config()
  folder.check_checkpoints()
  _, abstract = abstract_lm(config.model, sharding)
  step, arrays = restore_params(
    folder.checkpoints,
    to_dicts(abstract),
    best_checkpoint.find(run_dir, step),
    run=folder.run_id(),
    part=part_of_state(config, weights),
  )
  return config, step, from_dicts(arrays, abstract)
