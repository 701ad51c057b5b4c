"""ReBased linear attention as Flax modules, and the paper's other mixers.

    from flax import nnx
    from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig

    config = ModelConfig(
      first=BaseConvConfig(),
      second=ReBasedConfig(heads=4),
      vocab_size=256,
      width=64,
    )
    logits = LM(config, rngs=nnx.Rngs(0))(tokens)

The modules know no training run and no mesh. `rebased_jax.presets` has the
models of the paper, `rebased_jax.linen` the same modules for Flax Linen.
"""

from importlib import metadata

from etils import epy

# Imported when first used: the command `rebased` starts in this package, and
# verbs such as `rebased prepare` and their worker processes need no jax.
# The modules must not have the names of the functions: no generate.py.
with epy.lazy_api_imports(globals()):
  from pallas_kernels import ShardAxes
  from rebased_jax import evaluate, linen, memory, presets, pytorch
  from rebased_jax.attention_fn import polynomial_attention_fn
  from rebased_jax.decoding import LMState
  from rebased_jax.find_trainer import import_trainer
  from rebased_jax.generation import generate
  from rebased_jax.mixer_configs import (
    AttentionConfig,
    BaseConvConfig,
    BasedConfig,
    HyenaConfig,
    MambaConfig,
    MixerConfig,
    ReBasedConfig,
    RWKVConfig,
    Site,
  )
  from rebased_jax.mixers import (
    RWKV,
    Attention,
    BaseConv,
    Based,
    Hyena,
    Mamba,
    Mixer,
    ReBased,
  )
  from rebased_jax.model import LM, parameter_count
  from rebased_jax.model_config import ModelConfig
  from rebased_jax.model_files import load, save
  from rebased_jax.parameter_axes import name_parameter_axes
  from rebased_jax.tensor_files import WeightsError

__all__ = [
  "LM",
  "RWKV",
  "Attention",
  "AttentionConfig",
  "BaseConv",
  "BaseConvConfig",
  "Based",
  "BasedConfig",
  "Hyena",
  "HyenaConfig",
  "LMState",
  "Mamba",
  "MambaConfig",
  "Mixer",
  "MixerConfig",
  "ModelConfig",
  "RWKVConfig",
  "ReBased",
  "ReBasedConfig",
  "ShardAxes",
  "Site",
  "WeightsError",
  "evaluate",
  "generate",
  "import_trainer",
  "linen",
  "load",
  "memory",
  "name_parameter_axes",
  "parameter_count",
  "polynomial_attention_fn",
  "presets",
  "pytorch",
  "save",
]

try:
  __version__ = metadata.version("rebased-jax")
except metadata.PackageNotFoundError:  # the source tree, not installed
  __version__ = "0+unknown"
