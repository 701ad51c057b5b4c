"""The language model: pairs of blocks between an embedding and a tied head.

    x ← dropout(W_E[token] + W_P[position])
    x ← x + mixer(LN(x));   x ← x + MLP(LN(x))   in each of 2 · `pairs` blocks
    logits = LN(x) W_Eᵀ

    MLP(z) = W_2 GELU(W_1 z + b_1) + b_2         without an MLP, x ← x + LN(x)

x (B, T, D) is the residual stream. Blocks come in pairs, whose mixers are
`ModelConfig.first` and `ModelConfig.second`. In the paper's hybrids the first
is the short convolution and the second the mixer under study. All pairs have
the same shapes. Their parameters are stacked, and the model scans over the
pairs or runs them one by one. `blocks.PreNormBlock` is the second line. The
paper's Mamba model has another block, x ← x + mixer(RMSNorm(x)).

Logits and the second mixer's queries can be limited to chosen positions, as for
MQAR, where only the answers are predicted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from pallas_kernels.numerics import asked_precision, sum_dtype
from rebased_jax import blocks
from rebased_jax.config_checks import compute_dtype
from rebased_jax.embedding import look_up
from rebased_jax.explicit_mesh import layouts, method_on_any_mesh
from rebased_jax.integers import check_integers, integer_rows, to_int32
from rebased_jax.layer_norm import Stream
from rebased_jax.model_config import ModelConfig, check_length

_Method = TypeVar("_Method", bound=Callable[..., Any])


class LMState(NamedTuple):
  """The past of each row of an `LM`."""

  position_B: Array  # int32, the position of the next token
  pairs: Any  # the mixers' states, stacked over the pairs


def _position_outputs(arguments: dict[str, Any]) -> str:
  """Return the axes of what an `LM` gives for each token, or at positions."""
  return "B" if arguments.get("positions_to_predict") is not None else "BT"


def _state_outputs(state: LMState) -> LMState:
  """Return the axes of a state: rows split as the tokens' rows are."""
  pairs = jax.tree.map(lambda x: "NB"[: x.ndim], state.pairs)
  return LMState("B", pairs)  # pyrefly: ignore[bad-argument-type] a tree of str


def _prefill_outputs(arguments: dict[str, Any]) -> tuple[str, LMState]:
  """Return the axes of what `prefill` returns."""
  logits = "BT" if arguments.get("all_positions") else "B"
  return logits, _state_outputs(arguments["state"])


def _on_any_mesh(
  outputs: Callable[[dict[str, Any]], Any], letters: str = "BT"
) -> Callable[[_Method], _Method]:
  """Return the decorator of an `LM`'s methods that take tokens."""
  heads = lambda model: getattr(model.config.second, "heads", None)
  return method_on_any_mesh(letters, outputs, heads=heads)


class LM(nnx.Module):
  """The language model.

  Parameters: token_embedding (V, D), position_embedding (positions, D),
  norm/{scale,bias} (D,), and pairs/{first,second}/{norm1,mixer,norm2,mlp}/…,
  stacked over the pairs.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Make the model; embeddings start from N(0, 0.02²).

    Args:
      config: the model's config.
      rngs: draws the initial parameters.

    Raises:
      ValueError: the compute dtype is float64 and `jax_enable_x64` is not set,
        or a mixer has more heads than the width has channels.
    """
    compute_dtype(config.dtype)

    def embedding(rows: int) -> nnx.Param:
      shape = rows, config.width
      return nnx.Param(
        0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
      )

    self.config = config
    self.token_embedding = embedding(config.vocab_size)
    rows = config.positions
    self.position_embedding = None if rows is None else embedding(rows)
    self.pairs = blocks.stack(
      [config.make_pair(index, rngs=rngs) for index in range(config.pairs)]
    )
    self.norm = blocks.make_layer_norm(config.width, config.dtype, rngs)

  @_on_any_mesh(_position_outputs)
  def __call__(
    self,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions_to_predict: Array | None = None,
    axes: ShardAxes | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Return logits (B, T, V), or (B, M, V) at chosen positions, in float32.

    Args:
      tokens: integers (B, T). A token outside the vocabulary has NaN logits,
        and so have the tokens that attend to it.
      segment_ids: integers (B, T) of packed documents. A document is a run of
        equal ids. Learned positions do not restart at a new document. None:
        each row is one document.
      positions_to_predict: integers (B, M), each in [0, T). The logits, and the
        last block's queries and output, are computed only there. Logits at a
        position outside [0, T) are NaN. None: all positions.
      axes: the mesh axes that split batch, heads and time. None: no mesh.
      dropout_key: a PRNG key, which switches dropout on. None: no dropout.

    Raises:
      ValueError: T is larger than the position table, or a shape does not fit.
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

  @_on_any_mesh(_position_outputs)
  def features(
    self,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions_to_predict: Array | None = None,
    axes: ShardAxes | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Return LN(x), (B, T, D) or (B, M, D), which the head takes.

    It has the compute dtype. The arguments are those of a call.
    """
    tokens = integer_rows("tokens", tokens)
    if positions_to_predict is not None:
      positions_to_predict = integer_rows(
        "positions_to_predict", positions_to_predict
      )
    config = self.config
    position_1T = jnp.arange(tokens.shape[1])[None]
    stream = blocks.run_pairs(
      self.pairs,
      self._embed(tokens, position_1T, dropout_key, axes),
      scan=config.scans,
      remat=config.remat,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=positions_to_predict,
      dropout_key=dropout_key,
    )
    if axes is not None and positions_to_predict is not None:
      # Chosen positions are not split over the devices that split the row.
      axes = ShardAxes(batch=axes.batch)
    # The stream is x and the last block's output, which are not yet added.
    _, n_BTD = self.norm.of_sum(stream=stream, axes=axes)
    return n_BTD

  def head(self, x_D: Array) -> Array:
    """Return logits (…, V) in float32 of `features` (…, D).

    The factors have the compute dtype, the sums float32 (float64 for float64).
    """
    return jnp.einsum(
      "...d,vd->...v",
      x_D,
      self.token_embedding[...].astype(x_D.dtype),
      precision=asked_precision(self.config.precision, x_D.dtype),
      preferred_element_type=sum_dtype(x_D.dtype),
    )

  def init_state(self, batch: int) -> LMState:
    """Return the state of `batch` rows before their first token."""
    states = blocks.init_states(self.pairs, batch)
    return LMState(jnp.zeros(batch, jnp.int32), states)

  @_on_any_mesh(_prefill_outputs)
  def prefill(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    all_positions: bool = False,
  ) -> tuple[Array, LMState]:
    """Return the logits (B, V) after T more tokens, and the state there.

    A text of any length can so be read in parts, each with the state of the
    part before.

    Args:
      tokens: integers (B, T).
      state: the state after the tokens before, or `init_state(B)`.
      segment_ids: integers (B, T), as in a call.
      axes: the mesh axes. None: no mesh.
      all_positions: return the logits (B, T, V) after each of the tokens.

    Raises:
      ValueError: T is larger than the position table, or a shape does not fit.
    """
    x_BTD, state = self._prefill(tokens, state, segment_ids, axes)
    x = x_BTD if all_positions else x_BTD[:, -1]
    return self.head(self.norm(x)), state

  @_on_any_mesh(lambda given: ("BT", _state_outputs(given["state"])))
  def prefill_features(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, LMState]:
    """Return LN(x), (B, T, D), of T more tokens, and the state there.

    `head`, or a loss that makes few logits at a time, takes LN(x). The
    arguments are those of `prefill`.
    """
    x_BTD, state = self._prefill(tokens, state, segment_ids, axes)
    return self.norm(x_BTD), state

  @_on_any_mesh(lambda given: ("B", layouts(given["state"])), letters="B")
  def step(self, tokens: Array, state: LMState) -> tuple[Array, LMState]:
    """Return the logits (B, V) after one more token in each row, and the state.

    Logits of a token past the position table are NaN.

    Args:
      tokens: integers (B,).
      state: the state after the tokens before, or `init_state(B)`.
    """
    check_integers("tokens", tokens)
    if tokens.ndim != 1 or tokens.shape[0] == 0:
      raise ValueError(f"tokens has shape {tokens.shape}: expected (B,), B > 0")
    tokens = to_int32(tokens)
    x_B1D = self._embed(tokens[:, None], state.position_B[:, None])
    x_BD, states = blocks.step_pairs(self.pairs, x_B1D[:, 0], state.pairs)
    return self.head(self.norm(x_BD)), LMState(state.position_B + 1, states)

  def state_size(self, length: int) -> int:
    """Return the bytes of state that a row of `length` tokens holds."""
    position = jnp.dtype(jnp.int32).itemsize
    return position + blocks.state_size(self.pairs, length)

  @property
  def has_attention_matrix(self) -> bool:
    """Whether `attention_matrix` returns something."""
    return self.pairs.second.mixer.has_attention_matrix

  @_on_any_mesh(lambda given: "BHT")
  def attention_matrix(self, tokens: Array) -> Array:
    """Return the attention matrix (B, H, T, T) of the last block, to look at.

    Time and memory are quadratic in T.

    Args:
      tokens: integers (B, T).

    Raises:
      NotImplementedError: the mixer has no such matrix.
    """
    tokens = integer_rows("tokens", tokens)
    stream = Stream(self._embed(tokens, jnp.arange(tokens.shape[1])[None]))
    last = self.config.pairs - 1
    for index in range(last):
      stream = blocks.unstack(self.pairs, index)(stream)
    return blocks.unstack(self.pairs, last).attention_matrix(stream)

  def _prefill(
    self,
    tokens: Array,
    state: LMState,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, LMState]:
    """Return the residual stream of T more tokens, and the state there."""
    tokens = integer_rows("tokens", tokens)
    T = tokens.shape[1]
    step_1T = jnp.arange(T, dtype=jnp.int32)[None]
    x_BTD = self._embed(tokens, state.position_B[:, None] + step_1T)
    x_BTD, states = blocks.prefill_pairs(
      self.pairs, x_BTD, state.pairs, segment_ids=segment_ids, axes=axes
    )
    return x_BTD, LMState(state.position_B + T, states)

  def _embed(
    self,
    tokens_BT: Array,
    positions_BT: Array,
    dropout_key: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> Array:
    """Return the residual stream before the first block, (B, T, D)."""
    config = self.config
    dtype = jnp.float64 if config.dtype == "float64" else jnp.float32

    x_BTD = look_up(self.token_embedding[...], tokens_BT, axes)
    x_BTD = blocks.place(x_BTD.astype(dtype), axes)
    if self.position_embedding is not None:
      check_length(config, tokens_BT.shape[1])
      table = self.position_embedding[...]
      x_BTD += look_up(table, positions_BT, axes).astype(dtype)
    if dropout_key is None or config.dropout == 0:
      return x_BTD
    return nnx.Dropout(config.dropout)(
      x_BTD, deterministic=False, rngs=dropout_key
    )


def parameter_count(model: nnx.Module) -> int:
  """Return the number of parameters; the tied head counts once."""
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
