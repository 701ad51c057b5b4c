"""Records for Weights & Biases, the only module that knows wandb."""

from typing import Any
import uuid

from train.config import RunConfig
from train.records.run_folder import RunFolder
from train.stored_config import to_dict

_STEP = "step"


class WandbError(RuntimeError):
  """The run cannot be recorded at Weights & Biases."""


def check(config: RunConfig) -> None:
  """Check that the run can be recorded at wandb, if it asks for that.

  Raises:
    ValueError: wandb is not installed, has no account of its server, cannot
      reach the server, or does not take the project's name.
  """
  if config.wandb is None:
    return
  try:
    import wandb  # optional
  except ImportError as error:
    raise ValueError(
      f"wandb={config.wandb!r}: wandb is not installed; "
      "pip install 'rebased-jax[wandb]'"
    ) from error
  try:
    wandb.Settings(project=config.wandb)
    wandb.login(verify=True)  # does nothing where WANDB_MODE is offline
  except (wandb.Error, ValueError, OSError) as error:
    raise ValueError(_refused(config, error)) from error


def _refused(config: RunConfig, error: Exception) -> str:
  reason = " ".join(str(error).split()).rstrip(".")
  return (
    f"wandb={config.wandb!r}: {reason}: expected a project of an account that "
    "`wandb login` knows; WANDB_MODE=offline keeps the records here"
  )


class WandbRun:
  """The run at wandb; a resumed run continues the same one there.

  Its id is in the run folder, in wandb-id.txt.

  Args:
    config: the run; `config.wandb` is the project.
    folder: the run's folder.

  Raises:
    WandbError: wandb refuses the run.
  """

  def __init__(self, config: RunConfig, folder: RunFolder):
    import wandb  # optional

    file = folder.path / "wandb-id.txt"
    if not file.exists():
      folder.write(file.name, uuid.uuid4().hex[:12] + "\n")
    try:
      self._run = wandb.init(
        project=config.wandb,
        id=file.read_text().strip(),
        name=folder.path.name,
        config=to_dict(config),
        resume="allow",
      )
    except wandb.Error as error:
      raise WandbError(_refused(config, error)) from error
    # wandb drops records whose own step is below one that it has seen, and a
    # run resumed from an earlier checkpoint repeats steps. So the step is a
    # value of the record, which is the x axis of the charts.
    self._run.define_metric(_STEP)
    self._run.define_metric("*", step_metric=_STEP)

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Write one record; wandb shows its numbers as `kind/name`."""
    named = {f"{kind}/{name}": value for name, value in values.items()}
    self._run.log({_STEP: step, **named})

  def close(self, exit_code: int) -> None:
    """End the run at wandb, which records it as failed unless the code is 0."""
    if exit_code == 0:
      self._run.finish()
    else:
      self._run.finish(exit_code=exit_code)
