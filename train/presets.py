"""The presets of `rebased train`: every named run, from both lists."""

from train import lm_presets, mqar_presets
from train.config import RunConfig


def make_presets() -> dict[str, RunConfig]:
  """Return every preset by name."""
  return {**mqar_presets.make_presets(), **lm_presets.make_presets()}
