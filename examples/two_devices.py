"""Train on two devices, in a loop of your own: each has half of every batch.

On a machine with a CPU only, jax makes two devices of it.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig

STEPS = 20


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 2)  # before jax makes its devices
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  config = ModelConfig(
    first=BaseConvConfig(),
    second=ReBasedConfig(heads=4),
    vocab_size=256,
    width=64,
  )
  rows = np.random.default_rng(0).integers(0, 256, (8, 65), np.int32)

  @nnx.jit
  def step(model: LM, optimizer: nnx.Optimizer, tokens_BT: jax.Array):
    def loss_fn(model: LM):
      xent = optax.softmax_cross_entropy_with_integer_labels
      return xent(model(tokens_BT[:, :-1]), tokens_BT[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss

  with jax.set_mesh(mesh):
    # Every device has all parameters, and jax sums the gradients over devices.
    model = LM(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    tokens_BT = jax.device_put(rows, PartitionSpec("data"))
    losses = [step(model, optimizer, tokens_BT) for _ in range(STEPS)]
  print("each device has", [x.data.shape for x in tokens_BT.addressable_shards])
  print("loss", *(f"{x:.3f}" for x in jnp.stack(losses)[:: STEPS - 1]))


if __name__ == "__main__":
  main()
