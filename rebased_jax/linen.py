"""Flax Linen: the same modules, with the same parameter names.

lm = rebased_jax.linen.lm(config)
params = lm.init(jax.random.key(0), tokens)["params"]
logits = lm.apply({"params": params}, tokens)
"""

from flax import linen, nnx

from rebased_jax.mixers import base
from rebased_jax.model import LM, ModelConfig


def lm(config: ModelConfig, *, name: str | None = None) -> linen.Module:
  """The language model as a Linen module."""
  return nnx.bridge.to_linen(LM, config, name=name)


def mixer(
  config: base.MixerConfig,
  width: int,
  *,
  dtype: str = "float32",
  name: str | None = None,
) -> linen.Module:
  """A mixer as a Linen module, to use inside your own."""
  site = base.Site(width, dtype=dtype)
  return nnx.bridge.to_linen(_make, config, site, name=name)


def _make(config: base.MixerConfig, site: base.Site, *, rngs: nnx.Rngs):
  return config.make(site, rngs=rngs)
