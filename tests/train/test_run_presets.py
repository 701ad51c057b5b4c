"""Presets: the paper's numbers, their models, and their JSON."""

import dataclasses
import json

from flax import nnx
import jax
import pytest
from train_cases import tiny

from rebased_jax import AttentionConfig, BaseConvConfig, presets
from train import compiled_steps, stored_config
from train.config import MQARPaperData, OptimizerConfig
from train.presets import make_presets, text

_PRESETS = make_presets()
_PAIRS = {128: 16, 256: 64, 512: 128, 1024: 256, 2048: 512}
_ACCUMULATE = {128: 1, 256: 1, 512: 2, 1024: 4, 2048: 8}
_SMALL = (  # other than `mqar`, which is ReBased
  "attention",
  "conv-attention",
  "rwkv",
  "conv-rwkv",
  "mamba",
  "based",
  "double-based",
  "double-rebased",
  "hyena",
  "conv-hyena",
)
_ALIASES = {
  "mqar-rebased": "mqar",
  "mqar-conv-rebased": "mqar",
  "mqar-conv-based": "mqar-based",
  **text.ALIASES,
}
_TABLE_4 = (*_SMALL[:6], "rebased")
_VARIANTS = ("based", "x2", "norm", "gamma", "gamma-beta", "rebased")


def test_names() -> None:
  assert set(_PRESETS) == (
    {"mqar", *_ALIASES, *text.make_presets()}
    | {f"mqar-{s}" for s in _SMALL}
    | {f"mqar-paper-{s}-{t}" for s in _TABLE_4 for t in _PAIRS}
    | {f"mqar-paper-ablation-{v}-{t}" for v in _VARIANTS for t in (256, 2048)}
  )


@pytest.mark.parametrize("name", [x for x in _PRESETS if x not in _ALIASES])
def test_every_preset_builds_and_survives_json(name: str) -> None:
  config = _PRESETS[name]
  text = stored_config.to_json(config)
  again = stored_config.from_json(text)
  assert again == config and hash(again) == hash(config)
  assert stored_config.to_json(again) == text
  assert stored_config.fingerprint(again) == stored_config.fingerprint(config)
  model = dataclasses.replace(config.model, pairs=1)  # the others are alike
  state = nnx.state(compiled_steps.abstract_lm(model), nnx.Param)
  embedding = nnx.to_pure_dict(state)["token_embedding"]
  # The vocabulary of text is known from its files only.
  vocab_size = config.data.vocab_size or config.model.vocab_size
  assert embedding.shape == (vocab_size, config.model.width)
  assert all(x.size for x in jax.tree.leaves(state))


def test_fingerprints_differ() -> None:
  """Two names of the same run have the same fingerprint, others do not."""
  for alias, name in _ALIASES.items():
    assert _PRESETS[alias] == _PRESETS[name]
  prints = {stored_config.fingerprint(config) for config in _PRESETS.values()}
  assert len(prints) == len(_PRESETS) - len(_ALIASES)


@pytest.mark.parametrize("name", _SMALL)
def test_small_runs_differ_in_their_mixers_only(name: str) -> None:
  """And in Mamba's block and the learning rate."""
  config, mqar = _PRESETS[f"mqar-{name}"], _PRESETS["mqar"]
  system = presets.SYSTEMS[name]
  assert type(config.model.first) is type(system.first)
  assert type(config.model.second) is type(system.second)
  assert getattr(config.model.second, "heads", 1) in (1, 4)
  assert config.model.block == system.block
  model = dataclasses.replace(
    config.model,
    first=mqar.model.first,
    second=mqar.model.second,
    block="pre-norm",
  )
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2)
  assert mqar == dataclasses.replace(config, model=model, optimizer=optimizer)


@pytest.mark.parametrize("system", _TABLE_4)
@pytest.mark.parametrize("length", _PAIRS)
def test_mqar_runs_have_the_numbers_of_the_paper(
  system: str, length: int
) -> None:
  config = _PRESETS[f"mqar-paper-{system}-{length}"]
  assert config.data == MQARPaperData(
    vocab_size=8192,
    length=length,
    pairs=_PAIRS[length],
    power=0.01,
    examples=100_000,
    epochs=64,
    drop_last=length >= 512,
  )
  assert config.steps == (12_544 if length < 512 else 12_480)
  assert config.data.train_batches(512, 42).num_batches == config.steps
  assert (config.batch, config.accumulate) == (512, _ACCUMULATE[length])
  assert (config.seed, config.stop_accuracy) == (42, 0.99)
  assert config.optimizer == OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=0,
    final_fraction=0,
    epoch_steps=config.steps // 64,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.1,
    decay="all",
    clip_norm=None,
  )
  model, mixer = config.model, config.model.second
  assert (model.width, model.layers, model.positions) == (64, 2, length)
  dropout = 0.0 if system == "mamba" else 0.1
  assert (model.dropout, model.mlp_width) == (dropout, None)
  assert (model.dtype, model.precision) == ("float32", "highest")
  wanted = presets.SYSTEMS[system]
  assert (model.first, mixer, model.block) == wanted
  if "attention" in system:
    assert mixer == AttentionConfig(dropout=0.1)
  if system in ("based", "rebased"):
    assert (mixer.heads, mixer.features, mixer.eps) == (12, 16, 1e-12)
    assert model.first == BaseConvConfig(taps=3)


def test_ablations() -> None:
  switches = {  # normalize, use_gamma, use_beta
    "x2": (False, False, False),
    "norm": (True, False, False),
    "gamma": (False, True, False),
    "gamma-beta": (False, True, True),
    "rebased": (True, True, True),
  }
  for variant in _VARIANTS:
    for length in (256, 2048):
      config = _PRESETS[f"mqar-paper-ablation-{variant}-{length}"]
      assert config.model.precision == "highest"
      assert (config.model.width, config.data.pairs) == (48, 32)
      assert config.data.length == length
      mixer = config.model.second
      assert (mixer.heads, mixer.features, mixer.eps) == (12, 16, 1e-12)
      if variant != "based":
        found = mixer.normalize, mixer.use_gamma, mixer.use_beta
        assert found == switches[variant]


def test_differences_name_every_field() -> None:
  old = tiny()
  new = dataclasses.replace(
    tiny(model=dict(width=32), optimizer=dict(clip_norm=None)), keep=2
  )
  assert stored_config.differences(old, old) == []
  assert stored_config.differences(old, new) == [
    "model.width: 16 → 32",
    "optimizer.clip_norm: 1.0 → None",
    "keep: 3 → 2",
  ]
  other = dataclasses.replace(old, data=MQARPaperData(32, 16, 2))
  changed = " ".join(stored_config.differences(old, other))
  assert "data.class: 'train:MQARStreamData' → 'train:MQARPaperData'" in changed
  assert "data.epochs: None → 64" in changed


def test_from_json_refuses_a_field_of_the_wrong_kind() -> None:
  data = json.loads(stored_config.to_json(tiny()))
  data["run"]["batch"] = "8"
  with pytest.raises(stored_config.ConfigError, match="batch='8'"):
    stored_config.from_json(json.dumps(data))
