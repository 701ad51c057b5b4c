"""Evaluate texts of any length: pieces carry the state, and memory is flat."""

import math

from flax import nnx
import numpy as np

from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig
from rebased_jax.evaluate import loglikelihood

config = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=4),
  vocab_size=128,
  width=32,
)
# For a trained model: model = rebased_jax.load("runs/NAME")
model = LM(config, rngs=nnx.Rngs(0))
random = np.random.default_rng(0)
texts = [random.integers(0, 128, length) for length in (5_000, 300, 7)]

found = loglikelihood(model, texts, rows=1, piece=512)
for text, each in zip(texts, found, strict=True):
  perplexity = math.exp(-each.total / each.tokens)
  print(f"{len(text)} tokens: perplexity {perplexity:.1f}")
  assert 100 < perplexity < 180 or len(text) < 10

# The loss of pieces is that of the whole, where the whole fits memory.
(whole,) = loglikelihood(model, texts[:1], rows=1, piece=5_000)
assert math.isclose(whole.total, found[0].total, rel_tol=1e-6)

# The log-likelihood of a continuation: the first 290 tokens are its context.
(continuation,) = loglikelihood(model, texts[1:2], starts=[290], rows=1)
print(f"{continuation.tokens} tokens after 290: {continuation.total:.2f}")
