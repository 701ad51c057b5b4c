"""Define the models, lengths and optimiser of `run.py`."""

import argparse
import dataclasses
from typing import Any

from rebased_jax import ModelConfig, presets
from train.optimizer import OptimizerConfig

STEPS = 20_000  # the length of the learning-rate schedule
OPTIMIZER = OptimizerConfig(
  warmup_steps=200,
  final_fraction=0.1,
  beta2=0.95,
  decay="matrices",
  clip_norm=1.0,
)


@dataclasses.dataclass
class Case:
  """A model at a length: its programs, and its row of the result."""

  row: dict[str, Any]
  model: ModelConfig
  rows: int
  length: int
  programs: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_models() -> dict[str, tuple[ModelConfig, tuple[int, ...]]]:
  """Return (model, lengths of its rows) by the case's name."""
  mixer = presets.VARIANTS["rebased"]
  text = presets.pile_text(mixer)
  attention = presets.pile_attention()
  wide = dataclasses.replace(attention, positions=16384)
  free = dataclasses.replace(text, positions=None)
  return {
    "attention-127m": (attention, (4096,)),
    "attention-127m-long": (wide, (16384,)),
    "rebased-145m": (text, (4096,)),
    "rebased-157m": (presets.pile(mixer), (4096,)),
    "rebased-145m-long": (free, (4096, 16384, 131072)),
  }


def make_cases(args: argparse.Namespace) -> list[Case]:
  cases = []
  for name, (model, lengths) in make_models().items():
    if name not in args.cases:
      continue
    if args.lengths is not None:
      lengths = tuple(x for x in lengths if x in args.lengths)
    if args.tiny:
      model = _tiny(model)
      lengths = tuple(length // 64 for length in lengths)
    model = dataclasses.replace(
      model,
      dtype="bfloat16",
      scan_layers=True if args.scan else None,
      remat=args.remat,
    )
    for length in lengths:
      rows = max(args.tokens // length, 1)
      row = {"case": name, "length": length, "rows": rows}
      cases.append(Case(row, model, rows, length))
  return cases


def _tiny(model: ModelConfig) -> ModelConfig:
  """Return a model of two pairs, 32 wide, with a 64th of the positions."""
  mixer = dataclasses.replace(model.second, heads=4)
  first = mixer if type(model.first) is type(mixer) else model.first
  return dataclasses.replace(
    model,
    first=first,
    second=mixer,
    vocab_size=512,
    width=32,
    pairs=2,
    positions=model.positions and model.positions // 64,
    mlp_width=128,
  )
