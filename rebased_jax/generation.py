"""Generate tokens: prefill the prompt, then take one step a token.

Prompts of every length share a few compiled programs. A prompt is read in parts
whose lengths are powers of two, the longest first: 13 tokens as 8, 4 and 1. The
loop over new tokens runs `steps` times in a program with room for the next
power of two.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from pallas_kernels.arguments import check_integers, plain_scalar
from pallas_kernels.compile_once import keep_programs
from pallas_kernels.explicit_mesh import explicit_axes, layout
from pallas_kernels.sharding import Axis
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.decoding import LMState
from rebased_jax.integers import to_int32
from rebased_jax.model import LM
from rebased_jax.model_config import check_length

#: Smaller temperatures would overflow logits / temperature in float32.
_LEAST_TEMPERATURE = 1e-30
#: Compiled loops have room for at least so many new tokens.
_FEWEST_SLOTS = 16
#: The token that is chosen where no logit is the largest: with a NaN or an Inf.
_NO_TOKEN = -1


class _Choice(NamedTuple):
  """How a token is chosen; part of a compiled program."""

  sample: bool  # otherwise the likeliest token
  top_k: int | None


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

  For each model config and B it compiles a program for each power of two up to
  T, and one for each power of two of `steps`, each `top_k`, and the choice
  between greedy and sampled tokens. Programs of the last 32 such cases are
  kept.

  Inside `jax.jit` and other transformations values are not known. There, a
  prompt token outside the vocabulary is not refused. A token whose logits are
  not finite, and the tokens after it, are −1.

  Args:
    model: the language model.
    prompt: integers (B, T), T ≥ 1, each in [0, V).
    steps: number of tokens, ≥ 1.
    temperature: 0 takes the likeliest token. Above 0, tokens are sampled from
      softmax(logits / temperature).
    top_k: sample from the k likeliest tokens alone. None: from all tokens.
    key: a PRNG key, which `temperature` > 0 needs. None: no sampling.

  Raises:
    ValueError: an argument does not fit, the position table has fewer than
      T + steps − 1 rows, or the model's logits are not finite.
  """
  steps, temperature, top_k = map(plain_scalar, (steps, temperature, top_k))
  _check_arguments(model, prompt, steps, temperature, top_k, key)
  prompt_BT = to_int32(prompt)
  rows = _rows_sharding(prompt_BT)
  split = layout(prompt_BT)[0] if explicit_axes() else None
  if _has_values(prompt_BT):
    # NumPy cuts it into parts without a compiled program for each length.
    prompt_BT = jax.device_get(prompt_BT)
    _check_vocabulary(prompt_BT, model.config.vocab_size)
  B, T = prompt_BT.shape
  graph, params = nnx.split(model)
  reader = _reader(graph, B)
  state = reader.start(params)
  logits_BV = None
  for start, stop in _parts(T):
    part_BT = jax.device_put(prompt_BT[:, start:stop], rows)
    logits_BV, state = reader.read(params, part_BT, state)
  choice = _Choice(temperature > 0, top_k)
  slots = max(_FEWEST_SLOTS, _power_of_two(steps))
  write = _writer(graph, B, slots, choice, split)
  tokens_BS = write(
    params,
    logits_BV,
    state,
    jax.device_put(np.int32(steps)),
    jax.device_put(np.float32(temperature)),
    key if choice.sample else None,
  )
  tokens_BS = jax.lax.slice_in_dim(tokens_BS, 0, steps, axis=1)
  _check_tokens(tokens_BS)
  return tokens_BS


def stream(
  model: LM,
  prompts: Sequence[Array],
  *,
  steps: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  keys: Array | None = None,
  block: int = 16,
) -> Iterator[np.ndarray]:
  """Yield the tokens after prompts of any lengths, some at a time.

  Each prompt is read alone, and all are continued together. The tokens of a
  prompt depend on its own key alone, whatever the other prompts are. Stop to
  ask for more when all texts have ended.

  Args:
    model: the language model.
    prompts: integers (T,) each, T ≥ 1, each in [0, V).
    steps: the largest number of tokens after each prompt, ≥ 1.
    temperature: as in `generate`.
    top_k: as in `generate`.
    keys: PRNG keys (B,), which `temperature` > 0 needs. None: no sampling.
    block: how many tokens are yielded at a time.

  Yields:
    int32 (B, block), and fewer columns at the end.

  Raises:
    ValueError: an argument does not fit, the position table is too short, or
      the model's logits are not finite.
  """
  if not is_positive_integer(block):
    raise ValueError(f"block={block!r}: expected an integer ≥ 1")
  prompts = [np.asarray(jax.device_get(prompt))[None] for prompt in prompts]
  for prompt_1T in prompts:
    _check_arguments(model, prompt_1T, steps, temperature, top_k, keys)
    _check_vocabulary(prompt_1T, model.config.vocab_size)
  graph, params = nnx.split(model)
  reader, read = _reader(graph, 1), []
  for prompt_1T in prompts:
    prompt_1T, state, logits_1V = (
      to_int32(prompt_1T),
      reader.start(params),
      None,
    )
    for start, stop in _parts(prompt_1T.shape[1]):
      part_1T = prompt_1T[:, start:stop]
      logits_1V, state = reader.read(params, part_1T, state)
    read.append((logits_1V, state))
  write = _block_writer(graph, block, _Choice(temperature > 0, top_k))
  logits_BV, state = _join_rows(*read)
  for first in range(0, steps, block):
    tokens_BS, logits_BV, state = write(
      params, logits_BV, state, np.float32(temperature), keys, np.int32(first)
    )
    tokens_BS = jax.device_get(tokens_BS)[:, : steps - first]
    _check_tokens(tokens_BS)
    yield tokens_BS


def _check_arguments(
  model: LM,
  prompt: Array,
  steps: int,
  temperature: float,
  top_k: int | None,
  key: Array | None,
) -> None:
  V = model.config.vocab_size
  check_integers("prompt", prompt)
  if prompt.ndim != 2 or 0 in prompt.shape:
    raise ValueError(
      f"prompt has shape {prompt.shape}: expected (B, T), B ≥ 1 and T ≥ 1"
    )
  if not is_positive_integer(steps):
    raise ValueError(f"steps={steps!r}: expected an integer ≥ 1")
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
  if top_k is not None and not (is_positive_integer(top_k) and top_k <= V):
    raise ValueError(f"top_k={top_k!r}: expected None or 1 to {V}")
  if temperature == 0 and top_k is not None:
    raise ValueError(
      f"top_k={top_k} samples: expected temperature > 0, or top_k=None"
    )
  check_length(model.config, prompt.shape[1] + steps - 1)


def _check_vocabulary(prompt_BT: np.ndarray, size: int) -> None:
  """Raise ValueError for a token outside the vocabulary."""
  wrong = np.argwhere((prompt_BT < 0) | (prompt_BT >= size))
  if wrong.size:
    row, place = wrong[0]
    raise ValueError(
      f"prompt[{row}, {place}] is the token {prompt_BT[row, place]}: expected "
      f"one of the vocabulary, 0 to {size - 1}"
    )


def _check_tokens(tokens_BS: Array) -> None:
  """Raise ValueError where logits were not finite, if values are known."""
  if not _has_values(tokens_BS):
    return
  wrong = np.argwhere(jax.device_get(tokens_BS) == _NO_TOKEN)
  if wrong.size:
    row, step = wrong[0]
    raise ValueError(
      f"the logits of new token {step} after prompt {row} are not finite, so "
      "that no token is the likeliest: look for NaN or Inf in the model's "
      "parameters, and for values past the range of its compute dtype"
    )


def _rows_sharding(prompt_BT: Array) -> jax.sharding.Sharding | None:
  """Return how a prompt lies on a mesh; None if it is on none."""
  if isinstance(prompt_BT, np.ndarray | jax.core.Tracer):
    return None
  sharding = prompt_BT.sharding
  return sharding if isinstance(sharding, NamedSharding) else None


def _has_values(x: Array) -> bool:
  """Whether this process can read all values of x now."""
  if isinstance(x, jax.core.Tracer):
    return False
  return isinstance(x, np.ndarray) or x.is_fully_addressable


def _parts(length: int) -> list[tuple[int, int]]:
  """Return (start, stop) of parts with lengths of powers of two."""
  sizes = [1 << bit for bit in reversed(range(length.bit_length()))]
  stops = [length & -size for size in sizes if length & size]
  return list(zip([0, *stops], stops, strict=False))


def _power_of_two(least: int) -> int:
  """Return the smallest power of two that is at least `least`."""
  return 1 << (least - 1).bit_length()


class _Reader(NamedTuple):
  """The compiled programs that read a prompt."""

  start: Callable[[nnx.State], LMState]
  read: Callable[[nnx.State, Array, LMState], tuple[Array, LMState]]


def _choose(
  choice: _Choice,
  logits_BV: Array,
  temperature: Array,
  draw: Callable[[Array], Array],
) -> Array:
  """Return a token for each row, int32 (B,).

  Args:
    choice: how tokens are chosen.
    logits_BV: the logits.
    temperature: a scalar.
    draw: samples tokens (B,) from logits (B, V).
  """
  is_finite_B = jnp.isfinite(logits_BV.max(axis=-1))
  if choice.top_k is not None:
    least_B1 = jax.lax.top_k(logits_BV, choice.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  if choice.sample:
    tokens_B = draw(logits_BV / temperature)
  else:
    tokens_B = jnp.argmax(logits_BV, axis=-1)
  return jnp.where(is_finite_B, tokens_B.astype(jnp.int32), _NO_TOKEN)


@jax.jit
def _join_rows(*rows: tuple[Array, LMState]) -> tuple[Array, LMState]:
  """Return logits (B, V) and the state of B rows, from those of each row."""
  logits, states = zip(*rows, strict=True)
  pairs = jax.tree.map(
    lambda *x_N1: jnp.concatenate(x_N1, axis=1), *(x.pairs for x in states)
  )
  position_B = jnp.concatenate([x.position_B for x in states])
  return jnp.concatenate(logits), LMState(position_B, pairs)


# The number of rows is part of the key, so that dropping the programs of the
# oldest case bounds the memory of all programs.
@keep_programs(most=32)
def _reader(graph: nnx.GraphDef, rows: int) -> _Reader:
  """Return the programs that read prompts of so many rows."""

  @jax.jit
  def start(params: nnx.State) -> LMState:
    return nnx.merge(graph, params).init_state(rows)

  @jax.jit
  def read(
    params: nnx.State, part_BT: Array, state: LMState
  ) -> tuple[Array, LMState]:
    return nnx.merge(graph, params).prefill(part_BT, state)

  return _Reader(start, read)


@keep_programs(most=32)
def _writer(
  graph: nnx.GraphDef, rows: int, slots: int, choice: _Choice, split: Axis
) -> Callable[..., Array]:
  """Return the program that adds tokens (B, slots) to so many rows.

  Under a mesh with Explicit axes the rows are split over the axes `split`.

  Its arguments are the parameters, the logits (B, V) and the state after the
  prompt, the number of tokens to fill in, the temperature, and the PRNG key or
  None. The first tokens are the same for every number of slots.
  """

  def choose(logits_BV: Array, temperature: Array, key: Array | None) -> Array:
    draw = functools.partial(jax.random.categorical, key)
    return _choose(choice, logits_BV, temperature, draw)

  def write(
    params: nnx.State,
    logits_BV: Array,
    state: LMState,
    steps: Array,
    temperature: Array,
    key: Array | None,
  ) -> Array:
    keys = None if key is None else jax.random.split(key, slots)
    key_of = lambda s: None if keys is None else keys[s]
    first_B = choose(logits_BV, temperature, key_of(0))
    tokens_SB = jnp.full((slots, rows), _NO_TOKEN, jnp.int32).at[0].set(first_B)

    def body(s: Array, carry: tuple[Array, LMState]) -> tuple[Array, LMState]:
      tokens_SB, state = carry
      logits_BV, state = nnx.merge(graph, params).step(tokens_SB[s - 1], state)
      token_B = choose(logits_BV, temperature, key_of(s))
      return tokens_SB.at[s].set(token_B), state

    return jax.lax.fori_loop(1, steps, body, (tokens_SB, state))[0].T

  if explicit_axes():
    write = jax.sharding.auto_axes(write, out_sharding=PartitionSpec(split))
  return jax.jit(write)


@keep_programs(most=32)
def _block_writer(
  graph: nnx.GraphDef, block: int, choice: _Choice
) -> Callable[..., tuple[Array, Array, LMState]]:
  """Return the program that adds `block` tokens to rows.

  Its arguments are the parameters, the logits (B, V) and the state before the
  next token, the temperature, the keys (B,) or None, and the number of tokens
  that were added before. It returns tokens (B, block), logits and state.
  """

  @functools.partial(jax.jit, donate_argnums=2)
  def write(
    params: nnx.State,
    logits_BV: Array,
    state: LMState,
    temperature: Array,
    keys_B: Array | None,
    first: Array,
  ) -> tuple[Array, Array, LMState]:
    def body(
      carry: tuple[Array, LMState], s: Array
    ) -> tuple[tuple[Array, LMState], Array]:
      logits_BV, state = carry

      def draw(logits_BV: Array) -> Array:
        key_B = jax.vmap(lambda key: jax.random.fold_in(key, s))(keys_B)
        return jax.vmap(jax.random.categorical)(key_B, logits_BV)

      token_B = _choose(choice, logits_BV, temperature, draw)
      # A token that could not be chosen is outside the vocabulary.
      return nnx.merge(graph, params).step(token_B, state), token_B

    steps = first + jnp.arange(block, dtype=jnp.int32)
    (logits_BV, state), tokens_SB = jax.lax.scan(
      body, (logits_BV, state), steps
    )
    return tokens_SB.T, logits_BV, state

  return write
