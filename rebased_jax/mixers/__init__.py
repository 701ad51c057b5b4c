"""The mixers, one file each. Their configs are in `rebased_jax.mixer_configs`.

`base.py` has the interface. A new mixer is one config, one file here, one line
below, and one entry in `tests/helpers/mixer_registry.py`.
"""

from rebased_jax.mixers.attention import (
  Attention as Attention,
  AttentionConfig as AttentionConfig,
)
from rebased_jax.mixers.base import (
  Mixer as Mixer,
  MixerConfig as MixerConfig,
  MixerState as MixerState,
  Site as Site,
  take_positions as take_positions,
)
from rebased_jax.mixers.based import Based as Based, BasedConfig as BasedConfig
from rebased_jax.mixers.conv import (
  BaseConv as BaseConv,
  BaseConvConfig as BaseConvConfig,
)
from rebased_jax.mixers.hyena import Hyena as Hyena, HyenaConfig as HyenaConfig
from rebased_jax.mixers.mamba import Mamba as Mamba, MambaConfig as MambaConfig
from rebased_jax.mixers.rebased import (
  ReBased as ReBased,
  ReBasedConfig as ReBasedConfig,
)
from rebased_jax.mixers.rwkv import RWKV as RWKV, RWKVConfig as RWKVConfig
