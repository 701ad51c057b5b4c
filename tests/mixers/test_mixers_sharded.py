"""Tests of every mixer over a mesh of eight devices, against one device."""

from flax import nnx
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mixer_registry import MIXERS, ONE_OF_EACH
from mixer_subject import D, T, make
import numpy as np
import pytest

from rebased_jax import ShardAxes

ROWS = 4
AXES = ShardAxes(batch="data", heads="model")
SPLIT_TIME = [name for name in ONE_OF_EACH if MIXERS[name].splits_time]
WHOLE_TIME = [name for name in ONE_OF_EACH if name not in SPLIT_TIME]


def _draw(seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.normal(size=(ROWS, T, D)).astype(np.float32)


def _mesh(kind: AxisType) -> jax.sharding.Mesh:
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batch_and_heads_are_split(name) -> None:
  """Compare values, states and gradients; parameters split the last axis."""
  subject = make(name)
  x_BTD, w_BTD = _draw(3), _draw(4)
  state = subject.mixer.init_state(ROWS)

  def loss(params, x_BTD, axes):
    mixer = nnx.merge(subject.graph, params)
    y_BTD = mixer(x_BTD, axes=axes)
    again_BTD, after = mixer.prefill(x_BTD, state, axes=axes)
    return (w_BTD * y_BTD).sum(), (y_BTD, again_BTD, after)

  gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
  wanted = gradients(subject.params, x_BTD, None)
  # `test_explicit_mesh_model.py` has every mixer under Explicit axes.
  mesh = _mesh(AxisType.Auto)
  place = lambda x, *spec: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )

  def split(p):
    last = "model" if p.shape[-1] % 2 == 0 else None
    return place(p, *[None] * (p.ndim - 1), last)

  with jax.set_mesh(mesh):
    params = jax.tree.map(split, subject.params)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(params))
    found = gradients(params, place(x_BTD, "data"), AXES)
  y_BTD = found[1][0]
  assert y_BTD.addressable_shards[0].data.shape[0] == ROWS // 4
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    # Relative to each array's norm: other orders of sums of a few dozen terms.
    x, y = jax.device_get((x, y))
    error, size = np.linalg.norm(x - y), np.linalg.norm(y)
    # A key's bias has a gradient of roundings alone.
    assert error <= 1e-5 * size + 1e-6, x.shape


@pytest.mark.parametrize("name", WHOLE_TIME)
def test_time_is_not_split(name) -> None:
  mixer = make(name).mixer
  axes, x_BTD = ShardAxes(time="model"), jax.numpy.zeros((ROWS, T, D))
  kind = type(mixer).__name__
  for call in (
    lambda: mixer(x_BTD, axes=axes),
    lambda: mixer.prefill(x_BTD, mixer.init_state(ROWS), axes=axes),
  ):
    with pytest.raises(NotImplementedError, match=f"{kind}.*time='model'"):
      call()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", SPLIT_TIME)
def test_time_is_split(name, kind) -> None:
  subject = make(name)
  x_BTD = _draw(3)
  call = jax.jit(
    lambda p, x, axes: nnx.merge(subject.graph, p)(x, axes=axes),
    static_argnums=2,
  )
  wanted_BTD = call(subject.params, x_BTD, None)
  mesh = _mesh(kind)
  spec = PartitionSpec("data", "model")
  with jax.set_mesh(mesh):
    x_BTD = jax.device_put(x_BTD, NamedSharding(mesh, spec))
    axes = ShardAxes(batch="data", time="model")
    found_BTD = call(subject.params, x_BTD, axes)
  np.testing.assert_allclose(found_BTD, wanted_BTD, rtol=2e-5, atol=2e-5)
