"""AdamW, its learning-rate schedule and its decay mask, against NumPy."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_cases import tiny, trainer as trainer

from rebased_jax import (
  AttentionConfig,
  HyenaConfig,
  MambaConfig,
  ModelConfig,
  RWKVConfig,
)
from train import compiled_steps, optimizer
from train.config import OptimizerConfig
from train.presets import make_presets

_SHAPES = {
  "token_embedding": (5, 3),
  "norm": {"scale": (3,), "bias": (3,)},
  "pairs": {
    "first": {"mixer": {"kernel": (3, 2), "gate": {"kernel": (3, 3)}}},
    "second": {"mixer": {"query_affine": {"gamma": (4,), "beta": (4,)}}},
  },
}
_MATRICES = {"pairs/first/mixer/gate/kernel"}  # of the shapes above


def _tree(seed: int, scale: float = 1.0):
  rng = np.random.default_rng(seed)
  make = lambda shape: np.float32(scale * rng.normal(size=shape))
  is_shape = lambda x: isinstance(x, tuple)
  return jax.tree.map(make, _SHAPES, is_leaf=is_shape)


def _flat(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.float64(x)
    for path, x in leaves
  }


def _rates(config: OptimizerConfig, steps: int, count: int) -> np.ndarray:
  rate = jax.jit(optimizer.schedule(config, steps))
  return np.array([float(rate(jnp.int32(step))) for step in range(count)])


@pytest.mark.quick
def test_warm_up_then_cosine() -> None:
  config = OptimizerConfig(
    learning_rate=0.5, warmup_steps=4, final_fraction=0.1
  )
  found = _rates(config, 12, 14)
  expected = [0.5 * (s + 1) / 4 for s in range(4)]
  for s in range(4, 12):
    cosine = (1 + math.cos(math.pi * (s - 4) / 8)) / 2
    expected.append(0.5 * (0.1 + 0.9 * cosine))
  expected += [0.05, 0.05]  # at the end of the run and beyond it
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert found[3] == found[4] == 0.5
  assert np.all(np.diff(found[4:13]) < 0)


def test_cosine_without_warm_up_ends_at_0() -> None:
  found = _rates(OptimizerConfig(learning_rate=2.0), 10, 11)
  expected = [1 + math.cos(math.pi * s / 10) for s in range(11)]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
  assert found[0] == 2.0 and found[10] == 0.0


@pytest.mark.parametrize("length", [128, 512])
def test_paper_schedule_is_stepped_once_an_epoch(length: int) -> None:
  run = make_presets()[f"mqar-paper-rebased-{length}"]
  config, epoch = run.optimizer, run.optimizer.epoch_steps
  assert epoch == {128: 196, 512: 195}[length] and run.steps == 64 * epoch
  rates = np.asarray(
    jax.jit(jax.vmap(optimizer.schedule(config, run.steps)))(
      jnp.arange(run.steps)
    )
  ).reshape(64, epoch)
  assert np.all(rates == rates[:, :1])  # bit-identical through every epoch
  expected = 1e-3 * (1 + np.cos(np.pi * np.arange(64) / 64)) / 2
  np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-6, atol=1e-10)


def test_a_run_that_ends_inside_an_epoch() -> None:
  config = OptimizerConfig(learning_rate=1.0, epoch_steps=4)
  epochs = np.arange(10) // 4
  expected = (1 + np.cos(np.pi * epochs / 3)) / 2  # 10 steps: 3 epochs
  np.testing.assert_allclose(_rates(config, 10, 10), expected, rtol=1e-6)


def _by_hand(config: OptimizerConfig, steps: int, gradients) -> dict:
  """Return updates of AdamW as Loshchilov and Hutter wrote it, in float64."""
  params = _flat(_tree(0))
  m = {path: np.zeros_like(x) for path, x in params.items()}
  v = {path: np.zeros_like(x) for path, x in params.items()}
  for t, tree in enumerate(gradients, start=1):
    grads = _flat(tree)
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    if config.clip_norm is not None and norm > config.clip_norm:
      grads = {p: g * config.clip_norm / norm for p, g in grads.items()}
    if t <= config.warmup_steps:
      rate = config.learning_rate * t / config.warmup_steps
    else:
      done = (t - 1 - config.warmup_steps) / (steps - config.warmup_steps)
      rate = config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    for p, g in grads.items():
      m[p] = config.beta1 * m[p] + (1 - config.beta1) * g
      v[p] = config.beta2 * v[p] + (1 - config.beta2) * g**2
      m_hat = m[p] / (1 - config.beta1**t)
      v_hat = v[p] / (1 - config.beta2**t)
      decays = config.decay == "all" or p in _MATRICES
      decay = config.weight_decay * params[p] * decays
      params[p] = params[p] - rate * (
        m_hat / (np.sqrt(v_hat) + config.eps) + decay
      )
  return params


@pytest.mark.quick
@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("clip_norm", [None, 1.0, 20.0])
def test_updates_are_adamw(decay, clip_norm) -> None:
  config = OptimizerConfig(
    learning_rate=0.1,
    warmup_steps=2,
    beta1=0.8,
    beta2=0.95,
    eps=1e-3,
    weight_decay=0.3,
    decay=decay,
    clip_norm=clip_norm,
  )
  gradients = [_tree(seed, scale) for seed, scale in ((1, 9), (2, 0.1), (3, 1))]
  norms = [float(optax.tree.norm(gradient)) for gradient in gradients]
  assert norms[0] > 20 > norms[2] > 1 > norms[1]  # some are clipped, some not
  tx = optimizer.make(config, 8)
  params = jax.tree.map(jnp.asarray, _tree(0))
  state = tx.init(params)
  update = jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  found, expected = _flat(params), _by_hand(config, 8, gradients)
  assert found.keys() == expected.keys()
  for path in expected:
    np.testing.assert_allclose(
      found[path], expected[path], rtol=2e-6, atol=2e-6, err_msg=path
    )


def test_which_parameters_decay() -> None:
  model = compiled_steps.abstract_model(tiny(model=dict(mlp_width=8)))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  decayed = _true(optimizer.decayed(params, "matrices"))
  blocks = ("pairs/first", "pairs/second")
  mlps = {f"{b}/mlp/{x}/kernel" for b in blocks for x in ("up", "down")}
  heads = {f"pairs/second/mixer/project/{x}/kernel" for x in "qkvo"}
  assert decayed == mlps | heads | {"pairs/first/mixer/gate/kernel"}
  leaves = jax.tree_util.tree_leaves_with_path(params)
  assert _true(optimizer.decayed(params, "all")) == {
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
  }


@pytest.mark.parametrize(
  ("mixer", "kernels"),
  [
    (AttentionConfig(), ("qkv", "out_proj")),
    (RWKVConfig(), tuple("kvro")),
    (
      HyenaConfig(),
      ("in_proj", "out_proj", *(f"filter/layers/{i}" for i in range(4))),
    ),
    (
      MambaConfig(),
      tuple(f"{x}_proj" for x in ("in", "gate", "x", "dt", "out")),
    ),
  ],
  ids=lambda x: type(x).__name__,
)
def test_kernels_of_projections_decay(mixer, kernels) -> None:
  """Taps of a convolution do not, nor Mamba's A_log and D."""
  model = compiled_steps.abstract_lm(
    ModelConfig(first=mixer, second=mixer, vocab_size=8, width=8, positions=8)
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert _true(optimizer.decayed(params, "matrices")) == {
    f"pairs/{block}/mixer/{kernel}/kernel"
    for block in ("first", "second")
    for kernel in kernels
  }


def _true(mask) -> set[str]:
  return {path for path, value in _flat(mask).items() if value}


def test_the_recorded_rate_is_the_schedule_on_the_host() -> None:
  for config in (
    optimizer.OptimizerConfig(warmup_steps=3, final_fraction=0.1),
    optimizer.OptimizerConfig(epoch_steps=4),
  ):
    on_host = optimizer.schedule(config, 20, np)
    on_device = optimizer.schedule(config, 20)
    for step in (0, 2, 3, 11, 19):
      assert not isinstance(on_host(step), jax.Array)
      np.testing.assert_allclose(on_host(step), on_device(step), rtol=1e-6)
