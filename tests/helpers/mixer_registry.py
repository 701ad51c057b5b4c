"""The one list of the mixers under test.

A new mixer is one `Entry` of `MIXERS`: its config at small sizes and its
equations as a slow NumPy recurrence. Every test of all mixers runs over it.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import mixer_equations
import numpy as np

from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  HyenaConfig,
  MambaConfig,
  Mixer,
  MixerConfig,
  ReBasedConfig,
  RWKVConfig,
  presets,
)

# The tests' rows: D = 8 channels, 12 tokens.
WIDTH, LENGTH = 8, 12

Recurrence = Callable[[Any, dict[str, np.ndarray], np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A mixer under test."""

  #: Its config at small sizes, no two of them alike.
  config: MixerConfig
  #: Its equations: maps (config, parameters by path, x_TD) to y_TD.
  recurrence: Recurrence
  #: Whether its output depends on earlier tokens.
  has_memory: bool = True
  #: How much y_t may seem to depend on later tokens, relative to the largest
  #: gradient. Fourier transforms spread their roundings over the whole row.
  noise: float = 0.0
  #: Path of a parameter → a mask of its entries that do not change the output.
  without_gradient: dict[str, np.ndarray] = dataclasses.field(
    default_factory=dict
  )

  @property
  def mixer_class(self) -> type[Mixer]:
    """The class that the config makes."""
    (found,) = [
      cls for cls in _subclasses(Mixer) if cls.config_type is type(self.config)
    ]
    return found

  @property
  def takes_documents(self) -> bool:
    """Whether it takes segment ids."""
    return self.mixer_class.no_segment_ids is None

  @property
  def splits_time(self) -> bool:
    """Whether it runs with time split over devices."""
    return self.mixer_class.no_time_axis is None


def _subclasses(cls: type) -> set[type]:
  direct = set(cls.__subclasses__())
  return direct.union(*(_subclasses(x) for x in direct))


# With an eps this large it counts in every equation, and a first token whose
# q·k is near 0 is well-conditioned: a state knows (q·k)² to 1e-7 of |q|²|k|².
_SIZES = dict(heads=2, features=4, value_features=3, eps=0.1)


def _variant(name: str) -> MixerConfig:
  return dataclasses.replace(presets.VARIANTS[name], **_SIZES)


MIXERS: dict[str, Entry] = {
  "rebased": Entry(_variant("rebased"), mixer_equations.rebased),
  "based": Entry(_variant("based"), mixer_equations.based),
  "conv": Entry(BaseConvConfig(), mixer_equations.short_convolution),
  # As published, WKV is rounded to bfloat16: test_rwkv.py has that.
  "rwkv": Entry(RWKVConfig(wkv_dtype="float32"), mixer_equations.time_mix),
  "mamba": Entry(MambaConfig(state=5, taps=3), mixer_equations.mamba),
  "attention": Entry(
    AttentionConfig(heads=2, length=14),
    mixer_equations.softmax_attention,
    # A bias of the keys, the second third, adds the same to all of a query's
    # scores, which softmax ignores.
    without_gradient={"qkv/bias": np.arange(3 * WIDTH) // WIDTH == 1},
  ),
  "hyena": Entry(
    # As long as the rows: a longer filter's last lags have no gradient.
    HyenaConfig(length=LENGTH, filter_width=4),
    mixer_equations.hyena,
    noise=1e-5,
  ),
  # Other configs of the same classes.
  "x2": Entry(_variant("x2"), mixer_equations.rebased),
  "norm": Entry(_variant("norm"), mixer_equations.rebased),
  "gamma": Entry(_variant("gamma"), mixer_equations.rebased),
  "gamma-beta": Entry(_variant("gamma-beta"), mixer_equations.rebased),
  "rebased-head": Entry(
    ReBasedConfig(norm_scope="head", **_SIZES), mixer_equations.rebased
  ),
  "conv-1": Entry(
    BaseConvConfig(taps=1), mixer_equations.short_convolution, has_memory=False
  ),
  "attention-rotary": Entry(
    AttentionConfig(heads=2, rotary=True, use_bias=False, length=14),
    mixer_equations.softmax_attention,
  ),
}


def _one_of_each_class() -> list[str]:
  first: dict[type[MixerConfig], str] = {}
  for name, entry in MIXERS.items():
    first.setdefault(type(entry.config), name)
  return list(first.values())


#: The first entry of each class of mixers.
ONE_OF_EACH = _one_of_each_class()
