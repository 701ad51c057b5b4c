"""The MQAR runs of `rebased train`: small ones, and those of the paper.

mqar, mqar-SYSTEM                        small, a minute or more on a CPU
mqar-paper-SYSTEM-LENGTH                 arXiv 2402.10644, Figure 1
mqar-paper-ablation-VARIANT-LENGTH       its ablations
"""

import dataclasses

from rebased_jax import AttentionConfig, MixerConfig, ReBasedConfig, presets
from train.config import (
  MQARPaperData,
  MQARStreamData,
  OptimizerConfig,
  RunConfig,
)

#: Pairs of a row, by its length in tokens.
PAPER_LENGTHS = {128: 16, 256: 64, 512: 128, 1024: 256, 2048: 512}
ABLATION_LENGTHS = (256, 2048)
ABLATION_PAIRS = 32
ABLATION_WIDTH = 48
# Softmax attention does not learn at the learning rate of ReBased, 1e-2.
_SMALL_RATE = 3e-3
#: Other names of presets: Based and ReBased contain the convolution already.
ALIASES = {
  "mqar-rebased": "mqar",
  "mqar-conv-rebased": "mqar",
  "mqar-conv-based": "mqar-based",
}


def mqar() -> RunConfig:
  """Return ReBased on a small MQAR: over 99 % in about a minute on a CPU."""
  return _small(presets.hybrid(ReBasedConfig(heads=4)), learning_rate=1e-2)


def small(name: str) -> RunConfig:
  """Return the run of `mqar` with another of the paper's systems.

  Args:
    name: a key of `rebased_jax.presets.SYSTEMS`.
  """
  system = presets.SYSTEMS[name]
  system = system._replace(
    first=_made_small(system.first), second=_made_small(system.second)
  )
  return _small(system, learning_rate=_SMALL_RATE)


def _made_small(mixer: MixerConfig) -> MixerConfig:
  """Return the mixer with 4 heads instead of 12, and without dropout.

  Softmax attention, which has one head, keeps it.
  """
  if isinstance(mixer, AttentionConfig):
    return dataclasses.replace(mixer, dropout=0.0)
  if getattr(mixer, "heads", 1) == 1:
    return mixer
  # The field is there: the base class does not declare it.
  return dataclasses.replace(mixer, heads=4)  # pyrefly: ignore[unexpected-keyword]


def _small(system: presets.System, *, learning_rate: float) -> RunConfig:
  data = MQARStreamData()
  model = presets.mqar(
    system, width=64, length=data.length, vocab_size=data.vocab_size
  )
  return RunConfig(
    model=dataclasses.replace(model, dropout=0.0),
    data=data,
    optimizer=OptimizerConfig(
      learning_rate=learning_rate, warmup_steps=100, clip_norm=1.0
    ),
    steps=2000,
    batch=256,
    eval_every=50,
    save_every=200,
    stop_accuracy=0.99,
  )


def paper(
  system: presets.System, *, length: int, pairs: int, width: int = 64
) -> RunConfig:
  """Return a run of the paper's MQAR experiments (arXiv 2402.10644, Figure 1).

  Args:
    system: the two mixers of a pair of layers.
    length: tokens of a row.
    pairs: pairs of a key and a value in a row.
    width: the model's width.
  """
  data = MQARPaperData(length=length, pairs=pairs, drop_last=length >= 512)
  micro = 512 if length < 512 else 256 // (length // 512)
  batch = 512
  per_epoch = data.examples // batch + (not data.drop_last)
  return RunConfig(
    model=presets.mqar(system, width=width, length=length),
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


def _in_float32(run: RunConfig) -> RunConfig:
  """Return a run with products in float32 on every device, as the paper's."""
  model = dataclasses.replace(run.model, precision="highest")
  return dataclasses.replace(run, model=model)


def make_presets() -> dict[str, RunConfig]:
  """Return every MQAR preset by name."""
  runs = {"mqar": mqar()}
  for name in presets.SYSTEMS:
    if f"mqar-{name}" not in ALIASES:
      runs[f"mqar-{name}"] = small(name)
  for alias, name in ALIASES.items():
    runs[alias] = runs[name]
  for name in presets.TABLE_4:
    system = presets.SYSTEMS[name]
    for length, pairs in PAPER_LENGTHS.items():
      run = paper(system, length=length, pairs=pairs)
      runs[f"mqar-paper-{name}-{length}"] = _in_float32(run)
  for variant, mixer in presets.VARIANTS.items():
    system = presets.hybrid(mixer)
    for length in ABLATION_LENGTHS:
      run = paper(
        system, length=length, pairs=ABLATION_PAIRS, width=ABLATION_WIDTH
      )
      name = f"mqar-paper-ablation-{variant}-{length}"
      runs[name] = _in_float32(run)
  return runs


def with_system(name: str, system: str) -> RunConfig:
  """Return an MQAR preset with another of the paper's systems.

  It is the preset of that system, where there is one.

  Args:
    name: a key of `make_presets`.
    system: a key of `rebased_jax.presets.SYSTEMS`.
  """
  if not name.startswith("mqar-paper-"):
    return make_presets()[f"mqar-{system}"]
  length = int(name.rpartition("-")[2])
  ablation = name.startswith("mqar-paper-ablation-")
  run = paper(
    presets.SYSTEMS[system],
    length=length,
    pairs=ABLATION_PAIRS if ablation else PAPER_LENGTHS[length],
    width=ABLATION_WIDTH if ablation else 64,
  )
  return _in_float32(run)
