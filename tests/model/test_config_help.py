"""Tests of help() of configs, and of errors for names of other libraries."""

import dataclasses
import inspect
import pydoc

from flax import nnx
import jax.numpy as jnp
import pytest

import rebased_jax
from rebased_jax import (
  LM,
  Attention,
  AttentionConfig,
  BaseConvConfig,
  Based,
  BasedConfig,
  ModelConfig,
  ReBased,
  ReBasedConfig,
)
from rebased_jax.config_help import field_comments
import rebased_jax.linen
import train

CONFIGS = [
  cls
  for package in (rebased_jax, train)
  for name in package.__all__
  if name.endswith(("Config", "Data", "Site"))
  and dataclasses.is_dataclass(cls := getattr(package, name))
]
CONV = BaseConvConfig()
CONFIG = ModelConfig(first=CONV, second=CONV, vocab_size=5, width=4)


@pytest.mark.parametrize("cls", CONFIGS)
def test_help_explains_every_field(cls) -> None:
  shown = pydoc.render_doc(cls, renderer=pydoc.plaintext)
  comments = field_comments(cls)
  for field in dataclasses.fields(cls):
    assert comments[field.name].endswith(".")
    assert f"{field.name}: {comments[field.name]}" in shown
  assert list(inspect.signature(cls).parameters) == [
    field.name for field in dataclasses.fields(cls) if field.init
  ]


def test_the_configs_are_those_that_exist() -> None:
  names = {cls.__name__ for cls in CONFIGS}
  assert {"ReBasedConfig", "ModelConfig", "RunConfig", "TextData"} <= names
  assert len(CONFIGS) >= 15


def rngs() -> nnx.Rngs:
  return nnx.Rngs(0)


def rebased(**options):
  return ReBased(8, ReBasedConfig(heads=2), rngs=rngs(), **options)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: ReBasedConfig(num_heads=4),
      "ReBasedConfig has no argument 'num_heads': write heads=…",
    ),
    (
      lambda: dataclasses.replace(CONFIG, num_layers=4),
      "ModelConfig has no argument 'num_layers': write pairs=…, half the "
      "number of layers",
    ),
    (
      lambda: rebased(num_heads=4),
      "ReBased has no argument 'num_heads': write ReBasedConfig(heads=…), and "
      "pass that as config",
    ),
    (
      lambda: Based(8, BasedConfig(), eps=1, rngs=rngs()),
      "Based has no argument 'eps': write BasedConfig(eps=…), and pass that as "
      "config",
    ),
    (
      lambda: Attention(in_features=8, config=AttentionConfig(), rngs=rngs()),
      "Attention has no argument 'in_features': write width=…",
    ),
    (
      lambda: LM(CONFIG, rngs=rngs(), vocab_size=4),
      "LM has no argument 'vocab_size': write ModelConfig(vocab_size=…), and "
      "pass that as config",
    ),
    (
      lambda: rebased(dtyp="bfloat16"),
      "ReBased has no argument 'dtyp': did you mean 'dtype'?",
    ),
    (
      lambda: ReBasedConfig(frobnicate=4),
      "ReBasedConfig has no argument 'frobnicate': expected one of heads, ",
    ),
    (
      lambda: nnx.eval_shape(rebased)(jnp.zeros((1, 2, 8)), deterministic=True),
      "Mixer.__call__ has no argument 'deterministic': dropout is on in a call "
      "that gets a dropout_key; ",
    ),
    (
      lambda: nnx.eval_shape(lambda: LM(CONFIG, rngs=rngs()))(
        jnp.zeros((1, 2), int), mask=1
      ),
      "LM.__call__ has no argument 'mask': every mixer is causal by itself; ",
    ),
    (
      lambda: rebased_jax.linen.lm(CONFIG).apply(
        {}, jnp.zeros((1, 2), int), train=True
      ),
      "LM.__call__ has no argument 'train': dropout is on",
    ),
    (
      lambda: rebased_jax.generate(None, [[1]], max_new_tokens=3),
      "generate has no argument 'max_new_tokens': write steps=…",
    ),
    (
      lambda: rebased(rng=rngs()),
      "ReBased has no argument 'rng': write rngs=…",
    ),
    (
      lambda: rebased_jax.linen.mixer(CONV, d_model=4),
      "mixer has no argument 'd_model': write width=…",
    ),
  ],
)
def test_a_name_of_another_library_gets_ours(call, message) -> None:
  with pytest.raises(TypeError) as error:
    call()
  assert str(error.value).startswith(message)
