"""Language models for tests, with parameters away from initial values."""

import functools

from flax import nnx
from mixer_subject import moved, split

from rebased_jax import LM, ModelConfig


@functools.cache
def make(config: ModelConfig):
  """Return (graph, params), the parameters moved from 0, 1, N(0, 0.02²)."""
  return split(
    lambda: LM(config, rngs=nnx.Rngs(0)),
    lambda params: moved(params, seed=2, by=0.3),
  )
