"""The language-model runs of `rebased train`.

Hyper-parameters are the paper's, Tables 6 to 8: rows of 4096 tokens, 1024 rows
a step, 20,000 steps, learning rate 1e-3 after 200 steps of warm-up, weight
decay 0.1, gradient norms clipped at 1. The paper leaves some open. These are
from the published code of Based, which has the same numbers otherwise: β₂ 0.95,
a cosine to a tenth, and no decay of biases, norms and embeddings.
"""

import dataclasses

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig, presets
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


def lm_tiny() -> RunConfig:
  """Return a small ReBased language model on `--data.path`, for a CPU.

  The end of the text is held out, so that a single file is enough. The
  vocabulary is the byte tokenizer's; another needs --model.vocab-size.
  """
  return RunConfig(
    model=ModelConfig(
      first=BaseConvConfig(),
      second=ReBasedConfig(heads=4),
      vocab_size=257,
      width=128,
      pairs=2,
      mlp_width=512,
    ),
    data=TextData(validation=0.05, held_out="end"),
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
  runs = {
    "lm-tiny": lm_tiny(),
    "pile-127m-attention": pile(presets.pile_attention()),
  }
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
