"""Language models whose parameters have moved, for tests."""

import functools

from flax import nnx
import jax

from rebased_jax import LM, ModelConfig


@functools.cache
def make(config: ModelConfig):
  """(graph, params); the parameters moved from 0, 1 and N(0, 0.02²)."""
  graph, params = nnx.split(LM(config, rngs=nnx.Rngs(0)))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = [
    p + 0.3 * jax.random.normal(k, p.shape)
    for k, p in zip(keys, leaves, strict=True)
  ]
  return graph, jax.tree.unflatten(tree, moved)
