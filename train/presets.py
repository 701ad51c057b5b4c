"""The named runs of `rebased train`."""

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig, presets
from train.config import (
  MQARPaperData,
  MQARStreamData,
  OptimizerConfig,
  RunConfig,
  TextData,
)

PAPER_LENGTHS = {128: 16, 256: 64, 512: 128, 1024: 256, 2048: 512}  # T: pairs
ABLATION_LENGTHS = (256, 2048)


def mqar() -> RunConfig:
  """ReBased on a small MQAR, to over 99 % on a CPU in about a minute."""
  data = MQARStreamData()
  return RunConfig(
    model=ModelConfig(
      conv=BaseConvConfig(),
      mixer=ReBasedConfig(heads=4),
      vocab_size=data.vocab_size,
      width=64,
      positions=data.length,
    ),
    data=data,
    optimizer=OptimizerConfig(
      learning_rate=1e-2, warmup_steps=100, clip_norm=1.0
    ),
    steps=2000,
    batch=256,
    eval_every=50,
    save_every=200,
    stop_accuracy=0.99,
  )


def lm_tiny() -> RunConfig:
  """A small ReBased language model on `--data.path`, for a CPU.

  The vocabulary is the byte tokenizer's; another needs --model.vocab-size.
  """
  return RunConfig(
    model=ModelConfig(
      conv=BaseConvConfig(),
      mixer=ReBasedConfig(heads=4),
      vocab_size=257,
      width=128,
      pairs=2,
      mlp_width=512,
    ),
    data=TextData(),
    optimizer=OptimizerConfig(
      learning_rate=3e-3,
      warmup_steps=50,
      final_fraction=0.1,
      beta2=0.95,
      decay="matrices",
      clip_norm=1.0,
    ),
    steps=1000,
    batch=16,
    eval_every=100,
    save_every=200,
  )


def paper(
  variant: str, *, length: int, pairs: int, width: int = 64
) -> RunConfig:
  """A run of the paper's MQAR experiments (arXiv 2402.10644, Figure 1)."""
  data = MQARPaperData(length=length, pairs=pairs, drop_last=length >= 512)
  micro = 512 if length < 512 else 256 // (length // 512)
  batch = 512
  per_epoch = data.examples // batch + (not data.drop_last)
  mixer = presets.VARIANTS[variant]
  return RunConfig(
    model=presets.mqar(mixer, width=width, length=length),
    data=data,
    optimizer=OptimizerConfig(learning_rate=1e-3, epoch_steps=per_epoch),
    steps=data.epochs * per_epoch,
    batch=batch,
    accumulate=batch // micro,
    seed=42,
    eval_every=per_epoch,
    save_every=per_epoch,
    log_every=20,
    stop_accuracy=0.99,
  )


def make_presets() -> dict[str, RunConfig]:
  """Every preset, by name."""
  runs = {"mqar": mqar(), "lm-tiny": lm_tiny()}
  for system in ("rebased", "based"):
    for length, pairs in PAPER_LENGTHS.items():
      name = f"mqar-paper-{system}-{length}"
      runs[name] = paper(system, length=length, pairs=pairs)
  for variant in presets.VARIANTS:
    for length in ABLATION_LENGTHS:
      name = f"mqar-paper-ablation-{variant}-{length}"
      runs[name] = paper(variant, length=length, pairs=32, width=48)
  return runs
