"""Use ReBased as a layer of your own Flax NNX model: a sequence classifier."""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from rebased_jax import ReBased, ReBasedConfig


class Classifier(nnx.Module):
  """Embedding, residual ReBased layers, and a mean over time."""

  def __init__(self, vocab: int, width: int, classes: int, *, rngs: nnx.Rngs):
    self.embed = nnx.Embed(vocab, width, rngs=rngs)
    config = ReBasedConfig(heads=4, features=8)
    self.layers = nnx.List(ReBased(width, config, rngs=rngs) for _ in range(2))
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = self.embed(tokens_BT)
    for layer in self.layers:
      x_BTD = x_BTD + layer(x_BTD)
    return self.head(x_BTD.mean(axis=1))


def loss_fn(model, tokens_BT, labels_B):
  xent = optax.softmax_cross_entropy_with_integer_labels
  return xent(model(tokens_BT), labels_B).mean()


@nnx.jit
def train_step(model, optimizer, tokens_BT, labels_B):
  loss, grads = nnx.value_and_grad(loss_fn)(model, tokens_BT, labels_B)
  optimizer.update(model, grads)
  return loss


# Does token 0 occur in the row?
tokens_BT = jax.random.randint(jax.random.key(0), (64, 32), 0, 48)
labels_B = jnp.any(tokens_BT == 0, axis=1).astype(jnp.int32)

model = Classifier(48, 32, 2, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for step in range(60):
  loss = train_step(model, optimizer, tokens_BT, labels_B)
  if step % 20 == 0:
    print(f"step {step}: loss {loss:.3f}")
loss = loss_fn(model, tokens_BT, labels_B)
print(f"last loss: {loss:.3f}")
assert loss < 0.5
