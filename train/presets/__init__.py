"""The presets of `rebased train`: every named run, from both lists.

`train.presets.catalogue` describes each, without jax.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  from train.config import RunConfig


def make_presets() -> dict[str, RunConfig]:
  """Return every preset by name."""
  from train.presets import mqar, text

  return {**mqar.make_presets(), **text.make_presets()}


def with_system(name: str, system: str) -> RunConfig:
  """Return a preset with another of the paper's systems.

  Where there is a preset of that system, such as `mqar-attention` for `mqar`,
  it is that one: it may have another learning rate, too.

  Args:
    name: a key of `make_presets`.
    system: a key of `rebased_jax.presets.SYSTEMS`.

  Raises:
    ValueError: the system does not fit the preset.
  """
  from train.presets import mqar, text

  family = mqar if name in mqar.make_presets() else text
  return family.with_system(name, system)


def describe_model(config: RunConfig) -> str:
  """Return a few words for the model of a run, for titles.

  It is the name of the preset that has this model, or else the mixers.

  Args:
    config: the run.
  """
  for name, preset in make_presets().items():
    if preset.model == config.model:
      return f"the model of {name}"
  model = config.model
  names = (type(x).__name__ for x in (model.first, model.second))
  mixers = dict.fromkeys(x.removesuffix("Config") for x in names)
  return f"{' + '.join(mixers)}, {model.layers} layers of width {model.width}"
