"""Models of the paper (arXiv 2402.10644), by the names of its systems."""

import dataclasses

from rebased_jax.mixers import BaseConvConfig, BasedConfig, ReBasedConfig
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


def mqar(
  mixer: MixerConfig, *, width: int, length: int, vocab_size: int = 8192
) -> ModelConfig:
  """The two-layer hybrid of the MQAR experiments, Tables 1 and 4.

  Args:
    mixer: of the second layer; the first is the short convolution.
    width: D.
    length: tokens of an example, and rows of the position table.
    vocab_size: V.
  """
  return ModelConfig(
    conv=BaseConvConfig(),
    mixer=mixer,
    vocab_size=vocab_size,
    width=width,
    positions=length,
    dropout=0.1,
  )


def pile(mixer: MixerConfig) -> ModelConfig:
  """The 18-layer hybrid of Table 9, with H·F = 1024 as its counts demand."""
  return ModelConfig(
    conv=BaseConvConfig(),
    mixer=dataclasses.replace(mixer, heads=64, features=16),
    vocab_size=50304,
    width=768,
    pairs=9,
    positions=4096,
    mlp_width=4 * 768,
    dropout=0.1,
  )
