from flax import nnx
import jax
import optax

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig, generate

config = ModelConfig(BaseConvConfig(), ReBasedConfig(heads=4), 256, width=64)
model = LM(config, rngs=nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(0), (8, 65), 0, 256)
xent = optax.softmax_cross_entropy_with_integer_labels
loss = lambda model: xent(model(tokens[:, :-1]), tokens[:, 1:]).mean()
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
step = nnx.jit(lambda model, opt: opt.update(model, nnx.grad(loss)(model)))
for _ in range(20):
  step(model, optimizer)
print("loss", loss(model), "next tokens", generate(model, tokens[:1], steps=5))
