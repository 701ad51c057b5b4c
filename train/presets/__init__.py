"""The presets of `rebased train`: every named run, from both lists."""

from train.config import RunConfig
from train.presets import mqar, text


def make_presets() -> dict[str, RunConfig]:
  """Return every preset by name."""
  return {**mqar.make_presets(), **text.make_presets()}
