"""The language-model runs of `rebased train`.

Hyper-parameters are the paper's, Tables 6 to 8: rows of 4096 tokens, 1024 rows
a step, 20,000 steps, learning rate 1e-3 after 200 steps of warm-up, weight
decay 0.1, gradient norms clipped at 1. The paper leaves some open. These are
from the published code of Based, which has the same numbers otherwise: β₂ 0.95,
a cosine to a tenth, and no decay of biases, norms and embeddings.
"""

import dataclasses

from rebased_jax import (
  AttentionConfig,
  HyenaConfig,
  MixerConfig,
  ModelConfig,
  ReBasedConfig,
  presets,
)
from rebased_jax.mixer_configs import PolynomialConfig
from train.config import OptimizerConfig, RunConfig, TextData

ROWS = 1024  # of a global batch
MICRO = 8  # rows of 4096 tokens in a micro-batch
LONG = 131_072  # tokens of a row, in models without positions
_OPTIMIZER = OptimizerConfig(
  learning_rate=1e-3,
  warmup_steps=200,
  final_fraction=0.1,
  beta2=0.95,
  decay="matrices",
  clip_norm=1.0,
)


#: Other names of presets: Based and ReBased contain the convolution already.
ALIASES = {
  "lm-tiny-rebased": "lm-tiny",
  "lm-tiny-conv-rebased": "lm-tiny",
  "lm-tiny-conv-based": "lm-tiny-based",
}


def lm_tiny() -> RunConfig:
  """Return a small ReBased language model on `--data.path`, for a CPU.

  The end of the text is held out, so that a single file is enough. The
  vocabulary is the byte tokenizer's; another needs --model.vocab-size.
  """
  return _tiny(presets.hybrid(ReBasedConfig(heads=4)))


def tiny(name: str) -> RunConfig:
  """Return the run of `lm-tiny` with another of the paper's systems.

  Args:
    name: a key of `rebased_jax.presets.SYSTEMS`.
  """
  system = presets.SYSTEMS[name]
  return _tiny(
    system._replace(
      first=_with_four_heads(system.first),
      second=_with_four_heads(system.second),
    )
  )


def _with_four_heads(mixer: MixerConfig) -> MixerConfig:
  """Return the mixer with 4 heads, if it has heads, and without dropout."""
  if isinstance(mixer, AttentionConfig):
    return dataclasses.replace(mixer, heads=4, dropout=0.0)
  if isinstance(mixer, PolynomialConfig):
    return dataclasses.replace(mixer, heads=4)
  return mixer


def _tiny(system: presets.System) -> RunConfig:
  data = TextData(validation=0.05, held_out="end")
  # Attention knows no order without positions. A filter of Hyena is as long as
  # the position table. The other mixers need neither.
  placed = isinstance(system.second, AttentionConfig | HyenaConfig)
  mamba = system.block == "mamba"
  return RunConfig(
    model=ModelConfig(
      first=system.first,
      second=system.second,
      vocab_size=257,
      width=128,
      # Mamba's blocks have no MLP: 6 of them are as large as 4 of the others.
      pairs=3 if mamba else 2,
      positions=data.length if placed else None,
      mlp_width=None if mamba else 512,
      block=system.block,
    ),
    data=data,
    optimizer=dataclasses.replace(
      _OPTIMIZER, learning_rate=3e-3, warmup_steps=50
    ),
    steps=1000,
    batch=16,
    eval_every=100,
    save_every=200,
  )


def pile(
  model: ModelConfig, *, learning_rate: float = 1e-3, micro: int = MICRO
) -> RunConfig:
  """Return the paper's run of a model: bfloat16 with float32 parameters.

  Args:
    model: the model; its dtype is replaced.
    learning_rate: the highest learning rate.
    micro: rows of a micro-batch.
  """
  return RunConfig(
    model=dataclasses.replace(model, dtype="bfloat16"),
    data=TextData(length=4096),
    optimizer=dataclasses.replace(_OPTIMIZER, learning_rate=learning_rate),
    steps=20_000,
    batch=ROWS,
    accumulate=ROWS // micro,
    loss_chunks=8,
    eval_every=500,
    save_every=500,
  )


def long(run: RunConfig) -> RunConfig:
  """Return a run over rows of 131,072 tokens, without positions.

  A step has as many tokens as that of the given run.
  """
  rows = ROWS * run.data.length // LONG
  return dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, positions=None, remat="dots"),
    data=dataclasses.replace(run.data, length=LONG),
    batch=rows,
    accumulate=rows,
    loss_chunks=32,
  )


def large(model: ModelConfig) -> RunConfig:
  """Return a run of a larger model than the paper's, which recomputes layers.

  The learning rate is that of Based's larger models.
  """
  run = pile(model, learning_rate=8e-4, micro=MICRO // 2)
  return dataclasses.replace(
    run, model=dataclasses.replace(run.model, remat="dots")
  )


def make_presets() -> dict[str, RunConfig]:
  """Return every language-model preset by name."""
  runs = {"lm-tiny": lm_tiny()}
  for name in presets.SYSTEMS:
    if f"lm-tiny-{name}" not in ALIASES:
      runs[f"lm-tiny-{name}"] = tiny(name)
  for alias, name in ALIASES.items():
    runs[alias] = runs[name]
  runs["pile-127m-attention"] = pile(presets.pile_attention())
  for name in ("based", "rebased"):
    mixer = presets.VARIANTS[name]
    runs[f"pile-157m-{name}"] = pile(presets.pile(mixer))
    runs[f"pile-145m-{name}"] = pile(presets.pile_text(mixer))
    for size in ("157m", "145m"):
      runs[f"pile-{size}-{name}-long"] = long(runs[f"pile-{size}-{name}"])
  for size, width in (("360m", 1024), ("1.3b", 2048)):
    attention = presets.pile_attention(width=width)
    runs[f"pile-{size}-attention"] = large(attention)
    for name in ("based", "rebased"):
      model = presets.pile_large(presets.VARIANTS[name], width=width)
      runs[f"pile-{size}-{name}"] = large(model)
  return runs


def with_system(name: str, system: str) -> RunConfig:
  """Return a language-model preset with another of the paper's systems.

  It is the preset of that system and size, where there is one. Otherwise the
  two mixers alone are replaced. Based and ReBased keep the preset's heads and
  features.

  Args:
    name: a key of `make_presets`.
    system: a key of `rebased_jax.presets.SYSTEMS`.

  Raises:
    ValueError: the preset has MLPs, for which Mamba's block has no place.
  """
  runs = make_presets()
  if name.startswith("lm-tiny"):
    return runs[f"lm-tiny-{system}"]
  _, size, _, *long = name.split("-")
  same_size = "-".join(["pile", size, system, *long])
  if same_size in runs:
    return runs[same_size]
  if presets.SYSTEMS[system].block == "mamba":
    raise ValueError(
      f"--model.mixer {system}: expected a system with MLPs in {name}; Mamba's "
      "block has none. `lm-tiny` and the presets `mqar` take it"
    )
  run = runs[name]
  first, second = (
    _of_pile(mixer, run)
    for mixer in (presets.SYSTEMS[system].first, presets.SYSTEMS[system].second)
  )
  model = dataclasses.replace(run.model, first=first, second=second)
  return dataclasses.replace(run, model=model)


def _of_pile(mixer: MixerConfig, run: RunConfig) -> MixerConfig:
  """Return a mixer with the sizes that a `pile` preset gives it."""
  old = run.model.second
  if isinstance(mixer, AttentionConfig):
    return presets.pile_attention(width=run.model.width).second
  if isinstance(mixer, PolynomialConfig) and isinstance(old, PolynomialConfig):
    return dataclasses.replace(mixer, heads=old.heads, features=old.features)
  if isinstance(mixer, HyenaConfig) and run.model.positions is None:
    return dataclasses.replace(mixer, length=run.data.length)
  return mixer
