"""The language model: pairs of blocks between an embedding and a tied head.

    x ← dropout(W_E[token] + W_P[position])
    x ← x + mixer(LN(x));   x ← x + mlp(LN(x))        for each block
    logits = W_E LN(x)

A `Pair` is two blocks, the short convolution's and the mixer's; pairs have one
shape, so their parameters are stacked and the model scans over them. Without an
MLP the second line is x ← x + LN(x), as in the paper's MQAR models.
"""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from rebased_jax.mixers import base

NORM_EPS = 1e-5  # PyTorch's default


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What an `LM` is."""

  conv: base.MixerConfig  # of the first block of each pair
  mixer: base.MixerConfig  # of the second
  vocab_size: int  # V
  width: int  # D
  pairs: int = 1  # half the number of layers
  positions: int | None = None  # rows of the learned table; None: no positions
  mlp_width: int | None = None  # hidden width of the MLPs; None: no MLP
  dropout: float = 0.0  # of the embeddings
  dtype: str = "float32"  # of the computation; parameters are float32

  def __post_init__(self):
    base.positive(
      self, "vocab_size", "width", "pairs", "positions", "mlp_width"
    )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"ModelConfig.dropout={self.dropout}: expected a number in [0, 1)"
      )
    if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
      raise ValueError(
        f"ModelConfig.dtype={self.dtype!r}: expected float32, bfloat16, "
        "float16 or float64"
      )

  @property
  def layers(self) -> int:
    return 2 * self.pairs


class MLP(nnx.Module):
  """W₂ gelu(W₁ x + b₁) + b₂, with the exact GELU."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    D, hidden = config.width, config.mlp_width
    depth_scaled = 0.02 * (2 * config.layers) ** -0.5
    make = lambda i, o, stddev: base.linear(
      i,
      o,
      dtype=config.dtype,
      rngs=rngs,
      use_bias=True,
      stddev=stddev,
    )
    self.up = make(D, hidden, 0.02)
    self.down = make(hidden, D, depth_scaled)

  def __call__(self, x: Array) -> Array:
    return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
  """x + mixer(LN(x)), then x + mlp(LN(x)), or x + LN(x) without an MLP."""

  def __init__(
    self,
    config: ModelConfig,
    mixer: base.MixerConfig,
    layer: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.norm1 = _norm(config, rngs)
    site = base.Site(config.width, layer, config.layers, config.dtype)
    self.mixer = mixer.make(site, rngs=rngs)
    self.norm2 = _norm(config, rngs)
    has_mlp = config.mlp_width is not None
    self.mlp = MLP(config, rngs=rngs) if has_mlp else None

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    y_BTD = self.mixer(
      self.norm1(x_BTD),
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )
    return self._rest(base.take_positions(x_BTD, query_positions), y_BTD)

  def prefill(self, x_BTD: Array, state, *, segment_ids=None, axes=None):
    y_BTD, state = self.mixer.prefill(
      self.norm1(x_BTD), state, segment_ids=segment_ids, axes=axes
    )
    return self._rest(x_BTD, y_BTD), state

  def step(self, x_BD: Array, state):
    y_BD, state = self.mixer.step(self.norm1(x_BD), state)
    return self._rest(x_BD, y_BD), state

  def _rest(self, x: Array, y: Array) -> Array:
    x = x + y.astype(x.dtype)
    y = self.norm2(x)
    return x + (y if self.mlp is None else self.mlp(y)).astype(x.dtype)


class Pair(nnx.Module):
  """A block of the short convolution, then a block of the mixer."""

  def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs):
    self.conv = Block(config, config.conv, 2 * index, rngs=rngs)
    self.mixer = Block(config, config.mixer, 2 * index + 1, rngs=rngs)

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    x_BTD = self.conv(x_BTD, segment_ids=segment_ids, axes=axes)
    return self.mixer(
      x_BTD,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )

  def init_state(self, batch: int):
    return (
      self.conv.mixer.init_state(batch),
      self.mixer.mixer.init_state(batch),
    )

  def prefill(self, x_BTD: Array, states, *, segment_ids=None, axes=None):
    x_BTD, first = self.conv.prefill(
      x_BTD, states[0], segment_ids=segment_ids, axes=axes
    )
    x_BTD, second = self.mixer.prefill(
      x_BTD, states[1], segment_ids=segment_ids, axes=axes
    )
    return x_BTD, (first, second)

  def step(self, x_BD: Array, states):
    x_BD, first = self.conv.step(x_BD, states[0])
    x_BD, second = self.mixer.step(x_BD, states[1])
    return x_BD, (first, second)


class LMState(NamedTuple):
  """What an `LM` keeps of a row's past."""

  position_B: Array  # int32, of the next token
  pairs: Any  # the mixers' states, stacked over the pairs


class LM(nnx.Module):
  """The language model.

  Parameters: token_embedding (V, D), position_embedding (P, D), norm/…, and
  pairs/{conv,mixer}/{norm1,mixer,norm2,mlp}/…, stacked over the pairs.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    normal = lambda *shape: nnx.Param(
      0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
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
    self.norm = _norm(config, rngs)

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
      segment_ids: integers (B, T) of packed documents: runs of one id.
      positions_to_predict: integers (B, M), each in [0, T): the logits, the
        last block and its queries are computed there alone.
      axes: the mesh axes that split batch, heads and time.
      dropout_key: a PRNG key switches dropout on.

    Raises:
      ValueError: T is beyond the position table.
    """
    x_BTD = self._embed(tokens, jnp.arange(tokens.shape[1])[None], dropout_key)
    last = self.config.pairs - 1
    graph, stacked = nnx.split(self.pairs)

    def body(x_BTD, state):
      pair = nnx.merge(graph, state)
      return pair(x_BTD, segment_ids=segment_ids, axes=axes), None

    if last > 0:
      first = jax.tree.map(lambda p: p[:last], stacked)
      x_BTD, _ = jax.lax.scan(body, x_BTD, first)
    pair = nnx.merge(graph, jax.tree.map(lambda p: p[last], stacked))
    x_BTD = pair(
      x_BTD,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=positions_to_predict,
    )
    return self._logits(x_BTD)

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
    pair = nnx.merge(*self._pair(0))
    mixers = (pair.conv.mixer, pair.mixer.mixer)
    return 4 + self.config.pairs * sum(m.state_size(length) for m in mixers)

  def attention_matrix(self, tokens: Array) -> Array:
    """A_BHTT of the last pair's mixer, where it has one; quadratic."""
    x_BTD = self._embed(tokens, jnp.arange(tokens.shape[1])[None])
    for index in range(self.config.pairs - 1):
      x_BTD = nnx.merge(*self._pair(index))(x_BTD)
    pair = nnx.merge(*self._pair(self.config.pairs - 1))
    x_BTD = pair.conv(x_BTD)
    return pair.mixer.mixer.attention_matrix(pair.mixer.norm1(x_BTD))

  def _pair(self, index: int):
    graph, stacked = nnx.split(self.pairs)
    return graph, jax.tree.map(lambda p: p[index], stacked)

  def _scan(self, call, x: Array, states):
    graph, stacked = nnx.split(self.pairs)
    body = lambda x, inputs: call(nnx.merge(graph, inputs[0]), x, inputs[1])
    return jax.lax.scan(body, x, (stacked, states))

  def _embed(self, tokens_BT, positions_BT, dropout_key=None) -> Array:
    config = self.config
    dtype = jnp.float64 if config.dtype == "float64" else jnp.float32
    x_BTD = _lookup(self.token_embedding[...], tokens_BT).astype(dtype)
    if self.position_embedding is not None:
      check_length(config, tokens_BT.shape[1])
      x_BTD += _lookup(self.position_embedding[...], positions_BT).astype(dtype)
    if dropout_key is None or config.dropout == 0:
      return x_BTD
    return nnx.Dropout(config.dropout)(
      x_BTD, deterministic=False, rngs=dropout_key
    )

  def _logits(self, x_D: Array) -> Array:
    x_D = self.norm(x_D)
    embedding_VD = self.token_embedding[...].astype(x_D.dtype)
    acc = jnp.float64 if x_D.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(
      "...d,vd->...v", x_D, embedding_VD, preferred_element_type=acc
    )


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


def _lookup(table_VD: Array, index_BT: Array) -> Array:
  """Rows of a table; NaN for an index that is not in it."""
  inside_BT = (index_BT >= 0) & (index_BT < table_VD.shape[0])
  rows_BTD = jnp.take(table_VD, index_BT, axis=0, mode="clip")
  return jnp.where(inside_BT[..., None], rows_BTD, jnp.nan)


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.width,
    epsilon=NORM_EPS,
    dtype=jnp.dtype(config.dtype),
    use_fast_variance=False,
    rngs=rngs,
  )
