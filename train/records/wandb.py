"""Records for Weights & Biases, of which the trainer needs nothing else."""

from typing import Any
import uuid

from train.config import RunConfig, to_dict
from train.records.run_folder import RunFolder


def check(config: RunConfig) -> None:
  """Raises ValueError where a run asks for wandb and it is not installed."""
  if config.wandb is None:
    return
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f"wandb={config.wandb!r}: wandb is not installed; "
      "pip install 'rebased-jax[wandb]'"
    ) from error


class WandbRun:
  """One run there; a resumed run goes on with the one that it was.

  Its id is in the folder, in wandb-id.txt.
  """

  def __init__(self, config: RunConfig, folder: RunFolder):
    import wandb

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
    """One record; its numbers are kind/name."""
    named = {f"{kind}/{name}": value for name, value in values.items()}
    self._run.log(named, step=step)

  def close(self) -> None:
    self._run.finish()
