"""The arguments of `rebased train`, apart: only they need jax."""

import dataclasses
from typing import Annotated

import tyro

from train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class TrainArgs:
  """Trains the preset, with these fields changed."""

  run: Annotated[RunConfig, tyro.conf.arg(name="")]
  run_dir: str | None = None  # new, or this run's own; default runs/PRESET-TIME
  allow_data_change: bool = False  # go on with other data, batch or seed
