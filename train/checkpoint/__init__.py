"""Save and restore checkpoints, and verify what was read."""

from train.checkpoint.checkpoints import (
  FORMAT_VERSION as FORMAT_VERSION,
  Broken as Broken,
  CheckpointError as CheckpointError,
  Checkpoints as Checkpoints,
  NoCheckpointError as NoCheckpointError,
  Restored as Restored,
  read_meta as read_meta,
  restore_params as restore_params,
)

__all__ = [
  "FORMAT_VERSION",
  "Broken",
  "CheckpointError",
  "Checkpoints",
  "NoCheckpointError",
  "Restored",
  "read_meta",
  "restore_params",
]
