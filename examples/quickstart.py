from flax import nnx
import jax
import optax

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig, generate

config = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=4),
  vocab_size=256,
  width=64,
)
model = LM(config, rngs=nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(0), (8, 65), 0, 256)


def loss_fn(model):
  xent = optax.softmax_cross_entropy_with_integer_labels
  return xent(model(tokens[:, :-1]), tokens[:, 1:]).mean()


@nnx.jit
def step(model, optimizer):
  optimizer.update(model, nnx.grad(loss_fn)(model))


optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for _ in range(20):
  step(model, optimizer)
print("loss", loss_fn(model))
print("next tokens", generate(model, tokens[:1], steps=5))
