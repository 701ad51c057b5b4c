"""Load a trained model out of its run folder."""

from typing import Any

from etils import epath
from flax import nnx
import jax

from rebased_jax import LM, import_trainer
from train import compiled_steps
from train.checkpoint.checkpoints import restore_params
from train.config import RunConfig
from train.records.run_folder import RunFolder


def load(run_dir: epath.PathLike, step: int | None = None) -> LM:
  """Return the model of a run, with the parameters of a checkpoint.

  Args:
    run_dir: the run's folder.
    step: the checkpoint's step. None takes the newest readable checkpoint.

  Returns:
    The model, with its parameters on one device.

  Raises:
    ValueError: `run_dir` is not a run folder, or its config cannot be read.
    CheckpointError: there is no such checkpoint, it is unreadable, or it is
      of another run.
  """
  with import_trainer():  # where `train` is a user's own module
    config, _, arrays = load_params(run_dir, step)
    graph, _ = nnx.split(compiled_steps.abstract_model(config))
    return nnx.merge(graph, arrays)


def load_params(
  run_dir: epath.PathLike, step: int | None = None
) -> tuple[RunConfig, int, dict[str, Any]]:
  """Return (config, step, parameters) of a run, the arrays on one device.

  Args and Raises: see `load`.
  """
  folder = RunFolder(run_dir)
  config = folder.read_config()
  state = nnx.state(compiled_steps.abstract_model(config), nnx.Param)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state)
  )
  step, arrays = restore_params(
    folder.checkpoints, abstract, step, run=folder.run_id()
  )
  return config, step, arrays
