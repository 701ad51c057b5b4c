"""The models of the paper (arXiv 2402.10644), by the names of its systems."""

import dataclasses
from typing import Literal, NamedTuple

from rebased_jax.mixer_configs import (
  OFFICIAL_EPS,
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  MixerConfig,
  PolynomialConfig,
  ReBasedConfig,
  RWKVConfig,
)
from rebased_jax.model_config import ModelConfig

#: The kernels of Table 1, from x² to ReBased's (γ ∘ norm(x) + β)², and Based.
VARIANTS: dict[str, PolynomialConfig] = {
  "based": BasedConfig(eps=OFFICIAL_EPS),
  "x2": ReBasedConfig(
    eps=OFFICIAL_EPS, normalize=False, use_gamma=False, use_beta=False
  ),
  "norm": ReBasedConfig(eps=OFFICIAL_EPS, use_gamma=False, use_beta=False),
  "gamma": ReBasedConfig(eps=OFFICIAL_EPS, normalize=False, use_beta=False),
  "gamma-beta": ReBasedConfig(eps=OFFICIAL_EPS, normalize=False),
  "rebased": ReBasedConfig(eps=OFFICIAL_EPS),
}


class System(NamedTuple):
  """The mixers of a pair of layers, and the kind of block around them."""

  first: MixerConfig
  second: MixerConfig
  block: Literal["pre-norm", "mamba"] = "pre-norm"


def hybrid(mixer: MixerConfig) -> System:
  """Return the short convolution followed by a mixer."""
  return System(BaseConvConfig(), mixer)


def double(mixer: MixerConfig) -> System:
  """Return a system with the same mixer in both layers of a pair."""
  return System(mixer, mixer)


#: Softmax attention as published: it drops a tenth of its weights in training.
_ATTENTION = AttentionConfig(dropout=0.1)

#: The systems, by the names of Table 4 and Figure 7. There "based" and
#: "rebased" are hybrids. The last four are in no table. "double" is the word of
#: the official code.
SYSTEMS: dict[str, System] = {
  "attention": double(_ATTENTION),
  "conv-attention": hybrid(_ATTENTION),
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

#: The widths of Table 4.
WIDTHS = (64, 128, 256, 512)
#: Rows of the position table at each of these widths. Table 4 counts models of
#: different lengths.
TABLE_4: dict[str, tuple[int, ...]] = {
  "attention": (1024, 1024, 1024, 1024),
  "conv-attention": (512, 128, 128, 128),
  "rwkv": (1024, 1024, 1024, 1024),
  "conv-rwkv": (2048, 2048, 512, 512),
  "mamba": (1024, 1024, 1024, 512),
  "based": (256, 256, 256, 256),
  "rebased": (256, 256, 256, 256),
}


#: The parameters that the paper counts, in Table 4 at each of these widths and
#: in Table 9, by the names of `make_models`.
PUBLISHED_PARAMETERS: dict[str, int] = {
  f"table-4-{name}-{width}": count
  for name, counts in {
    "attention": (623_744, 1_313_024, 2_888_192, 6_824_960),
    "conv-attention": (578_752, 1_149_312, 2_462_464, 5_580_288),
    "rwkv": (623_872, 1_313_280, 2_888_704, 6_825_984),
    "conv-rwkv": (677_120, 1_395_200, 2_561_024, 5_777_408),
    "mamba": (655_360, 1_413_120, 3_235_840, 7_847_936),
    "based": (577_984, 1_179_520, 2_459_392, 5_307_904),
    "rebased": (578_752, 1_180_288, 2_460_160, 5_308_672),
  }.items()
  for width, count in zip(WIDTHS, counts, strict=True)
} | {
  "table-9-attention": 126_807_552,
  "table-9-based": 156_955_392,
  "table-9-rebased": 156_992_256,
}


def mqar(
  system: System, *, width: int, length: int, vocab_size: int = 8192
) -> ModelConfig:
  """Return the two-layer model of the MQAR experiments, Tables 1 and 4.

  Args:
    system: its mixers. Mamba's system has no dropout.
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


#: H·F of Based and ReBased in the models of Table 9. Its parameter counts allow
#: no other value, so that "12 heads" and "head dim 16" of the paper's Tables 6
#: and 8 cannot both hold. 64 heads keep the latter, and are the default.
PILE_FEATURES = 1024


def pile(mixer: PolynomialConfig, *, heads: int = 64) -> ModelConfig:
  """Return the 18-layer hybrid of Table 9.

  Args:
    mixer: Based or ReBased, the second layer of each pair.
    heads: H; F = 1024 / H. Every divisor gives the count of Table 9.

  Raises:
    ValueError: `heads` does not divide 1024.
  """
  if heads < 1 or PILE_FEATURES % heads:
    raise ValueError(f"heads={heads}: expected a divisor of {PILE_FEATURES}")
  features = PILE_FEATURES // heads
  return _pile_hybrid(mixer, heads, features, width=768, pairs=9)


def pile_text(mixer: PolynomialConfig) -> ModelConfig:
  """Return the same hybrid with the paper's text: H = 12, F = 16, 145 M."""
  return _pile_hybrid(mixer, 12, 16, width=768, pairs=9)


def pile_large(mixer: PolynomialConfig, *, width: int) -> ModelConfig:
  """Return a larger hybrid than the paper's: 28 layers, F = P = 16.

  It has 364 M parameters at width 1024 and 1.35 G at width 2048.

  Args:
    mixer: Based or ReBased, the second layer of each pair.
    width: D; H = D / 16.
  """
  return _pile_hybrid(mixer, width // 16, 16, width=width, pairs=14)


def pile_attention(*, width: int = 768) -> ModelConfig:
  """Return the softmax attention of Table 9; q, k and v have no bias.

  Args:
    width: D. 768 has 12 layers of 12 heads, as in Table 9. 1024 and 2048 have
      24 layers of 16 heads, as GPT-3's models: 358 M and 1.32 G parameters.

  Raises:
    ValueError: `width` is none of the three.
  """
  sizes = {768: (12, 6), 1024: (16, 12), 2048: (16, 12)}
  if width not in sizes:
    raise ValueError(f"width={width}: expected one of {tuple(sizes)}")
  heads, pairs = sizes[width]
  mixer = AttentionConfig(heads=heads, use_bias=False)
  return _pile(double(mixer), width=width, pairs=pairs)


def _pile_hybrid(
  mixer: PolynomialConfig, heads: int, features: int, *, width: int, pairs: int
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
  """Return the models whose parameters the paper counts.

  Their names have the table, the system and, for Table 4, the width:
  "table-4-conv-attention-64" or "table-9-rebased".
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
