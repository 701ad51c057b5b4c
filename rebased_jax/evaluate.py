"""Log-likelihoods and losses of texts, however long they are.

    nll_t     = −log softmax(logits_{t−1})[token_t]     of a predicted token t
    log p     = −Σ_t nll_t                              summed in float64

Texts run in batches of `rows` texts. A text of up to `piece` tokens is padded
to a power of two. A longer one is read in pieces, each with the state of the
piece before, so that its length takes no memory on the device. Every power of
two up to `piece` is compiled once, and one program reads pieces.

    from rebased_jax.evaluate import loglikelihood

    found = loglikelihood(model, [tokens])[0]
    perplexity = math.exp(-found.total / found.tokens)
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ShardAxes, cross_entropy
from pallas_kernels.compile_once import keep_programs
from rebased_jax.config_checks import is_positive_integer
from rebased_jax.decoding import LMState, enlarge_caches
from rebased_jax.integers import check_vocabulary, power_of_two
from rebased_jax.mixers.attention import Attention
from rebased_jax.model import LM

#: The fewest tokens of a batch: shorter texts share one program.
_SHORTEST = 16
#: Logits that exist at a time: 256 MiB in float32.
_MOST_LOGITS = 1 << 26
#: Batches that run before the losses of an earlier one are read.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
  """The log-likelihood of a text's predicted tokens."""

  #: Σ log p, in nats, summed in float64.
  total: float
  #: The number of predicted tokens.
  tokens: int
  #: Whether each of them has the greatest logit. With equal logits, the one
  #: with the smallest number is the greatest.
  is_greedy: bool


class TokenLosses(NamedTuple):
  """Losses of neighbouring tokens of one text."""

  #: The number of the text.
  text: int
  #: The place of the first of these tokens in the text.
  start: int
  #: −log p of each token in nats, float32 (N,). 0 where none is predicted.
  nll_N: np.ndarray
  #: Whether each token has the greatest logit, bool (N,).
  is_greedy_N: np.ndarray
  #: Whether each token is predicted, bool (N,).
  is_predicted_N: np.ndarray


def loglikelihood(
  model: LM,
  texts: Sequence[Any],
  *,
  starts: Sequence[int] | None = None,
  segment_ids: Sequence[Any] | None = None,
  rows: int = 8,
  piece: int = 1024,
  axes: ShardAxes | None = None,
) -> list[LogLikelihood]:
  """Return the log-likelihood of each text's tokens, given those before.

  Args:
    model: the language model.
    texts: integers (length,) each, in [0, V). A text has at least one token.
    starts: for each text the place of the first token that is predicted, 1 or
      more. The tokens before it are the context. None: 1 for each.
    segment_ids: for each text integers (length,), as in a call of the model.
      The first token of a document is not predicted. None: each text is one
      document.
    rows: texts of a batch. The last batch is padded with empty texts.
    piece: the most tokens of a text that run at a time.
    axes: the axes of the ambient mesh that split batch, heads and time. None:
      no mesh.

  Raises:
    ValueError: a text or an argument does not fit, or a text is longer than the
      model can read. The message names the text and the token.
    NotImplementedError: a mixer cannot keep documents apart, or split time.
  """
  totals = np.zeros(len(texts), np.float64)
  counts = np.zeros(len(texts), np.int64)
  greedy = np.ones(len(texts), bool)
  for found in token_losses(
    model,
    texts,
    starts=starts,
    segment_ids=segment_ids,
    rows=rows,
    piece=piece,
    axes=axes,
  ):
    totals[found.text] -= found.nll_N.sum(dtype=np.float64)
    counts[found.text] += found.is_predicted_N.sum()
    greedy[found.text] &= (found.is_greedy_N | ~found.is_predicted_N).all()
  columns = totals.tolist(), counts.tolist(), greedy.tolist()
  return [LogLikelihood(*row) for row in zip(*columns, strict=True)]


def token_losses(
  model: LM,
  texts: Sequence[Any],
  *,
  starts: Sequence[int] | None = None,
  segment_ids: Sequence[Any] | None = None,
  rows: int = 8,
  piece: int = 1024,
  axes: ShardAxes | None = None,
) -> Iterator[TokenLosses]:
  """Yield the loss of each token of each text after its first, in parts.

  Parts of a text come in order. Texts come in any order. The arguments and
  errors are those of `loglikelihood`. They are checked when the first part is
  asked for, before anything is computed.
  """
  for name, value in (("rows", rows), ("piece", piece)):
    if not is_positive_integer(value):
      raise ValueError(f"{name}={value!r}: expected an integer ≥ 1")
  checked = _check_texts(model, texts, starts, segment_ids)
  limit = _check_lengths(model, checked)
  order = sorted(range(len(checked)), key=lambda i: -len(checked[i].tokens))
  groups = [order[i : i + rows] for i in range(0, len(order), rows)]
  running = collections.deque[tuple[_Part, Any]]()
  for group in groups:
    members = [checked[i] for i in group]
    for part, losses in _run(model, members, rows, piece, limit, axes):
      running.append((part._replace(texts=group), losses))
      while len(running) > _AHEAD:
        yield from _read(*running.popleft())
  while running:
    yield from _read(*running.popleft())


def longest_text(model: LM) -> int | None:
  """Return the most tokens that a text may have; None: any number.

  Learned positions and Hyena's filter set a limit. The cache of attention is
  made as long as the text.

  Args:
    model: the language model.
  """
  rows = (model.config.positions, *(x.longest_row for x in model.mixers))
  limits = [limit for limit in rows if limit is not None]
  # The last token is predicted, but never read.
  return min(limits) + 1 if limits else None


def row_losses(
  model: LM,
  features: Array,
  targets: Array,
  weights: Array,
  *,
  parts: int = 1,
  axes: ShardAxes | None = None,
  z_loss: float = 0.0,
) -> tuple[Array, Any]:
  """Return Σ w · nll of rows, by the tied head, and the loss of each token.

  Training and every evaluation call this function.

  Args:
    model: the language model.
    features: what `LM.features` or `LM.prefill_features` returns, (B, M, D).
    targets: integers (B, M), the token after each.
    weights: floats (B, M), 0 where no token is predicted.
    parts: parts of a row whose logits exist one after the other.
    axes: the mesh axes. None: no mesh.
    z_loss: as `pallas_kernels.cross_entropy` has it; for training only.

  Returns:
    The sum, and `pallas_kernels.cross_entropy`'s losses of tokens.
  """
  return cross_entropy(
    features,
    model.token_embedding[...],
    targets,
    weights,
    parts=parts,
    axes=axes,
    precision=model.config.precision,
    z_loss=z_loss,
  )


class _Text(NamedTuple):
  """A checked text."""

  tokens: np.ndarray  # int32 (length,)
  start: int  # the first token that is predicted
  segments: np.ndarray | None  # int32 (length,)


class _Part(NamedTuple):
  """The places of a batch's tokens in their texts."""

  texts: list[int]  # the number of each row's text
  start: int  # the place of the first target in each text
  lengths: list[int]  # the number of targets of each row
  weights: np.ndarray  # float32 (rows, T)


def _check_texts(
  model: LM,
  texts: Sequence[Any],
  starts: Sequence[int] | None,
  segment_ids: Sequence[Any] | None,
) -> list[_Text]:
  """Return the texts as int32; ValueError if one does not fit."""
  for name, values in (("starts", starts), ("segment_ids", segment_ids)):
    if values is not None and len(values) != len(texts):
      raise ValueError(
        f"{name} has {len(values)} entries: expected {len(texts)}, one for "
        "each text"
      )
  found = []
  for i, text in enumerate(texts):
    tokens = _integers(f"texts[{i}]", text)
    if not len(tokens):
      raise ValueError(f"texts[{i}] is empty: expected at least one token")
    check_vocabulary(f"texts[{i}]", tokens, model.config.vocab_size)
    start = 1 if starts is None else starts[i]
    if not is_positive_integer(start):
      raise ValueError(
        f"starts[{i}]={start!r}: expected 1 or more: the first token of a text "
        "has nothing before it that could predict it"
      )
    segments = None
    if segment_ids is not None:
      segments = _integers(f"segment_ids[{i}]", segment_ids[i])
      if segments.shape != tokens.shape:
        raise ValueError(
          f"segment_ids[{i}] has shape {segments.shape}: expected "
          f"{tokens.shape}, as texts[{i}] has"
        )
      # Only where neighbours differ matters, and any integer is allowed.
      segments = np.cumsum(np.diff(segments, prepend=segments[:1]) != 0)
      segments = segments.astype(np.int32)
    found.append(_Text(tokens.astype(np.int32), int(start), segments))
  return found


def _integers(name: str, values: Any) -> np.ndarray:
  """Return integers (length,) as a NumPy array."""
  array = np.asarray(jax.device_get(values))
  if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
    raise ValueError(
      f"{name} is {array.dtype}{list(array.shape)}: expected integers of shape "
      "(length,)"
    )
  return array


def _check_lengths(model: LM, texts: list[_Text]) -> int | None:
  """Return the most tokens of a row that the model reads; None: any number.

  Raises:
    ValueError: a text is longer.
  """
  longest = longest_text(model)
  if longest is None:
    return None
  for i, text in enumerate(texts):
    if len(text.tokens) > longest:
      raise ValueError(
        f"texts[{i}] has {len(text.tokens):,} tokens: expected at most "
        f"{longest:,}, which this model can read: cut the text, or use a model "
        "with positions=None"
      )
  return longest - 1


class _Programs(NamedTuple):
  """The compiled programs of a model."""

  whole: Callable[..., Any]  # (params, batch) to the losses of whole rows
  start: Callable[..., LMState]  # (params, rows) to the first state
  # (params, batch, state, first state or None) to losses and state
  piece: Callable[..., Any]


# Dropping the programs of the oldest model bounds the memory of all programs.
@keep_programs(most=32)
def _programs(
  graph: nnx.GraphDef, axes: ShardAxes | None, room: int
) -> _Programs:
  """Return the programs that evaluate a model.

  Args:
    graph: the model without its parameters.
    axes: the mesh axes. None: no mesh.
    room: the least tokens that caches of attention hold.
  """

  def make(params: nnx.State) -> LM:
    model = nnx.merge(graph, params)
    model.eval()
    if room:
      enlarge_caches(model, room)
    return model

  def losses(model: LM, x_BTD: Array, batch: dict[str, Array]) -> Any:
    B, T = batch["targets"].shape
    logits = B * T * model.config.vocab_size
    _, tokens = row_losses(
      model,
      x_BTD,
      batch["targets"],
      batch["weights"],
      parts=_parts(T, logits, axes),
      axes=axes,
    )
    return tokens.nll_BM, tokens.correct_BM

  @jax.jit
  def whole(params: nnx.State, batch: dict[str, Array]) -> Any:
    model = make(params)
    x_BTD = model.features(
      batch["tokens"], segment_ids=batch.get("segment_ids"), axes=axes
    )
    return losses(model, x_BTD, batch)

  @functools.partial(jax.jit, static_argnames="rows")
  def start(params: nnx.State, *, rows: int) -> LMState:
    return make(params).init_state(rows)

  @functools.partial(jax.jit, donate_argnames="state")
  def piece(
    params: nnx.State,
    batch: dict[str, Array],
    state: LMState,
    first: LMState | None,
  ) -> Any:
    model = make(params)
    if first is not None:
      # A document that begins with the piece sees nothing before it. Positions
      # of the table continue or restart, as they do inside a row.
      is_new_B = batch["is_new"]

      def choose(new_NB: Array, old_NB: Array) -> Array:
        other_axes = (1,) * (old_NB.ndim - 2)
        return jnp.where(is_new_B.reshape(1, -1, *other_axes), new_NB, old_NB)

      pairs = jax.tree.map(choose, first.pairs, state.pairs)
      state = state._replace(pairs=pairs)
      if model.config.restart_positions:
        position_B = jnp.where(is_new_B, 0, state.position_B)
        state = state._replace(position_B=position_B)
    x_BTD, state = model.prefill_features(
      batch["tokens"], state, segment_ids=batch.get("segment_ids"), axes=axes
    )
    return losses(model, x_BTD, batch), state

  return _Programs(whole, start, piece)


def _parts(length: int, logits: int, axes: ShardAxes | None) -> int:
  """Return how many parts of a row keep the logits of a part few.

  Args:
    length: tokens of a row.
    logits: the number of all logits.
    axes: the mesh axes. None: no mesh.
  """
  if axes is not None:
    length //= axes.devices(axes.time)
  enough = -(-logits // _MOST_LOGITS)
  divisors = (n for n in range(1, length) if length % n == 0 and n >= enough)
  return next(divisors, length)


def _run(
  model: LM,
  texts: list[_Text],
  rows: int,
  piece: int,
  limit: int | None,
  axes: ShardAxes | None,
) -> Iterator[tuple[_Part, Any]]:
  """Yield the parts of some texts and their losses on the device.

  Args:
    model: the language model.
    texts: at most `rows` texts.
    rows: rows of a batch.
    piece: the most tokens of a row that run at a time.
    limit: the most tokens of a row. None: any number.
    axes: the mesh axes. None: no mesh.
  """
  graph, params = nnx.split(model)
  most = max(len(text.tokens) for text in texts) - 1
  if most <= piece:
    if most:
      length = _bucket(most, piece, limit)
      part, batch = _batch(texts, rows, 0, length)
      yield part, _programs(graph, axes, 0).whole(params, batch)
    return
  has_cache = any(isinstance(x, Attention) for x in model.mixers)
  room = power_of_two(most + piece) if has_cache else 0
  programs = _programs(graph, axes, room)
  begin = functools.partial(programs.start, params, rows=rows)
  state, first = begin(), None
  if texts[0].segments is not None:
    first = begin()
  for at in range(0, most, piece):
    left = None if limit is None else limit - at
    length = _bucket(min(piece, most - at), piece, left)
    part, batch = _batch(texts, rows, at, length)
    losses, state = programs.piece(params, batch, state, first)
    yield part, losses


def _bucket(tokens: int, piece: int, limit: int | None) -> int:
  """Return the length that tokens of a row are padded to."""
  length = min(max(_SHORTEST, power_of_two(tokens)), piece)
  return length if limit is None else min(length, limit)


def _batch(
  texts: list[_Text], rows: int, at: int, length: int
) -> tuple[_Part, dict[str, np.ndarray]]:
  """Return tokens `at` to `at + length` of texts, and their targets."""
  tokens_BT = np.zeros((rows, length), np.int32)
  batch = dict(
    tokens=tokens_BT,
    targets=tokens_BT.copy(),
    weights=np.zeros((rows, length), np.float32),
  )
  if texts[0].segments is not None:
    # The padding of a text is one more document.
    batch["segment_ids"] = np.full((rows, length), -1, np.int32)
    batch["is_new"] = np.zeros(rows, bool)
  lengths = []
  for row, text in enumerate(texts):
    inputs_T = text.tokens[at : at + length]
    targets_T = text.tokens[at + 1 : at + 1 + length]
    count = len(targets_T)
    lengths.append(count)
    batch["tokens"][row, :count] = inputs_T[:count]
    batch["targets"][row, :count] = targets_T
    is_predicted_T = np.arange(at + 1, at + 1 + count) >= text.start
    if text.segments is not None and count:
      here = text.segments[at : at + count + 1]
      batch["segment_ids"][row, :count] = here[:count]
      batch["is_new"][row] = at > 0 and here[0] != text.segments[at - 1]
      is_predicted_T &= here[1:] == here[:-1]
    batch["weights"][row, :count] = is_predicted_T
  return _Part([], at + 1, lengths, batch["weights"]), batch


def _read(part: _Part, losses: Any) -> Iterator[TokenLosses]:
  """Yield the losses of each row of a batch, from the device."""
  nll_BT, correct_BT = jax.device_get(losses)
  for row, (text, count) in enumerate(
    zip(part.texts, part.lengths, strict=True)
  ):
    if count:
      is_predicted_T = part.weights[row, :count] > 0
      nll_T = np.where(is_predicted_T, nll_BT[row, :count], 0)
      is_greedy_T = correct_BT[row, :count] > 0
      yield TokenLosses(text, part.start, nll_T, is_greedy_T, is_predicted_T)
