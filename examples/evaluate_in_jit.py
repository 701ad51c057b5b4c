"""Evaluate a model in one jitted loop over batches."""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig

config = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=4),
  vocab_size=128,
  width=32,
)
# For a trained model: model = rebased_jax.load("runs/NAME")
model = LM(config, rngs=nnx.Rngs(0))
graph, params = nnx.split(model)


@jax.jit
def perplexity(params, tokens_NBW):
  """Perplexity of N batches of B rows; W is one longer than the inputs."""

  def batch(total, tokens_BW):
    model = nnx.merge(graph, params)
    logits_BTV = model(tokens_BW[:, :-1])
    xent = optax.softmax_cross_entropy_with_integer_labels
    losses_BT = xent(logits_BTV, tokens_BW[:, 1:])
    return total + losses_BT.mean(), None

  total, _ = jax.lax.scan(batch, jnp.zeros(()), tokens_NBW)
  return jnp.exp(total / len(tokens_NBW))


tokens_NBW = jax.random.randint(jax.random.key(0), (4, 8, 65), 0, 128)
found = perplexity(params, tokens_NBW)
print(f"perplexity of an untrained model: {found:.1f}, vocabulary: 128")
assert 100 < found < 180
