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
    first=system.first,
    second=system.second,
    vocab_size=vocab_size,
    width=width,
    positions=length,
    dropout=0.0 if system.block == "mamba" else 0.1,
    block=system.block,
  )


# H·F of Based and ReBased in Table 9's models. Its counts allow no other, so
# the "12 heads" and "head dim 16" of the paper's Tables 6 and 8 cannot both
# hold: 64 heads keep the latter and are the default.
PILE_FEATURES = 1024


def pile(mixer: MixerConfig, *, heads: int = 64) -> ModelConfig:
  """The 18-layer hybrid of Table 9.

  Args:
    mixer: of the even layers, Based or ReBased.
    heads: H, with F = 1024 / H: any gives Table 9's count.

  Raises:
    ValueError: the heads do not divide 1024.
  """
  if heads < 1 or PILE_FEATURES % heads:
    raise ValueError(f"heads={heads}: expected a divisor of {PILE_FEATURES}")
  features = PILE_FEATURES // heads
  return _pile_hybrid(mixer, heads, features, width=768, pairs=9)


def pile_text(mixer: MixerConfig) -> ModelConfig:
  """The same with H = 12 and F = 16, as the paper's text has it: 145 M."""
  return _pile_hybrid(mixer, 12, 16, width=768, pairs=9)


def pile_large(mixer: MixerConfig, *, width: int) -> ModelConfig:
  """A hybrid beyond the paper: 28 layers, F = P = 16, and so H = width / 16.

  364 M parameters at width 1024, 1.35 G at 2048.
  """
  return _pile_hybrid(mixer, width // 16, 16, width=width, pairs=14)


def pile_attention(*, width: int = 768) -> ModelConfig:
  """Table 9's softmax attention, 12 layers of 12 heads; q, k, v have no bias.

  At widths 1024 and 2048 it has the 24 layers of 16 heads of GPT-3's models,
  358 M and 1.32 G. Raises ValueError at any other.
  """
  sizes = {768: (12, 6), 1024: (16, 12), 2048: (16, 12)}
  if width not in sizes:
    raise ValueError(f"width={width}: expected one of {tuple(sizes)}")
  heads, pairs = sizes[width]
  mixer = AttentionConfig(heads=heads, use_bias=False)
  return _pile(double(mixer), width=width, pairs=pairs)


def _pile_hybrid(
  mixer: MixerConfig, heads: int, features: int, *, width: int, pairs: int
) -> ModelConfig:
  mixer = dataclasses.replace(mixer, heads=heads, features=features)
  return _pile(hybrid(mixer), width=width, pairs=pairs)


def _pile(system: System, *, width: int, pairs: int) -> ModelConfig:
  return ModelConfig(
    first=system.first,
    second=system.second,
    vocab_size=50304,
    width=width,
    pairs=pairs,
    positions=4096,
    mlp_width=4 * width,
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
