"""Update rules, schedules and the decay mask, against NumPy and optax."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
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
  OptimizerConfig(epoch_steps=1)  # the least
  config = OptimizerConfig(learning_rate=1.0, epoch_steps=4)
  epochs = np.arange(10) // 4
  expected = (1 + np.cos(np.pi * epochs / 3)) / 2  # 10 steps: 3 epochs
  np.testing.assert_allclose(_rates(config, 10, 10), expected, rtol=1e-6)


_LINEAR = optax.schedules.linear_schedule


def _after_warm_up(fall: optax.Schedule) -> optax.Schedule:
  """Return optax's schedule that first rises to 0.5 in 4 steps."""
  return optax.schedules.join_schedules([_LINEAR(0.125, 0.625, 4), fall], [4])


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    (dict(schedule="linear"), _after_warm_up(_LINEAR(0.5, 0.05, 16))),
    (dict(schedule="constant"), _after_warm_up(lambda step: 0.5 + 0 * step)),
    (  # the last 2 of 20 steps
      dict(schedule="wsd"),
      _after_warm_up(_LINEAR(0.5, 0.05, 2, transition_begin=14)),
    ),
    (
      dict(schedule="wsd", cooldown_steps=8),
      _after_warm_up(_LINEAR(0.5, 0.05, 8, transition_begin=8)),
    ),
    (  # it never begins before the end of the warm-up
      dict(schedule="wsd", cooldown_steps=18),
      _after_warm_up(_LINEAR(0.5, 0.05, 16)),
    ),
  ],
)
def test_schedules_are_those_of_optax(changes, expected) -> None:
  config = OptimizerConfig(
    learning_rate=0.5, warmup_steps=4, final_fraction=0.1, **changes
  )
  steps = np.arange(24)
  found = optimizer.schedule(config, 20, np)(steps)
  np.testing.assert_allclose(found, expected(steps), rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(name="adam"), "name='adam': expected one of .'adamw', 'lion', 'm"),
    (dict(schedule="cos"), "schedule='cos': expected one of .'cosine'"),
    (dict(momentum=0.9), "momentum=0.9: expected None, .* adamw does not use"),
    (
      dict(name="lion", nesterov=False),
      "nesterov=False: expected None, .*: lion",
    ),
    (dict(name="sgd", momentum=1.0), r"momentum=1.0: expected a number in \[0"),
    (
      dict(name="sgd", momentum=0.0, nesterov=True),
      "nesterov=True: expected False without",
    ),
    (dict(cooldown_steps=3), "cooldown_steps=3: expected None, .*: cosine"),
    (dict(schedule="wsd", cooldown_steps=0), "cooldown_steps=0: expected ≥ 1"),
  ],
)
def test_settings_that_a_rule_lacks_are_refused(changes, message) -> None:
  with pytest.raises(ValueError, match=f"optimizer.{message}"):
    OptimizerConfig(**changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(name="sgd", beta1=0.8), "beta1=0.8: expected 0.9, its default: sgd"),
    (dict(name="sgd", beta2=0.9), "beta2=0.9: expected 0.999, .* sgd does not"),
    (dict(name="sgd", eps=1e-6), "eps=1e-06: expected 1e-08, .* sgd does not"),
    (dict(name="lion", eps=1e-6), "eps=1e-06: expected 1e-08, .*: lion does"),
    (
      dict(schedule="constant", final_fraction=0.1),
      "final_fraction=0.1: expected 0.0, its default: constant does not use",
    ),
    (dict(schedule="constant", epoch_steps=2), "epoch_steps=2: expected None"),
  ],
)
def test_what_would_change_nothing_is_refused_in_a_new_run(
  changes, message
) -> None:
  """A run that was stored with it can be read."""
  config = OptimizerConfig(**changes)
  with pytest.raises(ValueError, match=f"optimizer.{message}"):
    config.check_unused()
  config.check_unused(stored=config)
  with pytest.raises(ValueError, match=f"optimizer.{message}"):
    config.check_unused(stored=OptimizerConfig())
  config.switched_to(None, None).check_unused()
  other = OptimizerConfig(beta2=0.95, final_fraction=0.1)
  found = other.switched_to(config.name, config.schedule)
  found.check_unused()
  assert (found.name, found.schedule) == (config.name, config.schedule)
  assert other.switched_to("muon", "wsd").beta2 == 0.95
  assert other.switched_to("adam", None) == other


def test_a_cooldown_longer_than_the_run_is_refused() -> None:
  changes = dict(schedule="wsd", warmup_steps=2, cooldown_steps=5)
  with pytest.raises(ValueError, match="cooldown_steps=5: expected at most 4"):
    tiny(optimizer=changes, steps=6)
  assert tiny(optimizer=changes, steps=7).steps == 7


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


_STACKED = {
  "token_embedding": (5, 4),
  "pairs": {
    "first": {"mixer": {"kernel": (2, 3, 4), "gate": {"kernel": (2, 3, 4)}}},
    "second": {"mixer": {"o": {"kernel": (2, 4, 3), "bias": (2, 3)}}},
  },
}
_MUON = {"pairs/first/mixer/gate/kernel", "pairs/second/mixer/o/kernel"}


def _own_muon(config: OptimizerConfig, is_matrix: bool):
  """Return optax's Muon for matrices, and its rule for what is none."""
  rate, decay = config.learning_rate, config.weight_decay
  if is_matrix:
    return contrib.muon(
      rate,
      beta=0.95 if config.momentum is None else config.momentum,
      weight_decay=decay,
      nesterov=config.nesterov is not False,
      consistent_rms=0.2,
    )
  return optax.adamw(
    rate,
    config.beta1,
    config.beta2,
    weight_decay=decay if config.decay == "all" else 0.0,
    nesterov=config.nesterov is not False,
  )


def _own_sgd(config: OptimizerConfig, is_matrix: bool):
  """Return optax's SGD, with a weight decay that has no momentum."""
  decays = config.decay == "all" or is_matrix
  decay = optax.add_decayed_weights(-config.learning_rate * 0.3 * decays)
  momentum = 0.9 if config.momentum is None else config.momentum
  nesterov = bool(config.nesterov)
  return optax.chain(optax.sgd(config.learning_rate, momentum, nesterov), decay)


def _own_lion(config: OptimizerConfig, is_matrix: bool):
  decays = config.decay == "all" or is_matrix
  return optax.lion(config.learning_rate, 0.8, 0.95, weight_decay=0.3 * decays)


@pytest.mark.parametrize(
  ("changes", "own"),
  [
    (dict(name="muon"), _own_muon),
    (
      dict(name="muon", momentum=0.7, nesterov=False, decay="matrices"),
      _own_muon,
    ),
    (dict(name="sgd", decay="matrices"), _own_sgd),
    (dict(name="sgd", momentum=0.6, nesterov=True), _own_sgd),
    (dict(name="lion", decay="matrices"), _own_lion),
  ],
)
def test_updates_are_those_of_optax(changes, own) -> None:
  """Each matrix of a stack is updated alone."""
  config = OptimizerConfig(
    learning_rate=0.1,
    schedule="constant",
    beta1=0.8,
    beta2=0.95,
    weight_decay=0.3,
    **changes,
  )
  trees = [_random(_STACKED, seed) for seed in range(3)]

  def train(*trees):
    found = {}
    columns = _paths(trees[0]), *map(jax.tree.leaves, trees)
    for path, *leaves in zip(*columns, strict=True):
      tx = own(config, path in _MUON)
      if path in _MUON:
        pairs = zip(*leaves, strict=True)
        found[path] = jnp.stack([_trained(tx, *pair) for pair in pairs])
      else:
        found[path] = _trained(tx, *leaves)
    return found, _trained(optimizer.make(config, 8), *trees)

  expected, found = jax.jit(train)(*trees)
  for path, x in zip(_paths(found), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(x, expected[path], rtol=1e-5, atol=1e-6)


def _paths(tree) -> list[str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return [name(path) for path, _ in leaves]


def _random(shapes, seed: int):
  rng = np.random.default_rng(seed)
  make = lambda shape: np.float32(rng.normal(size=shape))
  return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _trained(tx: optax.GradientTransformation, params, *gradients):
  """Return the parameters after one update for each gradient."""
  state = tx.init(params)
  for gradient in gradients:
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_frozen_parameters_stay_and_the_rest_trains_without_them(name) -> None:
  """The others move as in a tree that has no frozen parameters at all."""
  config = OptimizerConfig(
    name=name, learning_rate=0.1, weight_decay=0.3, clip_norm=0.5
  )
  frozen = ("pairs/first/*", "token_embedding")
  make = lambda seed: jax.tree.map(
    lambda shape: np.float32(np.random.default_rng(seed).normal(size=shape)),
    _STACKED,
    is_leaf=lambda x: isinstance(x, tuple),
  )

  def train(config, pick):
    params = jax.tree.map(jnp.asarray, pick(make(0)))
    tx = optimizer.make(config, 8)
    state = tx.init(params)
    for seed in (1, 2):
      updates, state = tx.update(pick(make(seed)), state, params)
      params = optax.apply_updates(params, updates)
    return _flat(params)

  whole = lambda tree: tree
  rest = lambda tree: {"pairs": {"second": tree["pairs"]["second"]}}
  found = train(dataclasses.replace(config, frozen=frozen), whole)
  expected = train(config, rest)
  first = _flat(make(0))
  assert len(expected) == 2 and len(found) == 5
  for path, value in found.items():
    np.testing.assert_array_equal(value, expected.get(path, first[path]))
    assert (path in expected) == (value != first[path]).all(), path


def test_wrong_patterns_of_frozen_parameters_are_named() -> None:
  params = {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}
  init = lambda *frozen: optimizer.make(OptimizerConfig(frozen=frozen), 8).init(
    params
  )
  with pytest.raises(
    ValueError, match=r"'pair/\*' matches no parameter.*norm/"
  ):
    init("norm/bias", "pair/*")
  with pytest.raises(ValueError, match="matches every parameter"):
    init("norm/scale", "*bias")
  for wrong in ("norm", ("",), (1,)):
    with pytest.raises(ValueError, match="frozen=.*expected a tuple"):
      OptimizerConfig(frozen=wrong)
