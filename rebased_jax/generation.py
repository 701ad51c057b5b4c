"""Generate tokens: one prefill of the prompt, then one step a token."""

from collections.abc import Callable
import functools
import math

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from rebased_jax.model import LM, check_length

#: Smaller temperatures would overflow logits / temperature in float32.
_LEAST_TEMPERATURE = 1e-30


def generate(
  model: LM,
  prompt: Array,
  *,
  steps: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  key: Array | None = None,
) -> Array:
  """Return `steps` tokens after each prompt, int32 (B, steps).

  It compiles once for each model config, prompt shape, `steps`, `top_k` and
  choice between greedy and sampled tokens.

  Args:
    model: the language model.
    prompt: integers (B, T), T ≥ 1.
    steps: number of tokens, ≥ 1.
    temperature: 0 takes the likeliest token. Above 0, tokens are sampled from
      softmax(logits / temperature).
    top_k: sample from the k likeliest tokens alone. None: from all tokens.
    key: a PRNG key, which `temperature` > 0 needs. None: no sampling.

  Raises:
    ValueError: an argument does not fit, or the position table has fewer than
      T + steps − 1 rows.
  """
  _check_arguments(model, prompt, steps, temperature, top_k, key)
  graph, params = nnx.split(model)
  if key is None:
    key = jax.random.key(0)  # greedy choice does not use it
  run = _compiled(graph, steps, top_k, temperature > 0)
  return run(params, prompt, jnp.float32(temperature), key)


def _check_arguments(
  model: LM,
  prompt: Array,
  steps: int,
  temperature: float,
  top_k: int | None,
  key: Array | None,
) -> None:
  V = model.config.vocab_size
  if prompt.ndim != 2 or prompt.shape[1] < 1:
    raise ValueError(f"prompt has shape {prompt.shape}: expected (B, T), T ≥ 1")
  if not isinstance(steps, int) or steps < 1:
    raise ValueError(f"steps={steps}: expected an integer ≥ 1")
  if not 0 <= temperature < math.inf:
    raise ValueError(f"temperature={temperature}: expected a number ≥ 0")
  if 0 < temperature < _LEAST_TEMPERATURE:
    raise ValueError(
      f"temperature={temperature}: expected 0, or at least {_LEAST_TEMPERATURE}"
    )
  if temperature > 0 and key is None:
    raise ValueError(
      f"temperature={temperature} samples tokens: expected a PRNG key in `key`"
    )
  if top_k is not None and not 1 <= top_k <= V:
    raise ValueError(f"top_k={top_k}: expected None or 1 to {V}")
  if temperature == 0 and top_k is not None:
    raise ValueError(
      f"top_k={top_k} samples: expected temperature > 0, or top_k=None"
    )
  check_length(model.config, prompt.shape[1] + steps - 1)


@functools.lru_cache(maxsize=32)
def _compiled(
  graph: nnx.GraphDef, steps: int, top_k: int | None, sample: bool
) -> Callable[..., Array]:
  """Return the compiled loop of a model, for one way to choose tokens."""

  def choose(logits_BV: Array, temperature: Array, key: Array) -> Array:
    if not sample:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k is not None:
      least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    tokens_B = jax.random.categorical(key, logits_BV / temperature)
    return tokens_B.astype(jnp.int32)

  @jax.jit
  def run(
    params: nnx.State, prompt_BT: Array, temperature: Array, key: Array
  ) -> Array:
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

    _, rest_SB = jax.lax.scan(body, (first_B, state), keys[1:])
    return jnp.concatenate([first_B[None], rest_SB]).T

  return run
