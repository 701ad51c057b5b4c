"""Generate tokens: prefill the prompt, then take one step a token.

    logits_0, state = prefill(prompt)          in pieces, as `evaluate` reads
    token_s  ~ softmax(logits_s / temperature)  or the likeliest token
    logits_{s+1}, state = step(token_s, state)

Prompts of every length share a few compiled programs. A prompt is read in
pieces of `piece` tokens, so that its length takes no memory beside the state.
The rest is read in parts whose lengths are powers of two, the longest first: 13
tokens as 8, 4 and 1. The loop over new tokens runs in a program with room for
the next power of two.

Token s of a row is drawn with `fold_in(key_row, s)`. The samples of a row
therefore depend on its own key, and not on the other rows.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from pallas_kernels.arguments import check_integers, name_type, plain_scalar
from pallas_kernels.compile_once import keep_programs
from pallas_kernels.explicit_mesh import explicit_axes, layout
from pallas_kernels.sharding import Axis
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.decoding import LMState, enlarge_caches
from rebased_jax.integers import power_of_two, to_int32
from rebased_jax.model import LM
from rebased_jax.model_config import check_length

#: Smaller temperatures would overflow logits / temperature in float32.
_LEAST_TEMPERATURE = 1e-30
#: Compiled loops have room for at least so many new tokens.
_FEWEST_SLOTS = 16
#: The token that is chosen where no logit is the largest: with a NaN or an Inf.
_NO_TOKEN = -1

Prompts = Array | Sequence[Any]


class _Choice(NamedTuple):
  """How a token is chosen; part of a compiled program."""

  sample: bool  # otherwise the likeliest token
  top_k: int | None
  has_top_p: bool


class _Settings(NamedTuple):
  """The numbers that a token is chosen with; no new program for others."""

  temperature: Array
  top_p: Array
  stop_tokens_K: Array  # int32, empty if nothing stops a row
  key: Array | None  # one PRNG key, or one for each row


class _Request(NamedTuple):
  """The checked arguments of `generate` and `stream`."""

  prompts: list[Array]  # (B, T) alone, or (1, T) each
  steps: int
  choice: _Choice
  settings: _Settings
  piece: int


def generate(
  model: LM,
  prompt: Prompts,
  *,
  steps: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  key: Array | None = None,
  stop_tokens: Sequence[int] = (),
  state: LMState | None = None,
  piece: int = 1024,
) -> Array:
  """Return `steps` tokens after each prompt, int32 (B, steps).

  For each model config and B it compiles a program for each power of two up to
  `piece`, and one for each power of two of `steps`, each `top_k`, with and
  without `top_p`, and the choice between greedy and sampled tokens. Programs of
  the last 32 such cases are kept. A cache of attention is made as long as the
  text.

  The tokens of a row do not depend on the other rows, up to the rounding of
  logits: XLA may sum in another order where B differs.

  Inside `jax.jit` and other transformations values are not known. There, a
  prompt token outside the vocabulary is not refused. A token whose logits are
  not finite, and the tokens after it, are −1.

  Args:
    model: the language model.
    prompt: integers (B, T), T ≥ 1, each in [0, V). Or a list of B prompts of
      any lengths, integers (T,) each, which are read one after another.
    steps: number of tokens, ≥ 1.
    temperature: 0 takes the likeliest token. Above 0, tokens are sampled from
      softmax(logits / temperature).
    top_k: sample from the k likeliest tokens alone. None: from all tokens.
    top_p: sample from the fewest likeliest tokens that together have at least
      this probability, in (0, 1]. It is taken after `temperature` and `top_k`.
      None: from all tokens.
    key: a PRNG key, which `temperature` > 0 needs. Row b then has the key
      `fold_in(key, b)`. Or PRNG keys (B,), one for each row. None: no sampling.
    stop_tokens: tokens that end a row. The row has the token, which is repeated
      up to its end.
    state: the state after the tokens before the prompt, for example of
      `LM.prefill` or `rebased_jax.memory`. None: nothing comes before.
    piece: the most tokens of a prompt that are read at a time.

  Raises:
    ValueError: an argument does not fit, the position table or Hyena's filter
      has no room for T + steps − 1 tokens, or the model's logits are not
      finite.
  """
  options = dict(
    steps=steps,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    key=key,
    stop_tokens=stop_tokens,
    state=state,
    piece=piece,
  )
  if isinstance(prompt, list | tuple):
    blocks = list(stream(model, prompt, **options))
    tokens_BS = np.concatenate(blocks, axis=1)
    missing = int(plain_scalar(steps)) - tokens_BS.shape[1]
    return jnp.asarray(np.pad(tokens_BS, ((0, 0), (0, missing)), "edge"))
  request = _check(model, [prompt], **options)
  steps = request.steps
  (prompt_BT,) = request.prompts
  rows = _rows_sharding(prompt)
  split = layout(prompt)[0] if explicit_axes() else None
  graph, params = _split(model, request, state)
  logits_BV, state = _read(graph, params, prompt_BT, state, piece, rows)
  slots = max(_FEWEST_SLOTS, power_of_two(steps))
  write = _writer(graph, len(prompt_BT), slots, request.choice, split).whole
  tokens_BS = write(
    params, logits_BV, state, _put(np.int32(steps)), request.settings
  )
  tokens_BS = jax.lax.slice_in_dim(tokens_BS, 0, steps, axis=1)
  _check_tokens(tokens_BS)
  return tokens_BS


def stream(
  model: LM,
  prompts: Sequence[Any],
  *,
  steps: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  key: Array | None = None,
  stop_tokens: Sequence[int] = (),
  state: LMState | None = None,
  piece: int = 1024,
  block: int = 16,
) -> Iterator[np.ndarray]:
  """Yield the tokens after prompts of any lengths as they are made.

  Each prompt is read alone, and all are continued together. The tokens are
  those of `generate`. The iterator ends early when every row has a stop token.
  Stop to ask for more when all texts have ended for another reason. Arguments
  are checked when the first tokens are asked for.

  Args:
    model: the language model.
    prompts: integers (T,) each, T ≥ 1, each in [0, V).
    steps: the largest number of tokens after each prompt, ≥ 1.
    temperature: as in `generate`.
    top_k: as in `generate`.
    top_p: as in `generate`.
    key: as in `generate`.
    stop_tokens: as in `generate`.
    state: as in `generate`, with a row for each prompt.
    piece: as in `generate`.
    block: how many tokens are yielded at a time.

  Yields:
    int32 (B, 1) first, then (B, block), and fewer columns at the end.

  Raises:
    ValueError: an argument does not fit, the position table or Hyena's filter
      is too short, or the model's logits are not finite.
  """
  if not is_positive_integer(block):
    raise ValueError(f"block={block!r}: expected an integer ≥ 1")
  request = _check(
    model,
    [_one_row(i, prompt) for i, prompt in enumerate(prompts)],
    steps=steps,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    key=key,
    stop_tokens=stop_tokens,
    state=state,
    piece=piece,
  )
  graph, params = _split(model, request, state)
  read = []
  for row, prompt_1T in enumerate(request.prompts):
    own = None if state is None else _row(state, row)
    read.append(_read(graph, params, prompt_1T, own, piece, None))
  logits_BV, state = _join_rows(*read)
  writer = _writer(graph, len(read), block, request.choice, None)
  token_B, done_B = writer.first(logits_BV, request.settings)
  tokens_BS, written = jax.device_get(token_B)[:, None], 0
  while True:
    _check_tokens(tokens_BS, written)
    yield tokens_BS
    written += tokens_BS.shape[1]
    if written == request.steps or jax.device_get(done_B).all():
      return
    count = min(block, request.steps - written)
    at = _put(np.array([written, count], np.int32))
    tokens_BS, token_B, state, done_B = writer.more(
      params, token_B, state, done_B, at, request.settings
    )
    tokens_BS = jax.device_get(tokens_BS)[:, :count]


def _check(
  model: LM,
  prompts: list[Any],
  *,
  steps: int,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  key: Array | None,
  stop_tokens: Sequence[int],
  state: LMState | None,
  piece: int,
) -> _Request:
  """Return what is asked for; raise ValueError if an argument does not fit.

  `prompts` is one array (B, T), or an array (1, T) for each row. The other
  arguments are those of `generate`.
  """
  steps, temperature, top_k, top_p = map(
    plain_scalar, (steps, temperature, top_k, top_p)
  )
  if not prompts:
    raise ValueError("prompt is an empty list: expected at least one prompt")
  for prompt in prompts:
    check_integers("prompt", prompt)
    if prompt.ndim != 2 or 0 in prompt.shape:
      raise ValueError(
        f"prompt has shape {prompt.shape}: expected (B, T), B ≥ 1 and T ≥ 1"
      )
  for name, value in (("steps", steps), ("piece", piece)):
    if not is_positive_integer(value):
      raise ValueError(f"{name}={value!r}: expected an integer ≥ 1")
  rows = sum(prompt.shape[0] for prompt in prompts)
  choice = _check_sampling(model, temperature, top_k, top_p, key, rows)
  stops_K = _check_stop_tokens(model, stop_tokens)
  prompts = [
    _check_vocabulary(row, prompt, model.config.vocab_size)
    for row, prompt in enumerate(prompts)
  ]
  before = _tokens_before(state, rows)
  longest = max(prompt.shape[1] for prompt in prompts)
  # The last new token is predicted, but never read.
  _check_room(model, before + longest + steps - 1)
  settings = _Settings(
    _put(np.float32(temperature)),
    _put(np.float32(1 if top_p is None else top_p)),
    _put(stops_K),
    key if choice.sample else None,
  )
  return _Request(prompts, steps, choice, settings, piece)


def _check_sampling(
  model: LM,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  key: Array | None,
  rows: int,
) -> _Choice:
  """Return how tokens are chosen; ValueError if an option does not fit."""
  V = model.config.vocab_size
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
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(
      f"top_p={top_p!r}: expected None or a probability in (0, 1]"
    )
  for name, value in (("top_k", top_k), ("top_p", top_p)):
    if temperature == 0 and value is not None:
      raise ValueError(
        f"{name}={value} samples: expected temperature > 0, or {name}=None"
      )
  if temperature > 0:
    if not isinstance(key, Array | np.ndarray):
      raise ValueError(
        f"key is {name_type(key)}: expected a PRNG key, as jax.random.key(0)"
      )
    shape = _typed(key).shape
    if shape not in ((), (rows,)):
      raise ValueError(
        f"key holds PRNG keys of shape {shape}: expected one key, or "
        f"({rows},), one for each prompt"
      )
  return _Choice(temperature > 0, top_k, top_p is not None)


def _check_stop_tokens(model: LM, stop_tokens: Sequence[int]) -> np.ndarray:
  """Return stop tokens as int32 (K,); ValueError if one is no token."""
  stops_K = np.asarray(stop_tokens)
  V = model.config.vocab_size
  fits = stops_K.ndim == 1 and (
    stops_K.size == 0
    or (stops_K.dtype.kind in "iu" and 0 <= stops_K.min() <= stops_K.max() < V)
  )
  if not fits:
    raise ValueError(
      f"stop_tokens={stop_tokens!r}: expected tokens of the vocabulary, each 0 "
      f"to {V - 1}"
    )
  return stops_K.astype(np.int32)


def _check_vocabulary(row: int, prompt_BT: Array, size: int) -> Array:
  """Return a prompt as int32, in this process's memory if values are known.

  NumPy cuts it into parts without a compiled program for each length.

  Args:
    row: the number of its first row, for the message.
    prompt_BT: the prompt.
    size: V.

  Raises:
    ValueError: a token is outside the vocabulary.
  """
  if not _has_values(prompt_BT):
    return to_int32(prompt_BT)
  found_BT = jax.device_get(prompt_BT)
  tokens_BT = to_int32(found_BT)
  wrong = np.argwhere((tokens_BT < 0) | (tokens_BT >= size))
  if wrong.size:
    own_row, place = wrong[0]
    raise ValueError(
      f"prompt[{row + own_row}, {place}] is the token "
      f"{found_BT[own_row, place]}: expected one of the vocabulary, 0 to "
      f"{size - 1}"
    )
  return tokens_BT


def _check_room(model: LM, tokens: int) -> None:
  """Raise ValueError if the model cannot read so many tokens of a row."""
  check_length(model.config, tokens)
  for mixer in model.mixers:
    longest = mixer.longest_row
    if longest is not None and tokens > longest:
      raise ValueError(
        f"a row of {tokens} tokens, the prompt and all new tokens but the "
        f"last: {type(mixer).__name__} reads at most {longest}"
      )


def _tokens_before(state: LMState | None, rows: int) -> int:
  """Return the most tokens that a row of a state has read, 0 if unknown."""
  if state is None:
    return 0
  if not isinstance(state, LMState):
    raise ValueError(f"state is {name_type(state)}: expected an LMState")
  if state.position_B.shape != (rows,):
    raise ValueError(
      f"state has {len(state.position_B)} rows: expected {rows}, one for each "
      "prompt"
    )
  if not _has_values(state.position_B):
    return 0
  return int(jax.device_get(state.position_B).max())


def _check_tokens(tokens_BS: Array, written: int = 0) -> None:
  """Raise ValueError where logits were not finite, if values are known.

  Args:
    tokens_BS: new tokens.
    written: the number of new tokens before them.
  """
  if not _has_values(tokens_BS):
    return
  wrong = np.argwhere(jax.device_get(tokens_BS) == _NO_TOKEN)
  if wrong.size:
    row, step = wrong[0]
    raise ValueError(
      f"the logits of new token {written + step} after prompt {row} are not "
      "finite, so that no token is the likeliest: look for NaN or Inf in the "
      "model's parameters, and for values past the range of its compute dtype"
    )


def _one_row(row: int, prompt: Any) -> np.ndarray:
  """Return one prompt of a list as integers (1, T)."""
  array = np.asarray(jax.device_get(prompt))
  if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
    raise ValueError(
      f"prompt {row} is {array.dtype}{list(array.shape)}: expected integers "
      "(T,), T ≥ 1"
    )
  return array[None]


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


def _parts(length: int, piece: int) -> list[tuple[int, int]]:
  """Return (start, stop) of whole pieces, then of lengths of powers of two."""
  whole, rest = length // piece * piece, length % piece
  sizes = [1 << bit for bit in reversed(range(rest.bit_length()))]
  stops = [*range(piece, whole + 1, piece)]
  stops += [whole + (rest & -size) for size in sizes if rest & size]
  return list(zip([0, *stops], stops, strict=False))


def _put(x: np.ndarray) -> Array:
  """Move a small array to the device, also where jax may move none itself."""
  return jax.device_put(x)


def _split(
  model: LM, request: _Request, state: LMState | None
) -> tuple[nnx.GraphDef, nnx.State]:
  """Return the graph and parameters of a model with room for all tokens."""
  graph, params = nnx.split(model)
  if state is not None:  # its caches have a size already
    return graph, params
  longest = max(prompt.shape[1] for prompt in request.prompts)
  model = nnx.merge(graph, params)  # the caller's model stays as it is
  enlarge_caches(model, longest + request.steps - 1)
  return nnx.split(model)


def _read(
  graph: nnx.GraphDef,
  params: nnx.State,
  prompt_BT: Array,
  state: LMState | None,
  piece: int,
  rows: jax.sharding.Sharding | None,
) -> tuple[Array, LMState]:
  """Return the logits (B, V) after a prompt, and the state there.

  Args:
    graph: the model without its parameters.
    params: its parameters.
    prompt_BT: the prompt.
    state: the state before it. None: nothing comes before.
    piece: the most tokens that are read at a time.
    rows: how the prompt lies on a mesh. None: on none.
  """
  reader, logits_BV = _reader(graph, len(prompt_BT)), None
  if state is None:
    state = reader.start(params)
  for start, stop in _parts(prompt_BT.shape[1], piece):
    part_BT = jax.device_put(prompt_BT[:, start:stop], rows)
    logits_BV, state = reader.read(params, part_BT, state)
  return logits_BV, state


class _Reader(NamedTuple):
  """The compiled programs that read a prompt."""

  start: Callable[[nnx.State], LMState]
  read: Callable[[nnx.State, Array, LMState], tuple[Array, LMState]]


class _Writer(NamedTuple):
  """The compiled programs that add tokens to rows.

  `settings` is a `_Settings`. `done_B` says which rows have a stop token.
  """

  # (params, logits (B, V), state, steps, settings) to tokens (B, slots)
  whole: Callable[..., Array]
  # (logits (B, V), settings) to the first token (B,) and done_B
  first: Callable[..., tuple[Array, Array]]
  # (params, token (B,), state, done_B, [tokens before, steps], settings) to
  # tokens (B, slots), the last of them, the state before it, and done_B
  more: Callable[..., tuple[Array, Array, LMState, Array]]


def _typed(key: Array) -> Array:
  """Return a key of the new type, of keys of either type."""
  is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  return key if is_typed else jax.random.wrap_key_data(key)


def _row_keys(key: Array, rows: int) -> Array:
  """Return a PRNG key for each row, (B,)."""
  key = _typed(key)
  if key.ndim == 1:
    return key
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _choose(
  choice: _Choice, settings: _Settings, logits_BV: Array, s: Array
) -> Array:
  """Return new token s of each row, int32 (B,)."""
  is_finite_B = jnp.isfinite(logits_BV.max(axis=-1))
  if not choice.sample:
    tokens_B = jnp.argmax(logits_BV, axis=-1)
  else:
    if choice.top_k is not None:
      least_B1 = jax.lax.top_k(logits_BV, choice.top_k)[0][:, -1:]
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    logits_BV = logits_BV / settings.temperature
    if choice.has_top_p:
      logits_BV = _likeliest(logits_BV, settings.top_p)
    keys_B = _row_keys(settings.key, len(logits_BV))
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, s)
    tokens_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
  return jnp.where(is_finite_B, tokens_B.astype(jnp.int32), _NO_TOKEN)


def _likeliest(logits_BV: Array, top_p: Array) -> Array:
  """Return logits, −Inf but for the fewest tokens of probability ≥ top_p.

  Tokens with equal logits are kept or dropped together.
  """
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  p_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
  # Nothing comes before the first token, so that it is always kept.
  kept_BV = jnp.where(before_BV < top_p, sorted_BV, jnp.inf)
  least_B1 = kept_BV.min(axis=-1, keepdims=True)
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _is_stop(settings: _Settings, token_B: Array) -> Array:
  return (token_B[:, None] == settings.stop_tokens_K[None]).any(axis=1)


@jax.jit
def _join_rows(*rows: tuple[Array, LMState]) -> tuple[Array, LMState]:
  """Return logits (B, V) and the state of B rows, from those of each row."""
  logits, states = zip(*rows, strict=True)
  pairs = jax.tree.map(
    lambda *x_N1: jnp.concatenate(x_N1, axis=1), *(x.pairs for x in states)
  )
  position_B = jnp.concatenate([x.position_B for x in states])
  return jnp.concatenate(logits), LMState(position_B, pairs)


def _row(state: LMState, row: int) -> LMState:
  """Return the state of one row."""
  take = lambda x, axis: jax.lax.slice_in_dim(x, row, row + 1, axis=axis)
  pairs = jax.tree.map(lambda x_NB: take(x_NB, 1), state.pairs)
  return LMState(take(state.position_B, 0), pairs)


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
) -> _Writer:
  """Return the programs that add up to `slots` tokens to so many rows.

  Under a mesh with Explicit axes the rows are split over the axes `split`. The
  first tokens are the same for every number of slots.
  """

  def first(logits_BV: Array, settings: _Settings) -> tuple[Array, Array]:
    token_B = _choose(choice, settings, logits_BV, jnp.int32(0))
    return token_B, _is_stop(settings, token_B)

  def more(
    params: nnx.State,
    token_B: Array,
    state: LMState,
    done_B: Array,
    at: Array,
    settings: _Settings,
  ) -> tuple[Array, Array, LMState, Array]:
    written, steps = at
    has_stops = settings.stop_tokens_K.size > 0
    tokens_SB = jnp.full((slots, rows), _NO_TOKEN, jnp.int32)

    def is_left(carry: tuple[Array, Array, Array, LMState, Array]) -> Array:
      s, *_, done_B = carry
      return (s < steps) & ~done_B.all() if has_stops else s < steps

    def body(
      carry: tuple[Array, Array, Array, LMState, Array],
    ) -> tuple[Array, Array, Array, LMState, Array]:
      s, tokens_SB, token_B, state, done_B = carry
      logits_BV, state = nnx.merge(graph, params).step(token_B, state)
      new_B = _choose(choice, settings, logits_BV, written + s)
      token_B = jnp.where(done_B, token_B, new_B)
      done_B = done_B | _is_stop(settings, token_B)
      return s + 1, tokens_SB.at[s].set(token_B), token_B, state, done_B

    s, tokens_SB, token_B, state, done_B = jax.lax.while_loop(
      is_left, body, (jnp.int32(0), tokens_SB, token_B, state, done_B)
    )
    # The loop ends early where all rows have stopped: repeat their last tokens.
    slot_S1 = jnp.arange(slots, dtype=jnp.int32)[:, None]
    tokens_SB = jnp.where(slot_S1 < s, tokens_SB, token_B[None])
    return tokens_SB.T, token_B, state, done_B

  def write(
    params: nnx.State,
    logits_BV: Array,
    state: LMState,
    steps: Array,
    settings: _Settings,
  ) -> Array:
    token_B, done_B = first(logits_BV, settings)
    at = jnp.stack([jnp.int32(1), steps - 1])
    found = more(params, token_B, state, done_B, at, settings)
    return jnp.concatenate([token_B[:, None], found[0]], axis=1)[:, :slots]

  if explicit_axes():
    write = jax.sharding.auto_axes(write, out_sharding=PartitionSpec(split))
  return _Writer(
    jax.jit(write), jax.jit(first), jax.jit(more, donate_argnums=2)
  )
