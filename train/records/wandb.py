"""Records for Weights & Biases, the only module that knows wandb."""

from typing import Any
import uuid

from train.config import RunConfig
from train.records.run_folder import RunFolder
from train.stored_config import to_dict


def check(config: RunConfig) -> None:
  """Check that wandb is installed, if the run asks for it.

  Raises:
    ValueError: it is not.
  """
  if config.wandb is None:
    return
  try:
    import wandb  # noqa: F401  # optional
  except ImportError as error:
    raise ValueError(
      f"wandb={config.wandb!r}: wandb is not installed; "
      "pip install 'rebased-jax[wandb]'"
    ) from error


class WandbRun:
  """The run at wandb; a resumed run continues the same one there.

  Its id is in the run folder, in wandb-id.txt.

  Args:
    config: the run; `config.wandb` is the project.
    folder: the run's folder.
  """

  def __init__(self, config: RunConfig, folder: RunFolder):
    import wandb  # optional

    file = folder.path / "wandb-id.txt"
    if not file.exists():
      folder.write(file.name, uuid.uuid4().hex[:12] + "\n")
    self._run = wandb.init(
      project=config.wandb,
      id=file.read_text().strip(),
      name=folder.path.name,
      config=to_dict(config),
      resume="allow",
    )

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Write one record; wandb shows its numbers as `kind/name`."""
    named = {f"{kind}/{name}": value for name, value in values.items()}
    self._run.log(named, step=step)

  def close(self, exit_code: int) -> None:
    """End the run at wandb, which records it as failed unless the code is 0."""
    if exit_code == 0:
      self._run.finish()
    else:
      self._run.finish(exit_code=exit_code)
