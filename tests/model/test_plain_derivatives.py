"""Test forward mode and second derivatives through whole models."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cross_entropy, layer_norm, plain_derivatives
from rebased_jax import (
  LM,
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  ModelConfig,
  ReBasedConfig,
  RWKVConfig,
)

V, T = 8, 5
MODELS = {
  "pre-norm": dict(
    first=BaseConvConfig(),
    # Its similarity is above 0. That of ReBased comes near to 0, where the
    # gradient changes too fast for a difference quotient.
    second=BasedConfig(heads=2, features=2),
    mlp_width=8,
  ),
  "rebased": dict(
    first=RWKVConfig(), second=ReBasedConfig(heads=2, features=2)
  ),
  "hyena": dict(first=AttentionConfig(heads=2), second=HyenaConfig(length=T)),
  "mamba": dict(first=MambaConfig(), second=MambaConfig(), block="mamba"),
}


def _cosines(x: jax.Array) -> jax.Array:
  return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


def _inner(x, y) -> jax.Array:
  return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), x, y)))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_forward_mode(name: str) -> None:
  """The loss has the slope grad·v along v; it has second derivatives too."""
  config = ModelConfig(vocab_size=V, width=8, **MODELS[name])
  graph, params = nnx.split(LM(config, rngs=nnx.Rngs(0)))
  tokens_BT = np.random.default_rng(1).integers(V, size=(2, T))

  def loss(params):
    model = nnx.merge(graph, params)
    x_BTD = model.features(tokens_BT)
    table = model.token_embedding[...]
    return cross_entropy(x_BTD, table, tokens_BT, parts=5)[0]

  v = jax.tree.map(_cosines, params)
  with plain_derivatives():
    if name == "pre-norm":
      both = lambda params: (_inner(jax.grad(loss)(params), v), loss(params))
      run = jax.jit(lambda v: jax.jvp(both, (params,), (v,))[1])
      curvature, slope = run(v)
    else:
      slope = jax.jit(lambda v: jax.jvp(loss, (params,), (v,))[1])(v)
  slopes = jax.jit(
    lambda s: _inner(
      jax.grad(loss)(jax.tree.map(lambda x, dx: x + s * dx, params, v)), v
    )
  )
  # Sums of hundreds of terms of either sign, in float32.
  np.testing.assert_allclose(slope, slopes(0.0), rtol=1e-3)
  if name == "pre-norm":
    difference = (slopes(1e-3) - slopes(-1e-3)) / 2e-3
    # It is off by the square of the distance, and by rounding over it.
    np.testing.assert_allclose(curvature, difference, rtol=1e-2)


def test_without_it_forward_mode_is_refused() -> None:
  x = jnp.ones((2, 4))
  to_half = lambda x: layer_norm(x, dtype="bfloat16")
  with plain_derivatives():
    jax.jvp(layer_norm, (x,), (x,))
    y, dy = jax.eval_shape(lambda x: jax.jvp(to_half, (x,), (x,)), x)
  assert y.dtype == dy.dtype == jnp.bfloat16
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(layer_norm, (x,), (x,))
