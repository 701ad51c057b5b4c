"""Text from a model: one prefill, then one step a token."""

import functools

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from rebased_jax import model as model_lib
from rebased_jax.model import LM


def generate(
  model: LM,
  prompt: Array,
  *,
  steps: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  key: Array | None = None,
) -> Array:
  """`steps` tokens behind each prompt, (B, steps) int32.

  Args:
    model: the language model.
    prompt: integers (B, T), T ≥ 1.
    steps: how many tokens, ≥ 1.
    temperature: 0 takes the likeliest token; above, samples from
      softmax(logits / temperature).
    top_k: sample from the k likeliest tokens alone.
    key: a PRNG key; needed for temperature > 0.

  Raises:
    ValueError: an argument does not fit, or T + steps − 1 tokens do not fit in
      the position table.
  """
  V = model.config.vocab_size
  if prompt.ndim != 2 or prompt.shape[1] < 1:
    raise ValueError(f"prompt has shape {prompt.shape}: expected (B, T), T ≥ 1")
  if not isinstance(steps, int) or steps < 1:
    raise ValueError(f"steps={steps}: expected an integer ≥ 1")
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"temperature={temperature}: expected a number ≥ 0")
  if 0 < temperature < 1e-30:
    raise ValueError(f"temperature={temperature}: expected 0, or above 1e-30")
  if temperature > 0 and key is None:
    raise ValueError("temperature > 0 samples: expected a PRNG key in `key`")
  if top_k is not None and not 1 <= top_k <= V:
    raise ValueError(f"top_k={top_k}: expected None or 1 to {V}")
  if temperature == 0 and top_k is not None:
    raise ValueError(f"top_k={top_k} samples: expected temperature > 0")
  model_lib.check_length(model.config, prompt.shape[1] + steps - 1)
  graph, params = nnx.split(model)
  key = jax.random.key(0) if key is None else key
  return _generate(graph, steps, top_k, temperature > 0)(
    params, prompt, jnp.float32(temperature), key
  )


@functools.lru_cache(maxsize=32)
def _generate(graph, steps: int, top_k: int | None, sample: bool):
  """The compiled loop; one for each model, length and way of sampling."""

  def choose(logits_BV, temperature, key):
    if not sample:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k is not None:
      least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV / temperature).astype(
      jnp.int32
    )

  @jax.jit
  def run(params, prompt_BT, temperature, key):
    model = nnx.merge(graph, params)
    state = model.init_state(prompt_BT.shape[0])
    logits_BV, state = model.prefill(prompt_BT, state)
    keys = jax.random.split(key, steps)
    first_B = choose(logits_BV, temperature, keys[0])

    def body(carry, key):
      token_B, state = carry
      logits_BV, state = nnx.merge(graph, params).step(token_B, state)
      token_B = choose(logits_BV, temperature, key)
      return (token_B, state), token_B

    _, rest = jax.lax.scan(body, (first_B, state), keys[1:])
    return jnp.concatenate([first_B[None], rest]).T

  return run
