"""The language model: pairs of blocks between an embedding and a tied head.

    x ← dropout(W_E[token] + W_P[position])
    x ← x + mixer(LN(x));   x ← x + mlp(LN(x))        for each block (blocks.py)
    logits = W_E LN(x)

A `Pair` is two blocks, the short convolution's and the mixer's; pairs have one
shape, so their parameters are stacked and the model scans over them. Without
`scan_layers` it takes them one by one, from the same stacked parameters.
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from pallas_kernels.layer_norm.xla import Stream
from rebased_jax import blocks
from rebased_jax.blocks import ModelConfig as ModelConfig, Pair
from rebased_jax.mixers import base


class LMState(NamedTuple):
  """What an `LM` keeps of a row's past."""

  position_B: Array  # int32, of the next token
  pairs: Any  # the mixers' states, stacked over the pairs


class LM(nnx.Module):
  """The language model.

  Parameters: token_embedding (V, D), position_embedding (P, D), norm/…, and
  pairs/{first,second}/{norm1,mixer,norm2,mlp}/…, stacked over the pairs.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    normal = lambda *shape: nnx.Param(
      0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
    )
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
      raise ValueError(
        "ModelConfig.dtype='float64': expected jax_enable_x64 to be set"
      )
    self.config = config
    self.token_embedding = normal(config.vocab_size, config.width)
    self.position_embedding = (
      None
      if config.positions is None
      else normal(config.positions, config.width)
    )
    pairs = [Pair(config, i, rngs=rngs) for i in range(config.pairs)]
    graph, _ = nnx.split(pairs[0])
    states = [nnx.state(pair) for pair in pairs]
    self.pairs = nnx.merge(
      graph, jax.tree.map(lambda *x: jnp.stack(x), *states)
    )
    self.norm = blocks.layer_norm(config, rngs)

  def __call__(
    self,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions_to_predict: Array | None = None,
    axes: ShardAxes | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Logits (B, T, V), float32; (B, M, V) at the positions wanted.

    Args:
      tokens: integers (B, T). A token outside the vocabulary has NaN logits.
      segment_ids: integers (B, T) of packed documents: runs of one id. The
        learned positions run on over the row.
      positions_to_predict: integers (B, M), each in [0, T): the logits, the
        last block and its queries are computed there alone. Another has NaN.
      axes: the mesh axes that split batch, heads and time.
      dropout_key: a PRNG key switches dropout on.

    Raises:
      ValueError: T is beyond the position table, or a shape does not fit.
    """
    return self.head(
      self.features(
        tokens,
        segment_ids=segment_ids,
        positions_to_predict=positions_to_predict,
        axes=axes,
        dropout_key=dropout_key,
      )
    )

  def features(
    self,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions_to_predict: Array | None = None,
    axes: ShardAxes | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """x (B, T, D), or (B, M, D), whose product with the head is the logits.

    In the dtype of the computation; arguments as of a call.
    """
    _check_rows("tokens", tokens)
    if positions_to_predict is not None:
      _check_rows("positions_to_predict", positions_to_predict)
    x_BTD = self._embed(
      tokens, jnp.arange(tokens.shape[1])[None], dropout_key, axes
    )
    graph, stacked = nnx.split(self.pairs)

    def run(stream, state, positions_BM=None):
      pair = nnx.merge(graph, state)
      return pair(
        stream,
        segment_ids=segment_ids,
        axes=axes,
        query_positions=positions_BM,
      )

    run = blocks.remat(run, self.config)
    if positions_to_predict is None:
      stream = self._through(run, x_BTD, stacked)
    else:
      first, last = _split_last(stacked)
      stream = self._through(run, x_BTD, first)
      stream = run(stream, last, positions_to_predict)
      axes = None if axes is None else ShardAxes(batch=axes.batch)
    return self.norm.of_sum(stream, axes)[1]

  def head(self, x_D: Array) -> Array:
    """Logits (…, V) of `features`, in float32."""
    return blocks.logits(x_D, self.token_embedding[...])

  def init_state(self, batch: int) -> LMState:
    """The state before a row's first token."""
    pairs = self.config.pairs
    one = nnx.merge(*self._pair(0)).init_state(batch)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * pairs), one)
    return LMState(jnp.zeros(batch, jnp.int32), stacked)

  def prefill(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, LMState]:
    """Logits (B, V) behind the last of T more tokens, and the state there."""
    _check_rows("tokens", tokens)
    T = tokens.shape[1]
    steps_1T = jnp.arange(T, dtype=jnp.int32)[None]
    x_BTD = self._embed(tokens, state.position_B[:, None] + steps_1T)
    call = lambda pair, x, s: pair.prefill(
      x, s, segment_ids=segment_ids, axes=axes
    )
    x_BTD, pairs = self._scan(call, x_BTD, state.pairs)
    return self._logits(x_BTD[:, -1]), LMState(state.position_B + T, pairs)

  def step(self, tokens: Array, state: LMState) -> tuple[Array, LMState]:
    """Logits (B, V) behind one more token a row, and the state there."""
    x_B1D = self._embed(tokens[:, None], state.position_B[:, None])
    call = lambda pair, x, s: pair.step(x, s)
    x_BD, pairs = self._scan(call, x_B1D[:, 0], state.pairs)
    return self._logits(x_BD), LMState(state.position_B + 1, pairs)

  def state_size(self, length: int) -> int:
    """Bytes of state that a sequence of `length` tokens holds."""
    pair = nnx.eval_shape(lambda: Pair(self.config, 0, rngs=nnx.Rngs(0)))
    mixers = (pair.first.mixer, pair.second.mixer)
    return 4 + self.config.pairs * sum(m.state_size(length) for m in mixers)

  @property
  def has_attention_matrix(self) -> bool:
    """Whether the last pair's mixer has weights between tokens to look at."""
    return hasattr(self.pairs.second.mixer, "attention_matrix")

  def attention_matrix(self, tokens: Array) -> Array:
    """A_BHTT of the last pair's mixer; quadratic.

    Raises:
      NotImplementedError: the mixer has no such matrix.
    """
    if not self.has_attention_matrix:
      name = type(self.pairs.second.mixer).__name__
      raise NotImplementedError(f"{name} has no attention matrix")
    stream = Stream(self._embed(tokens, jnp.arange(tokens.shape[1])[None]))
    for index in range(self.config.pairs - 1):
      stream = nnx.merge(*self._pair(index))(stream)
    pair = nnx.merge(*self._pair(self.config.pairs - 1))
    _, n_BTD = pair.second.normed(pair.first(stream))
    return pair.second.mixer.attention_matrix(n_BTD)

  def _pair(self, index: int):
    graph, stacked = nnx.split(self.pairs)
    return graph, jax.tree.map(lambda p: p[index], stacked)

  def _through(self, run, x: Array, stacked) -> Stream:
    """The stream behind the pairs, scanned or one by one; x itself of none.

    A scan hands on the sum of its parts, which takes less memory.
    """
    pairs = len(jax.tree.leaves(stacked)[0])
    if self.config.scans and pairs:
      body = lambda x, pair: (run(Stream(x), pair).whole(), None)
      return Stream(jax.lax.scan(body, x, stacked)[0])
    run = jax.jit(run)  # traced once for all pairs but the first
    stream = Stream(x)
    for index in range(pairs):
      pair = jax.tree.map(lambda p: p[index], stacked)  # noqa: B023
      stream = run(stream, pair)
      if self.config.remat == "full":  # the sum is all that is kept
        stream = Stream(stream.whole())
    return stream

  def _scan(self, call, x: Array, states):
    graph, stacked = nnx.split(self.pairs)
    body = lambda x, inputs: call(nnx.merge(graph, inputs[0]), x, inputs[1])
    return jax.lax.scan(body, x, (stacked, states))

  def _embed(
    self, tokens_BT, positions_BT, dropout_key=None, axes=None
  ) -> Array:
    config = self.config
    dtype = jnp.float64 if config.dtype == "float64" else jnp.float32
    lookup = lambda table, index: _lookup(
      base.gathered(table[...], axes), index
    ).astype(dtype)
    x_BTD = base.place(lookup(self.token_embedding, tokens_BT), axes)
    if self.position_embedding is not None:
      check_length(config, tokens_BT.shape[1])
      x_BTD += lookup(self.position_embedding, positions_BT)
    if dropout_key is None or config.dropout == 0:
      return x_BTD
    return nnx.Dropout(config.dropout)(
      x_BTD, deterministic=False, rngs=dropout_key
    )

  def _logits(self, x_D: Array) -> Array:
    return self.head(self.norm(x_D))


def check_length(config: ModelConfig, length: int) -> None:
  """Raises ValueError where a row is longer than the position table."""
  if config.positions is not None and length > config.positions:
    raise ValueError(
      f"a row of {length} tokens: the position table has {config.positions} "
      "rows (ModelConfig.positions)"
    )


def parameter_count(model: nnx.Module) -> int:
  """How many numbers are trained; a tied head counts once."""
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _check_rows(name: str, x: Array) -> None:
  """Raises ValueError where x is no (B, T) with something in it."""
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(f"{name} has shape {x.shape}: expected (B, T), none 0")


def _split_last(stacked):
  """All pairs but the last, and the last."""
  return (
    jax.tree.map(lambda p: p[:-1], stacked),
    jax.tree.map(lambda p: p[-1], stacked),
  )


def _lookup(table_VD: Array, index_BT: Array) -> Array:
  """Rows of a table; NaN for an index that is not in it."""
  inside_BT = (index_BT >= 0) & (index_BT < table_VD.shape[0])
  rows_BTD = jnp.take(table_VD, index_BT, axis=0, mode="clip")
  return jnp.where(inside_BT[..., None], rows_BTD, jnp.nan)
