"""Load a trained model out of its run folder."""

from typing import Any

from etils import epath
from flax import nnx

from rebased_jax import LM, import_trainer
from rebased_jax.model_files import Shardings, abstract_lm
from train.checkpoint.checkpoints import restore_params
from train.compiled_steps import from_dicts, to_dicts
from train.config import RunConfig
from train.records.run_folder import RunFolder


def load(
  run_dir: epath.PathLike,
  step: int | None = None,
  *,
  sharding: Shardings | None = None,
) -> LM:
  """Return the model of a run, with the parameters of a checkpoint.

  Args:
    run_dir: the run's folder.
    step: the checkpoint's step. None takes the newest readable checkpoint.
    sharding: where the parameters go; see `rebased_jax.load`. None: to one
      device.

  Raises:
    ValueError: `run_dir` is not a run folder, its config cannot be read, or its
      checkpoints are gone.
    CheckpointError: there is no such checkpoint, it is unreadable, or it is
      of another run.
  """
  with import_trainer():  # where `train` is a user's own module
    config, _, arrays = load_params(run_dir, step, sharding=sharding)
    graph, _ = abstract_lm(config.model)
    return nnx.merge(graph, arrays)


def load_params(
  run_dir: epath.PathLike,
  step: int | None = None,
  *,
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
    folder.checkpoints, to_dicts(abstract), step, run=folder.run_id()
  )
  return config, step, from_dicts(arrays, abstract)
