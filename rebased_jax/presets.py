"""Models of the paper (arXiv 2402.10644), by the names of its systems."""

import dataclasses
from typing import Literal, NamedTuple

from rebased_jax.mixers import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  ReBasedConfig,
  RWKVConfig,
)
from rebased_jax.mixers.base import MixerConfig
from rebased_jax.model import ModelConfig

EPS = 1e-12  # of the official code

# Table 1: the kernels between x² and ReBased's (γ·norm(x) + β)².
VARIANTS: dict[str, MixerConfig] = {
  "based": BasedConfig(eps=EPS),
  "x2": ReBasedConfig(
    eps=EPS, normalize=False, use_gamma=False, use_beta=False
  ),
  "norm": ReBasedConfig(eps=EPS, use_gamma=False, use_beta=False),
  "gamma": ReBasedConfig(eps=EPS, normalize=False, use_beta=False),
  "gamma-beta": ReBasedConfig(eps=EPS, normalize=False),
  "rebased": ReBasedConfig(eps=EPS),
}


class System(NamedTuple):
  """The mixers of a pair of layers, and the block around each."""

  first: MixerConfig
  second: MixerConfig
  block: Literal["pre-norm", "mamba"] = "pre-norm"


def hybrid(mixer: MixerConfig) -> System:
  """The short convolution, then the mixer."""
  return System(BaseConvConfig(), mixer)


def double(mixer: MixerConfig) -> System:
  """The mixer in both layers."""
  return System(mixer, mixer)


# By the names of Table 4 and Figure 7, where Based and ReBased are hybrids; the
# last four are in no table. "double" is the official code's word.
SYSTEMS: dict[str, System] = {
  "attention": double(AttentionConfig()),
  "conv-attention": hybrid(AttentionConfig()),
  "rwkv": double(RWKVConfig()),
  "conv-rwkv": hybrid(RWKVConfig()),
  "mamba": System(MambaConfig(), MambaConfig(), "mamba"),
  "based": hybrid(VARIANTS["based"]),
  "rebased": hybrid(VARIANTS["rebased"]),
  "double-based": double(VARIANTS["based"]),
  "double-rebased": double(VARIANTS["rebased"]),
  "hyena": double(HyenaConfig()),
  "conv-hyena": hybrid(HyenaConfig()),
}

WIDTHS = (64, 128, 256, 512)
# Rows of the position table, by width: Table 4 mixes models of several lengths.
TABLE_4: dict[str, tuple[int, ...]] = {
  "attention": (1024, 1024, 1024, 1024),
  "conv-attention": (512, 128, 128, 128),
  "rwkv": (1024, 1024, 1024, 1024),
  "conv-rwkv": (2048, 2048, 512, 512),
  "mamba": (1024, 1024, 1024, 512),
  "based": (256, 256, 256, 256),
  "rebased": (256, 256, 256, 256),
}


def mqar(
  system: System, *, width: int, length: int, vocab_size: int = 8192
) -> ModelConfig:
  """The two-layer model of the MQAR experiments, Tables 1 and 4.

  Args:
    system: its mixers. Mamba's blocks come without dropout.
    width: D.
    length: tokens of an example, and rows of the position table.
    vocab_size: V.
  """
  return ModelConfig(
    conv=system.first,
    mixer=system.second,
    vocab_size=vocab_size,
    width=width,
    positions=length,
    dropout=0.0 if system.block == "mamba" else 0.1,
    block=system.block,
  )


def pile(mixer: MixerConfig) -> ModelConfig:
  """The 18-layer hybrid of Table 9, with H·F = 1024 as its counts demand."""
  mixer = dataclasses.replace(mixer, heads=64, features=16)
  return _pile(hybrid(mixer), pairs=9)


def pile_attention() -> ModelConfig:
  """The 12-layer softmax attention of Table 9: 12 heads, q, k, v no bias."""
  return _pile(double(AttentionConfig(heads=12, use_bias=False)), pairs=6)


def _pile(system: System, pairs: int) -> ModelConfig:
  return ModelConfig(
    conv=system.first,
    mixer=system.second,
    vocab_size=50304,
    width=768,
    pairs=pairs,
    positions=4096,
    mlp_width=4 * 768,
    dropout=0.1,
  )


def make_models() -> dict[str, ModelConfig]:
  """The models whose parameters the paper counts, by table, system and width.

  As in "table-4-conv-attention-64" and "table-9-rebased".
  """
  models = {
    f"table-4-{name}-{width}": mqar(SYSTEMS[name], width=width, length=rows)
    for name, lengths in TABLE_4.items()
    for width, rows in zip(WIDTHS, lengths, strict=True)
  }
  models["table-9-attention"] = pile_attention()
  for name in ("based", "rebased"):
    models[f"table-9-{name}"] = pile(VARIANTS[name])
  return models
