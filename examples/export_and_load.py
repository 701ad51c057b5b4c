"""Write a model as safetensors, and load it as an NNX and a Linen module."""

import json
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import optax
from safetensors import safe_open

import rebased_jax
from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig
import rebased_jax.linen

config = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=4, features=8),
  vocab_size=257,
  width=32,
)
model = LM(config, rngs=nnx.Rngs(0))
tokens_BT = jax.random.randint(jax.random.key(0), (4, 33), 0, 256)


@nnx.jit
def train_step(model, optimizer):
  def loss_fn(model):
    xent = optax.softmax_cross_entropy_with_integer_labels
    return xent(model(tokens_BT[:, :-1]), tokens_BT[:, 1:]).mean()

  optimizer.update(model, nnx.grad(loss_fn)(model))


optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for _ in range(5):
  train_step(model, optimizer)

# A new folder. Token 256 ends a document of bytes.
rebased_jax.save(model, "exported", tokenizer="bytes", eos=256)
print("files:", sorted(path.name for path in Path("exported").iterdir()))
stored = json.loads(Path("exported/config.json").read_text())
print("second mixer:", stored["model"]["second"])
with safe_open("exported/model.safetensors", "numpy") as file:
  for name in list(file.keys())[:4]:
    print(name, file.get_slice(name).get_shape())

# Any program can load it. The trainer is not imported.
loaded = rebased_jax.load("exported")
logits_BTV = loaded(tokens_BT)
assert jnp.array_equal(logits_BTV, model(tokens_BT))

lm, params = rebased_jax.linen.load("exported")
linen_BTV = jax.jit(lm.apply)({"params": params}, tokens_BT)
print("largest difference:", jnp.abs(linen_BTV - logits_BTV).max())
