"""Mixers and models under a mesh as jax makes it, whose axes are Explicit."""

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mixer_registry import MIXERS, ONE_OF_EACH, WIDTH
import numpy as np
import pytest

from pallas_kernels import ShardAxes
from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  Site,
  generate,
  generation,
)

B, T = 4, 12


@pytest.fixture
def mesh():
  mesh = jax.make_mesh((2, 2), ("data", "tensor"))
  assert AxisType.Explicit in mesh.axis_types  # jax's default
  return mesh


def _split_last(mesh, module):
  """Split the last axis of matrices over "tensor"; it holds the heads."""

  def place(x):
    even = x.ndim > 1 and x.shape[-1] % 2 == 0
    spec = P(*(None,) * (x.ndim - 1), "tensor") if even else P()
    return jax.device_put(x, NamedSharding(mesh, spec))

  graph, parameters = nnx.split(module)
  return nnx.merge(graph, jax.tree.map(place, parameters))


def _square(module, x):
  return (module(x) ** 2).sum()


@pytest.mark.parametrize("split", ["rows", "rows and parameters"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_mixers(mesh, name, split):
  mixer = MIXERS[name].config.make(Site(WIDTH, length=T), rngs=nnx.Rngs(0))
  x_BTD = jax.random.normal(jax.random.key(1), (B, T, WIDTH))

  @nnx.jit
  def run(mixer, x_BTD):
    y_BTD, grads = nnx.value_and_grad(_square)(mixer, x_BTD)
    first, state = mixer.prefill(x_BTD[:, :-1], mixer.init_state(B))
    last, state = mixer.step(x_BTD[:, -1], state)
    return mixer(x_BTD), y_BTD, grads, first, last, state

  wanted = run(mixer, x_BTD)
  with jax.set_mesh(mesh):
    if split == "rows and parameters":
      mixer = _split_last(mesh, mixer)
    x_BTD = jax.device_put(x_BTD, NamedSharding(mesh, P("data")))
    found = run(mixer, x_BTD)
  y_BTD, _, _, _, last_BD, state = found
  assert y_BTD.sharding.spec[0] == "data" == last_BD.sharding.spec[0]
  assert {x.sharding.spec[0] for x in jax.tree.leaves(state)} <= {"data"}
  # Sums over devices come in another order.
  chex.assert_trees_all_close(
    *map(jax.device_get, (found, wanted)), rtol=1e-4, atol=1e-4
  )


def test_heads_that_a_mesh_does_not_divide_stay_whole(mesh):
  mixer = ReBasedConfig(heads=3, features=4).make(Site(12), rngs=nnx.Rngs(0))
  with jax.set_mesh(mesh):
    mixer = _split_last(mesh, mixer)
    rows = NamedSharding(mesh, P("data"))
    x_BTD = jax.device_put(jnp.ones((B, T, 12)), rows)
    y_BTD = jax.eval_shape(mixer, x_BTD)
  assert y_BTD.sharding.spec[0] == "data"


@pytest.fixture(scope="module")
def lm():
  config = ModelConfig(
    BaseConvConfig(),
    ReBasedConfig(heads=2, features=4),
    vocab_size=16,
    width=8,
    pairs=2,
    positions=80,
    mlp_width=16,
    dropout=0.1,
  )
  return LM(config, rngs=nnx.Rngs(0))


def _loss(model, tokens, key):
  logits = model(tokens, dropout_key=key)
  targets = jnp.roll(tokens, -1, axis=1)
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
  return (jax.nn.logsumexp(logits, axis=-1) - own[..., 0]).mean()


def test_a_model_trains(mesh, lm):
  tokens = jax.random.randint(jax.random.key(2), (B, 70), 0, 16)
  key = jax.random.key(3)
  run = nnx.jit(nnx.value_and_grad(_loss))
  wanted = run(lm, tokens, key)
  with jax.set_mesh(mesh):
    model = _split_last(mesh, lm)
    rows = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    found = run(model, rows, key)
    for parameter, grad in zip(
      jax.tree.leaves(nnx.state(model)), jax.tree.leaves(found[1]), strict=True
    ):
      assert grad.sharding == parameter.sharding
  chex.assert_trees_all_close(
    *map(jax.device_get, (found, wanted)), rtol=1e-4, atol=1e-6
  )


def test_a_model_outside_jit(mesh, lm):
  tokens = jax.random.randint(jax.random.key(2), (B, 70), 0, 16)
  at = jnp.array([[3, 69]] * B)
  prompt = tokens[:, :5]
  wanted = (
    lm(tokens),
    lm(tokens, positions_to_predict=at),
    lm.prefill(prompt, lm.init_state(B), all_positions=True)[0],
  )
  token = np.asarray(tokens[:, 0])  # NumPy's integers have no layout
  first_BV, _ = lm.step(token, lm.init_state(B))
  prompts = [x[: 2 + i] for i, x in enumerate(prompt)]
  continued = generate(lm, prompts, steps=4)
  with jax.set_mesh(mesh):
    by_rows = NamedSharding(mesh, P("data"))
    rows, prompt = jax.device_put((tokens, prompt), by_rows)
    found = (
      lm(rows),
      lm(rows, positions_to_predict=at),
      lm.prefill(prompt, lm.init_state(B), all_positions=True)[0],
    )
    tokens_BS = generate(lm, prompts, steps=4, sharding=by_rows)
    found_BV, _ = lm.step(token, lm.init_state(B))
    with pytest.raises(ValueError, match="rows"):  # given axes are taken
      lm(rows, axes=ShardAxes(batch="rows"))
  for x in (*found, tokens_BS):
    assert x.sharding.spec[0] == "data"
  chex.assert_trees_all_close(
    *map(jax.device_get, ((*found, found_BV), (*wanted, first_BV))),
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_array_equal(tokens_BS, continued)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", [False, True])
def test_generation(lm, axis_type, split):
  """Arrays, lists and streams, on meshes of every kind."""
  prompt = jax.random.randint(jax.random.key(2), (B, 5), 0, 16)
  prompts = [x[: 2 + i] for i, x in enumerate(prompt)]
  options = dict(steps=20, temperature=1.0, top_p=0.9, key=jax.random.key(4))
  wanted = generate(lm, prompt, **options), generate(lm, prompts, **options)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
  by_rows = NamedSharding(mesh, P("data"))
  with jax.set_mesh(mesh):
    model = _split_last(mesh, lm) if split else lm
    array = generate(model, jax.device_put(prompt, by_rows), **options)
    np.testing.assert_array_equal(array, wanted[0])
    for sharding in (None, by_rows, NamedSharding(mesh, P(("data", "tensor")))):
      for piece in (2, 1024):
        how = dict(options, sharding=sharding, piece=piece)
        found = generate(model, prompts, **how)
        np.testing.assert_array_equal(found, wanted[1])
        if sharding is not None:
          assert found.sharding.spec[0] == sharding.spec[0]
        blocks = list(generation.stream(model, prompts, **how))
        np.testing.assert_array_equal(np.concatenate(blocks, 1), wanted[1])


def test_a_mixer_with_a_list(mesh):
  """Programs are kept under a module's structure, and a list has no hash."""
  mixer = BaseConvConfig().make(Site(8), rngs=nnx.Rngs(0))
  x_BTD = jnp.ones((B, T, 8))
  wanted_BTD = mixer(x_BTD)
  mixer.notes = {"of": "a user"}
  with jax.set_mesh(mesh):
    y_BTD = mixer(jax.device_put(x_BTD, NamedSharding(mesh, P("data"))))
  assert y_BTD.sharding.spec[0] == "data"
  np.testing.assert_allclose(y_BTD, wanted_BTD, rtol=1e-5)
