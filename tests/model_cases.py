"""Language models whose parameters have moved, for tests."""

import functools

from flax import nnx
import jax
from mixer_subject import compiled

from rebased_jax import LM, ModelConfig


@functools.cache
def make(config: ModelConfig):
  """(graph, params); the parameters moved from 0, 1 and N(0, 0.02²)."""
  fresh = lambda: LM(config, rngs=nnx.Rngs(0))
  graph, _ = nnx.split(nnx.eval_shape(fresh))

  @compiled
  def moved():
    leaves, tree = jax.tree.flatten(nnx.split(fresh())[1])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
      tree,
      [
        p + 0.3 * jax.random.normal(k, p.shape)
        for k, p in zip(keys, leaves, strict=True)
      ],
    )

  return graph, moved()
