"""Train ReBased models; the command is `rebased`.

    import train

    config = train.make_presets()["mqar"]
    outcome = train.run(config, "runs/mqar")
    model = train.load("runs/mqar")

Where `train` is a file or package of your own, take the trainer from
`rebased_jax.import_trainer()`, and models from `rebased_jax.load`.
"""

from etils import epy

# Imported when first used: jax takes seconds to load, and commands such as
# `rebased prepare` and their worker processes do not need it.
with epy.lazy_api_imports(globals()):
  from train.checkpoint.checkpoints import CheckpointError as CheckpointError
  from train.config import (
    DataConfig as DataConfig,
    MeshConfig as MeshConfig,
    MQARData as MQARData,
    MQARPaperData as MQARPaperData,
    MQARStreamData as MQARStreamData,
    OptimizerConfig as OptimizerConfig,
    ProfileConfig as ProfileConfig,
    RunConfig as RunConfig,
    TextData as TextData,
  )
  from train.data.batches import Batches as Batches
  from train.data.config import Field as Field
  from train.data.prefetch import DataTimeout as DataTimeout
  from train.loop import Outcome as Outcome
  from train.nonfinite_steps import TrainingFailed as TrainingFailed
  from train.presets import make_presets as make_presets
  from train.records.run_folder import RunFolderError as RunFolderError
  from train.start_run import run as run
  from train.stored_config import ConfigError as ConfigError
  from train.trained_model import load as load

__all__ = [
  "Batches",
  "CheckpointError",
  "ConfigError",
  "DataConfig",
  "DataTimeout",
  "Field",
  "MQARData",
  "MQARPaperData",
  "MQARStreamData",
  "MeshConfig",
  "OptimizerConfig",
  "Outcome",
  "ProfileConfig",
  "RunConfig",
  "RunFolderError",
  "TextData",
  "TrainingFailed",
  "load",
  "make_presets",
  "run",
]
