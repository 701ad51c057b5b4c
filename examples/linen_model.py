"""Use ReBased in Flax Linen: in your own module, and as a whole model."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from rebased_jax import (
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  linen as rebased_linen,
)


class Block(nn.Module):
  """A pre-norm residual block around a ReBased mixer."""

  width: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    mixer = rebased_linen.mixer(ReBasedConfig(heads=4), self.width)
    return x_BTD + mixer(nn.LayerNorm()(x_BTD))


x_BTD = jax.random.normal(jax.random.key(0), (2, 16, 32))
block = Block(width=32)
variables = block.init(jax.random.key(1), x_BTD)
y_BTD = jax.jit(block.apply)(variables, x_BTD)
print("block:", y_BTD.shape)

config = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=4),
  vocab_size=64,
  width=32,
)
lm = rebased_linen.lm(config)
tokens_BT = jnp.zeros((2, 16), jnp.int32)
params = lm.init(jax.random.key(2), tokens_BT)["params"]
logits_BTV = jax.jit(lm.apply)({"params": params}, tokens_BT)
print("language model:", logits_BTV.shape)
assert logits_BTV.shape == (2, 16, 64)

# Decode: read the row, then one more token from the state.
state = lm.apply({"params": params}, 2, method="init_state")
logits_BV, state = lm.apply(
  {"params": params}, tokens_BT, state, method="prefill"
)
next_B = logits_BV.argmax(axis=-1)
logits_BV, state = lm.apply({"params": params}, next_B, state, method="step")
print("next token:", logits_BV.shape)
