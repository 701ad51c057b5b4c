"""The presets of `rebased train`: every named run, from both lists.

`train.presets.catalogue` describes each, without jax.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  from train.config import RunConfig


def make_presets() -> dict[str, RunConfig]:
  """Return every preset by name."""
  from train.presets import mqar, text  # they import jax

  return {**mqar.make_presets(), **text.make_presets()}
