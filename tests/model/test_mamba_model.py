"""Tests of the paper's Mamba model: block, sizes, parameter names."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from model_cases import make
import numpy as np
import pytest

from rebased_jax import (
  LM,
  BaseConvConfig,
  MambaConfig,
  ModelConfig,
  ShardAxes,
  blocks,
)
from rebased_jax.layer_norm import Stream

B, T, V, D = 2, 10, 11, 8
MAMBA = MambaConfig(state=3)
CONFIG = ModelConfig(
  first=MAMBA,
  second=MAMBA,
  vocab_size=V,
  width=D,
  pairs=2,
  positions=T,
  block="mamba",
)
TOKENS_BT = np.random.default_rng(1).integers(V, size=(B, T), dtype=np.int32)
# Two float32 orders of the same sums: roundings of 6e-8 through four blocks,
# whose norms divide by values below 1.
CLOSE = dict(rtol=3e-5, atol=3e-5)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  make = lambda: nnx.state(LM(config, rngs=nnx.Rngs(0)), nnx.Param)
  leaves = jax.tree_util.tree_leaves_with_path(
    nnx.to_pure_dict(jax.eval_shape(make))
  )
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf.shape for path, leaf in leaves}


def test_the_names_of_the_parameters() -> None:
  I, N = 2 * D, 3
  mixer = {
    "in_proj/kernel": (D, I),
    "gate_proj/kernel": (D, I),
    "conv/kernel": (4, I),
    "conv/bias": (I,),
    "x_proj/kernel": (I, 1 + 2 * N),
    "dt_proj/kernel": (1, I),
    "dt_proj/bias": (I,),
    "A_log": (I, N),
    "D": (I,),
    "out_proj/kernel": (I, D),
  }
  block = {"norm1/scale": (D,), **{f"mixer/{k}": v for k, v in mixer.items()}}
  assert shapes(CONFIG) == {
    "token_embedding": (V, D),
    "position_embedding": (T, D),
    "norm/scale": (D,),
    "norm/bias": (D,),
    **{
      f"pairs/{place}/{name}": (2, *shape)
      for place in ("first", "second")
      for name, shape in block.items()
    },
  }


def layer_by_layer(params):
  model = nnx.merge(make(CONFIG)[0], params)
  x_BTD = model.token_embedding[...][TOKENS_BT]
  x_BTD = x_BTD + model.position_embedding[...][None]
  graph, stacked = nnx.split(model.pairs)
  for i in range(CONFIG.pairs):
    pair = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked))
    for block in (pair.first, pair.second):
      square_BT1 = jnp.square(x_BTD).mean(axis=-1, keepdims=True)
      normed_BTD = x_BTD / jnp.sqrt(square_BT1 + 1e-5)
      weight_D = block.norm1.scale[...]
      x_BTD = x_BTD + block.mixer(weight_D[None, None] * normed_BTD)
  return model.norm(x_BTD) @ model.token_embedding[...].T


@jax.jit
def whole(params):
  return nnx.merge(make(CONFIG)[0], params)(TOKENS_BT)


def test_the_block_is_one_norm_and_one_mixer() -> None:
  params = make(CONFIG)[1]
  wanted_BTV = jax.device_get(jax.jit(layer_by_layer)(params))
  np.testing.assert_allclose(whole(params), wanted_BTV, **CLOSE)
  assert wanted_BTV.std() > 0.1  # the comparison is of something


def test_the_residual_is_float32() -> None:
  config = dataclasses.replace(CONFIG, dtype="bfloat16", pairs=1)
  graph, params = make(config)
  # 4096 has a bfloat16 step of 32.
  large_BTD = np.full((B, T, D), 4096.0, np.float32)

  @jax.jit
  def block(params):
    pair = blocks.unstack(nnx.merge(graph, params).pairs, 0)
    return pair.first(Stream(large_BTD)).whole()

  y_BTD = jax.device_get(block(params))
  change = np.abs(y_BTD - large_BTD)
  assert y_BTD.dtype == np.float32
  assert 0 < change.max() < 16


def test_prefill_and_steps_equal_the_whole() -> None:
  graph, params = make(CONFIG)
  model = nnx.merge(graph, params)
  wanted_BTV = jax.device_get(whole(params))
  prefill = jax.jit(lambda p, x, s: nnx.merge(graph, p).prefill(x, s))
  step = jax.jit(lambda p, x, s: nnx.merge(graph, p).step(x, s))
  half = T // 2
  found_BV, state = prefill(params, TOKENS_BT[:, :half], model.init_state(B))
  np.testing.assert_allclose(found_BV, wanted_BTV[:, half - 1], **CLOSE)
  for t in range(half, T):
    found_BV, state = step(params, TOKENS_BT[:, t], state)
    np.testing.assert_allclose(found_BV, wanted_BTV[:, t], **CLOSE)
  held = sum(x.nbytes for x in jax.tree.leaves(state)) / B
  assert model.state_size(T) == held
  positions_BM = np.array([[4, 1], [9, 9]], np.int32)
  found_BMV = jax.jit(
    lambda p: nnx.merge(graph, p)(TOKENS_BT, positions_to_predict=positions_BM)
  )(params)
  wanted_BMV = wanted_BTV[np.arange(B)[:, None], positions_BM]
  np.testing.assert_allclose(found_BMV, wanted_BMV, **CLOSE)


def test_a_mesh_gives_what_one_device_gives() -> None:
  graph, params = make(dataclasses.replace(CONFIG, pairs=1))

  def loss(params, **kwargs):
    logits_BTV = nnx.merge(graph, params)(TOKENS_BT, **kwargs)
    return jnp.square(logits_BTV).sum(), logits_BTV

  wanted = jax.jit(jax.grad(loss, has_aux=True))(params)
  axes = ShardAxes(batch="data", heads="model")
  mesh = jax.make_mesh(
    (2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    call = functools.partial(loss, axes=axes)
    found = jax.jit(jax.grad(call, has_aux=True))(params)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    # Relative to each array's norm: a gradient sums over all the positions.
    x, y = jax.device_get((x, y))
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_a_mixer_without_weights_between_tokens_says_so() -> None:
  model = nnx.merge(*make(CONFIG))
  assert not model.has_attention_matrix
  with pytest.raises(NotImplementedError, match="Mamba has no attention"):
    model.attention_matrix(TOKENS_BT)


@pytest.mark.parametrize(
  ("field", "value"), [("block", "post-norm"), ("mlp_width", 4)]
)
def test_a_wrong_field_is_named(field, value) -> None:
  with pytest.raises(ValueError, match=rf"ModelConfig\.{field}="):
    dataclasses.replace(CONFIG, **{field: value})


def test_other_mixers_fit_in_the_block() -> None:
  config = dataclasses.replace(CONFIG, first=BaseConvConfig())
  names = {
    name.removeprefix("pairs/first/")
    for name in shapes(config)
    if name.startswith("pairs/first/")
  }
  assert names == {
    "norm1/scale",
    "mixer/kernel",
    "mixer/bias",
    "mixer/gate/kernel",
    "mixer/gate/bias",
  }
