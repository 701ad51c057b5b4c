"""Training on meshes of eight devices gives the results of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from train_cases import trainer as trainer

from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  ModelConfig,
  ReBasedConfig,
)
from train import compiled_steps
from train.config import OptimizerConfig, RunConfig, TextData
from train.devices import batch_sharding, mesh as mesh_lib, parameter_sharding
from train.devices.mesh import MeshConfig

_B, _T, _V, _STEPS = 8, 16, 24, 20
# A first token's q·k may be near 0; its gradient is up to 1/√eps times larger.
_REBASED = ReBasedConfig(heads=4, features=4, eps=1e-2)
_MIXERS = dict(
  rebased=_REBASED,
  based=BasedConfig(heads=4, features=4),
  attention=AttentionConfig(heads=4),
)
# Where documents of a row begin, in step 1: with a context of 4 a device holds
# 4 tokens. Later steps have long documents alone: a short one's Σ (q·k)² can be
# all but 0, so that its gradient makes much of every rounding.
_BOUNDARIES = (
  (),
  (8,),  # at a boundary between devices
  (4, 8, 12),  # on all
  (3, 5, 9, 11),  # one token off
  (1, 2, 3, 4, 5),  # single tokens, across a device boundary
  (15,),
  (6, 7),
  tuple(range(1, 16)),
)
_LONG = ((), (8,), (), (7,), (9,), (), (6,), (10,))


def _config(
  mixer,
  mesh: MeshConfig,
  *,
  pairs: int = 1,
  accumulate: int = 1,
  loss_chunks: int = 1,
) -> RunConfig:
  return RunConfig(
    model=ModelConfig(
      first=BaseConvConfig(),
      second=mixer,
      vocab_size=_V,
      width=16,
      pairs=pairs,
      positions=_T,
      mlp_width=32,
      dropout=0.2,
    ),
    data=TextData(length=_T, packing="documents"),
    # A gradient that is rounding alone moves nothing, with this eps.
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5, eps=1e-5),
    steps=_STEPS,
    batch=_B,
    accumulate=accumulate,
    loss_chunks=loss_chunks,
    mesh=mesh,
  )


def _batch(step: int) -> dict[str, np.ndarray]:
  """Return packed documents to learn; row 0 ends in two of padding."""
  rng = np.random.default_rng(step)
  tokens = rng.integers(0, _V, (_B, _T + 1), dtype=np.int32)
  tokens[:, 1::2] = (5 * tokens[:, :-1:2] + 3) % _V
  starts = np.zeros((_B, _T), np.int32)
  for row, places in enumerate(_BOUNDARIES if step == 0 else _LONG):
    starts[(row + step) % _B, list(places)] = 1
  weights = np.ones((_B, _T), np.float32)
  weights[0, -2:] = 0
  return dict(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    weights=weights,
    segment_ids=1 + np.cumsum(starts, axis=1, dtype=np.int32) % 2,
  )


@functools.cache
def _train(mixer: str, mesh: MeshConfig, devices: int = 8, **changes):
  """Return the gradient of step 1, the losses, and the last state."""
  config = _config(_MIXERS[mixer], mesh, **changes)
  on = mesh_lib.make_mesh(mesh, jax.devices()[:devices])
  with jax.set_mesh(on):
    built = compiled_steps.build(config, on)
    state = compiled_steps.fresh_state(config, built)
    losses = []
    for step in range(_STEPS):
      batch = batch_sharding.put_batch(_batch(step), on)
      state, metrics = built.train_step(state, batch, built.key)
      losses.append(float(metrics["loss"]))
      if step == 0:
        first = jax.device_get(_moment(state))
  # Adam's first moment after one step is (1 - beta1) of the gradient.
  grads = jax.tree.map(lambda m: m / (1 - config.optimizer.beta1), first)
  return grads, losses, state


def _moment(state):
  found = [
    x
    for x in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: hasattr(x, "mu")
    )
    if hasattr(x, "mu")
  ]
  return found[0].mu


_FAST = [
  MeshConfig(fsdp=2, tensor=2),
  MeshConfig(context=8),
  MeshConfig(data=1, fsdp=2, tensor=2, context=2),
]
_GRID = [
  MeshConfig(),
  MeshConfig(fsdp=8),
  MeshConfig(tensor=4),
  MeshConfig(context=4),
  MeshConfig(fsdp=2, context=2),
  MeshConfig(data=1, fsdp=2, tensor=2, context=2),
]


def _named(mesh: MeshConfig) -> str:
  return "-".join(f"{k}{v}" for k, v in mesh.sizes(8).items() if v > 1)


def _same(mixer: str, mesh: MeshConfig, **changes) -> None:
  grads, losses, _ = _train(mixer, mesh, **changes)
  expected_grads, expected, _ = _train(mixer, MeshConfig(), 1, **changes)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(grads),
    jax.tree.leaves(expected_grads),
    strict=True,
  ):
    # Roundings of 6e-8, summed in another order; some gradients are of 1e-5.
    largest = np.abs(b).max()
    assert largest > 1e-7, path
    tolerance = min(1e-5, 1e-3 * largest)
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
    )
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
  assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("mesh", _FAST, ids=_named)
def test_a_mesh_trains_as_one_device(mesh: MeshConfig) -> None:
  _same("rebased", mesh, loss_chunks=2 if mesh.fsdp > 1 else 1)


def test_attention_trains_on_a_mesh_as_on_one_device() -> None:
  _same("attention", MeshConfig(fsdp=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", _GRID, ids=_named)
@pytest.mark.parametrize("mixer", ["rebased", "based", "attention"])
def test_the_grid_trains_as_one_device(mixer: str, mesh: MeshConfig) -> None:
  if mixer == "attention" and mesh.context > 1:
    pytest.skip("attention refuses to split time")
  sizes = mesh.sizes(8)
  rows = sizes["data"] * sizes["fsdp"]  # of the batch of 8, at least
  _same(mixer, mesh, pairs=2, accumulate=1 if rows == 8 else 2)


def test_parameters_and_moments_are_split() -> None:
  mesh = _FAST[2]
  _, _, state = _train("rebased", mesh)
  sizes, whole, split = mesh.sizes(8), 0, 0
  places = {x.path: x for x in parameter_sharding.place_all(state, sizes)}
  for path, place in places.items():
    leaf = functools.reduce(_child, path.split("/"), state)
    for shard in leaf.addressable_shards:
      assert shard.data.size == place.share(sizes), path
    if path.startswith("params/"):
      moment = path.replace("params", "opt_state/0/0/mu", 1)
      assert places[moment].spec == place.spec
      whole += leaf.size
      split += place.share(sizes)
  assert not any(x.dropped for x in places.values())
  assert split < 0.35 * whole  # 4 parts of all but norms, biases and taps


def _child(node, name: str):
  if isinstance(node, dict):
    return node[name]
  return node[int(name)] if name.isdigit() else getattr(node, name)


_IN = ("fsdp", "tensor")  # a product that makes heads or channels
_OUT = ("tensor", "fsdp")  # a product that sums over them


@pytest.mark.parametrize(
  ("path", "axes"),
  [
    ("token_embedding", ("tensor", "fsdp")),
    ("position_embedding", (None, "fsdp")),
    ("norm/scale", ()),
    ("pairs/first/norm1/bias", ()),
    ("pairs/first/mlp/up/kernel", _IN),
    ("pairs/first/mlp/up/bias", ("tensor",)),
    ("pairs/first/mlp/down/kernel", _OUT),
    ("pairs/first/mlp/down/bias", ()),
    ("pairs/first/mixer/gate/kernel", _IN),
    ("pairs/first/mixer/gate/bias", ("tensor",)),
    *((f"pairs/second/mixer/project/{x}/kernel", _IN) for x in "qkv"),
    ("pairs/second/mixer/project/o/kernel", _OUT),
    ("pairs/second/mixer/query_affine/gamma", ("tensor",)),
    ("pairs/second/mixer/key_affine/beta", ("tensor",)),
    ("pairs/second/mixer/qkv/kernel", _IN),
    ("pairs/second/mixer/qkv/bias", ("tensor",)),
    ("pairs/second/mixer/out_proj/kernel", _OUT),
    ("pairs/second/mixer/out_proj/bias", ()),
    *((f"pairs/second/mixer/{x}/kernel", _IN) for x in "kvr"),
    ("pairs/second/mixer/o/kernel", _OUT),
    ("pairs/second/mixer/decay", ("tensor",)),
    ("pairs/second/mixer/mix_k", ()),
    ("pairs/second/mixer/in_proj/kernel", _IN),
    ("pairs/second/mixer/gate_proj/kernel", _IN),
    ("pairs/second/mixer/conv/kernel", (None, "tensor")),
    ("pairs/second/mixer/x_proj/kernel", ("tensor",)),
    ("pairs/second/mixer/dt_proj/kernel", (None, "tensor")),
    ("pairs/second/mixer/A_log", ("tensor",)),
  ],
)
def test_where_each_parameter_is_split(path: str, axes: tuple) -> None:
  """A tensor axis splits what a product makes, and what the next one sums."""
  sizes = MeshConfig(data=1, fsdp=4, tensor=2).sizes(8)
  vector = path.rpartition("/")[2] in {"scale", "bias", "gamma", "beta"}
  vector |= path.endswith(("decay", "mix_k"))
  shape = (16,) if vector else (16, 8)
  if path.startswith("pairs"):
    shape = (3, *shape)
    axes = (None, *axes) if axes else axes
  found = parameter_sharding.place(f"params/{path}", shape, sizes)
  assert found.spec == jax.P(*axes) and not found.dropped
  moment = parameter_sharding.place(f"opt_state/0/0/nu/{path}", shape, sizes)
  assert moment.spec == found.spec


def test_an_axis_that_does_not_divide_is_dropped_and_named() -> None:
  sizes = MeshConfig(data=1, fsdp=4, tensor=2).sizes(8)
  place = parameter_sharding.place("params/token_embedding", (257, 64), sizes)
  assert place.spec == jax.P(None, "fsdp")
  assert place.dropped == ("tensor: 257 is not a multiple of 2",)
  assert place.share(sizes) == 257 * 16
  place = parameter_sharding.place(
    "params/pairs/second/mlp/up/kernel", (3, 6, 9), sizes
  )
  assert place.spec == jax.P()
  assert place.dropped == (
    "fsdp: 6 is not a multiple of 4",
    "tensor: 9 is not a multiple of 2",
  )
  axes = mesh_lib.shard_axes(mesh_lib.make_mesh(MeshConfig(tensor=8)), 12)
  assert axes.heads is None


@pytest.mark.parametrize(
  ("mesh", "message"),
  [
    (dict(fsdp=3), r"mesh='fsdp 3 × context 1 × tensor 1': .* divides the 8"),
    (dict(data=2, tensor=2), r"mesh='data 2 × .* tensor 2': .* is the 8 dev"),
    (dict(fsdp=0), r"mesh\.fsdp=0: expected an integer ≥ 1"),
    (dict(context=None), r"mesh\.context=None: expected an integer ≥ 1"),
  ],
)
def test_a_mesh_that_does_not_fit(mesh: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(MeshConfig(**mesh))


def test_a_mesh_on_one_device() -> None:
  with pytest.raises(ValueError, match="divides 1, as there is 1 device"):
    MeshConfig(fsdp=3).sizes(1)


@pytest.mark.parametrize(
  ("mixer", "mesh", "error", "message"),
  [
    ("rebased", dict(fsdp=8), ValueError, "batch=12: expected a multiple of 8"),
    ("rebased", dict(context=8), ValueError, "length=12: .* mesh.context=8"),
    ("attention", dict(context=4), NotImplementedError, "Attention .*context"),
  ],
)
def test_a_run_that_does_not_fit_its_mesh(mixer, mesh, error, message) -> None:
  config = _config(_MIXERS[mixer], MeshConfig(**mesh))
  data = dataclasses.replace(config.data, length=12)
  batch = 12 if "fsdp" in mesh else 8
  config = dataclasses.replace(config, data=data, batch=batch)
  on = mesh_lib.make_mesh(config.mesh)
  with jax.set_mesh(on), pytest.raises(error, match=message):
    built = compiled_steps.build(config, on)
    fields = config.data.fields(config.batch)
    batch = {k: np.zeros(x.shape, x.dtype) for k, x in fields.items()}
    built.train_step.lower(built.abstract, batch, built.key)
