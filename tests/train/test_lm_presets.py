"""The language-model presets: counts, the paper's numbers, one tiny run."""

import dataclasses
import functools
from pathlib import Path
import re

import pytest
from text_cases import folder as folder
from train_cases import call as call, trainer as trainer

from rebased_jax import ModelConfig, parameter_count, presets
from train import compiled_steps
from train.config import OptimizerConfig
from train.presets import text
from train.records.run_folder import RunFolder

_PRESETS = text.make_presets()
_COUNTS = {  # Table 9's three; 4096 · 768 positions fewer in long rows
  "pile-127m-attention": 126_807_552,
  "pile-157m-based": 156_955_392,
  "pile-157m-rebased": 156_992_256,
  "pile-145m-based": 145_453_824,
  "pile-145m-rebased": 145_460_736,
  "pile-157m-based-long": 156_955_392 - 4096 * 768,
  "pile-157m-rebased-long": 156_992_256 - 4096 * 768,
  "pile-145m-based-long": 145_453_824 - 4096 * 768,
  "pile-145m-rebased-long": 145_460_736 - 4096 * 768,
  "pile-360m-attention": 357_943_296,
  "pile-360m-based": 364_318_720,
  "pile-360m-rebased": 364_376_064,
  "pile-1.3b-attention": 1_319_866_368,
  "pile-1.3b-based": 1_345_200_128,
  "pile-1.3b-rebased": 1_345_314_816,
}


def test_names() -> None:
  systems = {f"lm-tiny-{name}" for name in presets.SYSTEMS}
  assert _PRESETS.keys() == {"lm-tiny", *systems, *text.ALIASES, *_COUNTS}


def test_attention_has_the_widths_of_its_presets() -> None:
  with pytest.raises(ValueError, match="width=512: expected one of"):
    presets.pile_attention(width=512)


def _count(config: ModelConfig) -> int:
  return parameter_count(compiled_steps.abstract_lm(config))


@functools.cache
def _count_from_few_pairs(config: ModelConfig) -> int:
  """Return the parameters of a model of like pairs, without tracing all."""
  one, two = (_count(dataclasses.replace(config, pairs=n)) for n in (1, 2))
  return one + (config.pairs - 1) * (two - one)


@pytest.mark.parametrize("name", _COUNTS)
def test_parameter_counts(name: str) -> None:
  assert _count_from_few_pairs(_PRESETS[name].model) == _COUNTS[name]


@pytest.mark.parametrize("name", ["pile-127m-attention", "pile-157m-rebased"])
def test_parameter_counts_of_all_pairs(name: str) -> None:
  assert _count(_PRESETS[name].model) == _COUNTS[name]


@pytest.mark.parametrize("heads", [64, 32, 16, 8])
def test_any_heads_times_features_of_1024_are_table_9s(heads: int) -> None:
  for name in ("based", "rebased"):
    config = presets.pile(presets.VARIANTS[name], heads=heads)
    assert config.second.heads * config.second.features == 1024
    assert _count_from_few_pairs(config) == _COUNTS[f"pile-157m-{name}"]


def test_heads_that_do_not_divide_1024_are_refused() -> None:
  with pytest.raises(ValueError, match="heads=12: expected a divisor of 1024"):
    presets.pile(presets.VARIANTS["based"], heads=12)


@pytest.mark.parametrize(
  "name", ["127m-attention", "157m-based", "157m-rebased"]
)
def test_the_papers_numbers(name: str) -> None:
  config = _PRESETS[f"pile-{name}"]
  assert (config.batch, config.steps, config.data.length) == (
    1024,
    20_000,
    4096,
  )
  assert config.optimizer == OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=200,
    weight_decay=0.1,
    clip_norm=1.0,
    # Not of the paper:
    final_fraction=0.1,
    beta2=0.95,
    decay="matrices",
  )
  model = config.model
  assert (model.width, model.vocab_size, model.mlp_width) == (768, 50304, 3072)
  assert (model.positions, model.dtype) == (4096, "bfloat16")
  assert model.layers == (12 if "attention" in name else 18)
  wanted = 12 if "attention" in name else 64
  assert model.second.heads == wanted


def test_larger_models_compute_layers_again() -> None:
  for name, wanted in (
    ("pile-145m-rebased", "none"),
    ("pile-145m-rebased-long", "dots"),
    ("pile-360m-attention", "dots"),
    ("pile-1.3b-rebased", "dots"),
  ):
    assert _PRESETS[name].model.remat == wanted, name


def test_long_rows_have_no_positions_and_as_many_tokens_a_step() -> None:
  for name in ("157m-based", "157m-rebased", "145m-rebased"):
    short, long = _PRESETS[f"pile-{name}"], _PRESETS[f"pile-{name}-long"]
    assert long.model.positions is None and long.data.length == 131_072
    assert short.batch * short.data.length == long.batch * long.data.length


def test_inspect_prints_the_counts(call) -> None:
  code, out, _ = call("inspect", "pile-157m-rebased", "--all")
  assert code == 0 and re.search(r"│ all +│ +│ +156,992,256 │", out)
  assert re.search(r"│ model.second.features +│ +16 │", out)


def test_a_tiny_run_of_one(call, folder: Path, tmp_path: Path) -> None:
  run_dir = tmp_path / "run"
  options = {
    "data.path": folder,
    "data.cache-dir": tmp_path / "plans",
    "data.length": 16,
    "data.validation": 0.2,
    "data.eval-rows": 20,
    "model.vocab-size": 257,
    "model.width": 16,
    "model.mlp-width": 32,
    "model.pairs": 2,
    "model.second.heads": 4,
    "model.second.features": 4,
    "steps": 4,
    "batch": 16,
    "accumulate": 2,
    "loss-chunks": 4,
    "optimizer.warmup-steps": 1,
    "log-every": 2,
    "run-dir": run_dir,
  }
  words = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
  code, out, err = call("train", "pile-157m-rebased", *words)
  assert code == 0, err
  assert "non-AR perplexity" in out
  config = RunFolder(run_dir).read_config()
  assert (config.model.dtype, config.model.positions) == ("bfloat16", 4096)
  records = RunFolder(run_dir).read_metrics()
  last = [x for x in records if x["kind"] == "eval"][-1]
  assert last["step"] == 4
  assert 1 < last["ar_perplexity"] != last["non_ar_perplexity"] < 400
  assert 0 < last["ar_share"] < 1
  trained = [x for x in records if x["kind"] == "train"][-1]
  for layer in (1, 3):
    assert f"layer{layer}/query_gamma_mean" in trained
  assert not [x for x in trained if x.startswith("layer0")]
  code, out, _ = call("evaluate", str(run_dir))
  number = re.search(r"│ held-out AR perplexity +│ +([\d.]+) │", out).group(1)
  assert code == 0 and abs(float(number) - last["ar_perplexity"]) < 0.01
  code, other, _ = call("evaluate", str(run_dir), "--recall", "unigram")
  shares = [
    float(re.search(r"AR share of targets +│ +([\d.]+) │", text).group(1))
    for text in (out, other)
  ]
  assert code == 0 and shares[1] > shares[0] + 0.1
