"""Read documents once, answer from any of them, and forget one on request."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig, memory

# A document says of two names, tokens 0 to 31, what they like: 32 to 63.
NAMES, V, FACTS = 32, 64, 2
config = ModelConfig(
  BaseConvConfig(), ReBasedConfig(heads=4), vocab_size=V, width=64
)
model = LM(config, rngs=nnx.Rngs(0))
random = np.random.default_rng(0)


def make_facts(count):
  """Return facts (count, 2) of different names: a name, and what it likes."""
  names = random.permutation(NAMES)[:count]
  return np.stack([names, random.integers(NAMES, V, count)], axis=-1)


@nnx.jit
def train_step(model, optimizer, tokens_BT, likes_BM):
  def loss_fn(model):
    xent = optax.softmax_cross_entropy_with_integer_labels
    return xent(model(tokens_BT)[:, -likes_BM.shape[1] :], likes_BM).mean()

  optimizer.update(model, nnx.grad(loss_fn)(model))


# Rows of four documents, then all of their names as questions.
optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
for _ in range(300):
  facts_BM2 = np.stack([make_facts(4 * FACTS) for _ in range(64)])
  asked_BM2 = random.permutation(facts_BM2, axis=1)
  rows = facts_BM2.reshape(64, -1), asked_BM2[:, :, 0]
  tokens_BT = jnp.asarray(np.concatenate(rows, axis=1))
  train_step(model, optimizer, tokens_BT, jnp.asarray(asked_BM2[:, :, 1]))

documents = make_facts(6 * FACTS).reshape(6, 2 * FACTS)
states = memory.read(model, documents)


def known(state):
  """Return which documents' facts the model tells from a state."""
  ask = lambda name: model.prefill(jnp.array([[name]]), state)[0].argmax()
  tells = lambda document: all(ask(x) == y for x, y in document.reshape(-1, 2))
  return [i for i, document in enumerate(documents) if tells(document)]


some = memory.merge(model, [states[i] for i in (1, 3, 4)])
print("of documents 1, 3 and 4 the model knows", known(some))
assert known(some) == [1, 3, 4]
some = memory.forget(model, some, states[3])
print("after it forgot document 3:", known(some))
assert known(some) == [1, 4]
