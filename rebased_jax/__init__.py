"""ReBased linear attention as Flax modules; knows no mesh and no run.

from rebased_jax import LM, ModelConfig, ReBasedConfig
"""

from etils import epy

# Imported when first used: the command `rebased` starts in this package, and
# verbs such as `rebased prepare` and their worker processes need no jax.
with epy.lazy_api_imports(globals()):
  from pallas_kernels import ShardAxes as ShardAxes
  from rebased_jax.generation import generate as generate
  from rebased_jax.mixers import (
    MIXER_CONFIGS as MIXER_CONFIGS,
    RWKV as RWKV,
    Attention as Attention,
    AttentionConfig as AttentionConfig,
    BaseConv as BaseConv,
    BaseConvConfig as BaseConvConfig,
    Based as Based,
    BasedConfig as BasedConfig,
    Hyena as Hyena,
    HyenaConfig as HyenaConfig,
    Mamba as Mamba,
    MambaConfig as MambaConfig,
    Mixer as Mixer,
    MixerConfig as MixerConfig,
    ReBased as ReBased,
    ReBasedConfig as ReBasedConfig,
    RWKVConfig as RWKVConfig,
  )
  from rebased_jax.model import (
    LM as LM,
    LMState as LMState,
    ModelConfig as ModelConfig,
    parameter_count as parameter_count,
  )
  from rebased_jax.trainer import (
    import_trainer as import_trainer,
    load as load,
  )
