"""A trained model, out of its run folder."""

from flax import nnx
import jax

from rebased_jax import LM
from train import build
from train.checkpoint.checkpoints import restore_params
from train.config import RunConfig
from train.records.run_folder import RunFolder


def params(
  run_dir: str, step: int | None = None
) -> tuple[RunConfig, int, dict]:
  """(config, step, parameters) of a run, on one device."""
  folder = RunFolder(run_dir)
  config = folder.read_config()
  state = nnx.state(build.abstract_model(config), nnx.Param)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state)
  )
  step, arrays = restore_params(folder.checkpoints, abstract, step)
  return config, step, arrays


def model(run_dir: str, step: int | None = None) -> LM:
  """The model with its weights; see `train.load`."""
  config, _, arrays = params(run_dir, step)
  graph, _ = nnx.split(build.abstract_model(config))
  return nnx.merge(graph, arrays)
