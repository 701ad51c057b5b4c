"""Generate tokens: prefill the prompt, then take one step a token.

    logits_0, state = prefill(prompt)          in pieces, as `evaluate` reads
    token_s  ~ softmax(logits_s / temperature)  or the likeliest token
    logits_{s+1}, state = step(token_s, state)

Prompts of every length share a few compiled programs. A prompt is read in
pieces of `piece` tokens, so that its length takes no memory beside the state.
The rest is read in parts whose lengths are powers of two, the longest first: 13
tokens as 8, 4 and 1. The loop over new tokens runs in a program with room for
the next power of two.

Prompts of several lengths are read together. A row that has no part of some
length keeps its state while the others read theirs:

    13 tokens    8 | 4 |   | 1
     6 tokens      | 4 | 2 |

Token s of a row is drawn with `fold_in(key_row, s)`. The samples of a row
therefore depend on its own key, and not on the other rows.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
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
from pallas_kernels.numerics import sum_dtype
from pallas_kernels.sharding import Axis
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.decoding import LMState, enlarge_caches
from rebased_jax.integers import power_of_two, to_int32
from rebased_jax.model import LM
from rebased_jax.model_config import check_length
from rebased_jax.processes import gather

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

  prompts_BT: Array  # int32; 0 after the end of a shorter prompt
  lengths_B: np.ndarray  # tokens of each prompt
  rows: NamedSharding | None  # how rows lie on a mesh. None: on none
  split: PartitionSpec | None  # of rows in types. None: no Explicit axes
  steps: int
  choice: _Choice
  settings: _Settings
  piece: int


class _Part(NamedTuple):
  """Neighbouring tokens of some rows that are read at a time."""

  starts_B: np.ndarray  # the place of the first one in each prompt
  size: int
  is_read_B: np.ndarray  # whether a row has such a part


@explain_unknown_names
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
  sharding: NamedSharding | None = None,
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
      any lengths, integers (T,) each.
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
    sharding: how the rows of a list lie on a mesh, for example
      NamedSharding(mesh, PartitionSpec("data")). The number of rows is then a
      multiple of the devices that split them. None: each device has all rows.
      An array (B, T) is read where it lies.

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
    sharding=sharding,
  )
  request = _check(model, prompt, **options)
  graph, params = _split(model, request, state)
  logits_BV, state = _read(graph, params, request, state)
  slots = max(_FEWEST_SLOTS, power_of_two(request.steps))
  write = _writer(
    graph, len(logits_BV), slots, request.choice, request.split
  ).whole
  tokens_BS = write(
    params, logits_BV, state, _put(np.int32(request.steps)), request.settings
  )
  tokens_BS = jax.lax.slice_in_dim(tokens_BS, 0, request.steps, axis=1)
  _check_tokens(tokens_BS)
  return tokens_BS


@explain_unknown_names
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
  sharding: NamedSharding | None = None,
) -> Iterator[np.ndarray]:
  """Yield the tokens after prompts of any lengths as they are made.

  The tokens are those of `generate`. The iterator ends early when every row has
  a stop token. Stop to ask for more when all texts have ended for another
  reason. Arguments are checked when the first tokens are asked for.

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
    sharding: as in `generate`. Each process gets the tokens of all rows.

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
    list(prompts),
    steps=steps,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    key=key,
    stop_tokens=stop_tokens,
    state=state,
    piece=piece,
    sharding=sharding,
  )
  graph, params = _split(model, request, state)
  logits_BV, state = _read(graph, params, request, state)
  writer = _writer(graph, len(logits_BV), block, request.choice, request.split)
  token_B, done_B = writer.first(logits_BV, request.settings)
  tokens_BS, written = _fetch(token_B)[:, None], 0
  while True:
    _check_tokens(tokens_BS, written)
    yield tokens_BS
    written += tokens_BS.shape[1]
    if written == request.steps or _fetch(done_B).all():
      return
    count = min(block, request.steps - written)
    at = _put(np.array([written, count], np.int32))
    tokens_BS, token_B, state, done_B = writer.more(
      params, token_B, state, done_B, at, request.settings
    )
    tokens_BS = _fetch(tokens_BS)[:, :count]


def _check(
  model: LM,
  prompt: Prompts,
  *,
  steps: int,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  key: Array | None,
  stop_tokens: Sequence[int],
  state: LMState | None,
  piece: int,
  sharding: NamedSharding | None,
) -> _Request:
  """Return what is asked for; raise ValueError if an argument does not fit.

  The arguments are those of `generate`.
  """
  steps, temperature, top_k, top_p = map(
    plain_scalar, (steps, temperature, top_k, top_p)
  )
  V = model.config.vocab_size
  if isinstance(prompt, list | tuple):
    prompts_BT, lengths_B = _stack_prompts(prompt, V)
    _check_sharding(sharding, len(prompts_BT))
    rows, axis = sharding, _row_axis(sharding)
  else:
    check_integers("prompt", prompt)
    if prompt.ndim != 2 or 0 in prompt.shape:
      raise ValueError(
        f"prompt has shape {prompt.shape}: expected (B, T), B ≥ 1 and T ≥ 1"
      )
    if sharding is not None:
      raise ValueError(
        f"sharding={sharding} with an array, which is read where it lies: "
        "expected a list of prompts, or None and jax.device_put(prompt, …)"
      )
    rows = _rows_sharding(prompt)
    axis = layout(prompt)[0] if explicit_axes() else None
    prompts_BT = _check_vocabulary(0, prompt, V)
    lengths_B = np.full(prompt.shape[0], prompt.shape[1])
  for name, value in (("steps", steps), ("piece", piece)):
    if not is_positive_integer(value):
      raise ValueError(f"{name}={value!r}: expected an integer ≥ 1")
  B, longest = prompts_BT.shape
  choice = _check_sampling(model, temperature, top_k, top_p, key, B)
  stops_K = _check_stop_tokens(model, stop_tokens)
  # The last new token is predicted, but never read.
  _check_room(model, _tokens_before(state, B) + longest + steps - 1)
  settings = _Settings(
    _put(np.float32(temperature)),
    _put(np.float32(1 if top_p is None else top_p)),
    _put(stops_K),
    key if choice.sample else None,
  )
  split = PartitionSpec(axis) if explicit_axes() else None
  return _Request(
    prompts_BT, lengths_B, rows, split, steps, choice, settings, piece
  )


def _stack_prompts(
  prompts: Sequence[Any], size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return prompts as int32 (B, T), filled up with 0, and their lengths (B,).

  Args:
    prompts: integers (T,) each.
    size: V.

  Raises:
    ValueError: there is no prompt, or one does not fit.
  """
  if not prompts:
    raise ValueError("prompt is an empty list: expected at least one prompt")
  found = []
  for row, prompt in enumerate(prompts):
    array = np.asarray(jax.device_get(prompt))
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
      raise ValueError(
        f"prompt {row} is {array.dtype}{list(array.shape)}: expected integers "
        "(T,), T ≥ 1"
      )
    found.append(_check_vocabulary(row, array[None], size)[0])
  lengths_B = np.array([len(x) for x in found])
  prompts_BT = np.zeros((len(found), lengths_B.max()), np.int32)
  for row, tokens in zip(prompts_BT, found, strict=True):
    row[: len(tokens)] = tokens
  return prompts_BT, lengths_B


def _check_sharding(sharding: NamedSharding | None, rows: int) -> None:
  """Raise ValueError if rows cannot lie so on a mesh."""
  if sharding is None:
    return
  if not isinstance(sharding, NamedSharding) or len(sharding.spec) > 1:
    raise ValueError(
      f"sharding={sharding}: expected a NamedSharding of the axis of rows, as "
      'NamedSharding(mesh, PartitionSpec("data"))'
    )
  axis = _row_axis(sharding)
  names = (axis,) if isinstance(axis, str) else tuple(axis or ())
  devices = math.prod(sharding.mesh.shape[name] for name in names)
  if rows % devices:
    raise ValueError(
      f"sharding={sharding} splits {rows} prompts over {devices} devices: "
      f"expected a multiple of {devices}; add prompts, and drop their tokens"
    )


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


def _row_axis(sharding: NamedSharding | None) -> Axis:
  """Return the mesh axes that split rows, the first axis of an array."""
  return None if sharding is None else next(iter(sharding.spec), None)


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


def _fetch(x: Array) -> np.ndarray:
  """Return an array in the memory of each process."""
  return jax.device_get(gather(x))


def _parts(lengths_B: np.ndarray, piece: int) -> Iterator[_Part]:
  """Yield whole pieces, then parts whose lengths are powers of two.

  Args:
    lengths_B: tokens of each prompt.
    piece: tokens of a whole piece.
  """
  pieces_B, rest_B = lengths_B // piece, lengths_B % piece
  for number in range(pieces_B.max()):
    starts_B = np.full_like(lengths_B, number * piece)
    yield _Part(starts_B, piece, number < pieces_B)
  for bit in reversed(range(int(rest_B.max()).bit_length())):
    size = 1 << bit
    is_read_B = rest_B & size > 0
    if is_read_B.any():
      # The longer parts of the rest come first.
      yield _Part(pieces_B * piece + (rest_B & -2 * size), size, is_read_B)


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
  longest = request.prompts_BT.shape[1]
  model = nnx.merge(graph, params)  # the caller's model stays as it is
  enlarge_caches(model, longest + request.steps - 1)
  return nnx.split(model)


def _read(
  graph: nnx.GraphDef,
  params: nnx.State,
  request: _Request,
  state: LMState | None,
) -> tuple[Array, LMState]:
  """Return the logits (B, V) after the prompts, and the state there.

  Args:
    graph: the model without its parameters.
    params: its parameters.
    request: the prompts, and how they are read.
    state: the state before them. None: nothing comes before.
  """
  prompts_BT, lengths_B, rows = request[:3]
  reader, logits_BV = _reader(graph, len(prompts_BT)), None
  if state is None:
    state = reader.start(params)
  if (lengths_B == lengths_B[0]).all():
    for part in _parts(lengths_B, request.piece):
      start = part.starts_B[0]
      part_BT = jax.device_put(prompts_BT[:, start : start + part.size], rows)
      logits_BV, state = reader.read(params, part_BT, state)
    return logits_BV, state
  found = reader.no_logits(params), state
  if rows is not None:
    found = jax.device_put(found, _state_sharding(rows, found))
  for part in _parts(lengths_B, request.piece):
    found = _read_part(graph, params, request, part, found)
  return found


def _read_part(
  graph: nnx.GraphDef,
  params: nnx.State,
  request: _Request,
  part: _Part,
  before: tuple[Array, LMState],
) -> tuple[Array, LMState]:
  """Return logits and state after some rows have read a part.

  Other rows keep theirs. Where few rows have a whole piece, it is read for them
  alone: long prompts among short ones would else be read as often as there are
  rows.
  """
  B, read = len(request.lengths_B), np.flatnonzero(part.is_read_B)
  few = power_of_two(len(read))
  columns_T = np.arange(part.size)
  if part.size == request.piece and few < B and request.rows is None:
    rows_R = np.full(few, B)  # row B does not exist: its result is dropped
    rows_R[: len(read)] = read
    places_RT = part.starts_B[read[0]] + columns_T[None]
    tokens_RT = request.prompts_BT[
      np.minimum(rows_R, B - 1)[:, None], places_RT
    ]
    rows_R = _put(rows_R)
    _, own = _take_rows(before, rows_R)
    found = _reader(graph, few).read(params, _put(tokens_RT), own)
    return _put_rows(before, found, rows_R)
  places_BT = part.starts_B[:, None] + columns_T
  tokens_BT = np.take_along_axis(
    request.prompts_BT,
    np.minimum(places_BT, request.prompts_BT.shape[1] - 1),
    axis=1,
  )
  return _reader(graph, B).read_some(
    params,
    jax.device_put(tokens_BT, request.rows),
    jax.device_put(part.is_read_B, request.rows),
    before,
  )


def _state_sharding(
  rows: NamedSharding, found: tuple[Array, LMState]
) -> tuple[NamedSharding, LMState]:
  """Return how logits and a state lie, of how their rows lie."""
  pairs = NamedSharding(rows.mesh, PartitionSpec(None, _row_axis(rows)))
  _, state = found
  return rows, LMState(rows, jax.tree.map(lambda _: pairs, state.pairs))


def _by_rows(
  change: Callable[..., Array], *found: tuple[Array, LMState]
) -> tuple[Array, LMState]:
  """Apply `change(axis, *arrays)` to the logits and states of `found`.

  `axis` is that of the rows.
  """
  logits, states = zip(*found, strict=True)
  pairs = [state.pairs for state in states]
  return change(0, *logits), LMState(
    change(0, *(state.position_B for state in states)),
    jax.tree.map(functools.partial(change, 1), *pairs),
  )


@jax.jit
def _take_rows(
  found: tuple[Array, LMState], rows_R: Array
) -> tuple[Array, LMState]:
  """Return logits and state of some rows; a row that is missing is the last."""
  return _by_rows(
    lambda axis, x: jnp.take(x, rows_R, axis=axis, mode="clip"), found
  )


@jax.jit
def _put_rows(
  found: tuple[Array, LMState], own: tuple[Array, LMState], rows_R: Array
) -> tuple[Array, LMState]:
  """Return logits and state with those of some rows; row B is dropped."""

  def put(axis: int, x: Array, own: Array) -> Array:
    at = x.at[:, rows_R] if axis else x.at[rows_R]
    return at.set(own, mode="drop")

  return _by_rows(put, found, own)


class _Reader(NamedTuple):
  """The compiled programs that read prompts."""

  start: Callable[[nnx.State], LMState]
  no_logits: Callable[[nnx.State], Array]
  read: Callable[[nnx.State, Array, LMState], tuple[Array, LMState]]
  # (params, tokens (B, T), which rows are read (B,), logits and state) to
  # logits and state
  read_some: Callable[..., tuple[Array, LMState]]


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

  @jax.jit
  def no_logits(params: nnx.State) -> Array:
    config = nnx.merge(graph, params).config
    dtype = sum_dtype(jnp.dtype(config.dtype))
    return jnp.zeros((rows, config.vocab_size), dtype)

  @jax.jit
  def read_some(
    params: nnx.State,
    part_BT: Array,
    is_read_B: Array,
    before: tuple[Array, LMState],
  ) -> tuple[Array, LMState]:
    after = nnx.merge(graph, params).prefill(part_BT, before[1])

    def choose(axis: int, new: Array, old: Array) -> Array:
      shape = [1] * new.ndim
      shape[axis] = rows
      return jnp.where(is_read_B.reshape(shape), new, old)

    return _by_rows(choose, after, before)

  return _Reader(start, no_logits, read, read_some)


@keep_programs(most=32)
def _writer(
  graph: nnx.GraphDef,
  rows: int,
  slots: int,
  choice: _Choice,
  split: PartitionSpec | None,
) -> _Writer:
  """Return the programs that add up to `slots` tokens to so many rows.

  The first tokens are the same for every number of slots.

  Args:
    graph: the model without its parameters.
    rows: the number of rows.
    slots: the most tokens that a program adds.
    choice: how a token is chosen.
    split: the layout of the rows under a mesh with Explicit axes. None: the
      mesh has none.
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

  if split is not None:
    # Under Auto axes, XLA finds the layout of every value in between.
    on_mesh = jax.sharding.auto_axes
    of_state = LMState(split, PartitionSpec(None, *split))
    return _Writer(
      jax.jit(on_mesh(write, out_sharding=split)),
      jax.jit(on_mesh(first, out_sharding=(split, split))),
      jax.jit(
        on_mesh(more, out_sharding=(split, split, of_state, split)),
        donate_argnums=2,
      ),
    )
  return _Writer(
    jax.jit(write), jax.jit(first), jax.jit(more, donate_argnums=2)
  )
