"""Training runs of the ReBased models; the command is `rebased`.

model = train.load("runs/mqar")
"""

import typing

if typing.TYPE_CHECKING:
  from rebased_jax import LM


def load(run_dir: str, step: int | None = None) -> "LM":
  """The model of a run, with the weights of a checkpoint.

  Args:
    run_dir: the run's folder.
    step: of the checkpoint; None is the newest readable one.

  Raises:
    ValueError: the folder is no run's.
    CheckpointError: there is no such checkpoint, or it is unreadable.
  """
  from train import restore  # jax and orbax load only when needed

  return restore.model(run_dir, step)
