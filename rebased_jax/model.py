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
import dataclasses
from typing import Any, Literal, NamedTuple, TypeVar

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes, devices
from pallas_kernels.numerics import sum_dtype
from rebased_jax import blocks
from rebased_jax.blocks import Block, MambaBlock, Pair, PreNormBlock
from rebased_jax.config_checks import (
  DTYPES,
  check_one_of,
  check_positive,
  compute_dtype,
  make_scalars_plain,
)
from rebased_jax.explicit_mesh import layouts, method_on_any_mesh
from rebased_jax.integers import check_integers, to_int32
from rebased_jax.layer_norm import Stream
from rebased_jax.mixers.base import MixerConfig, Site

# A wrong number would otherwise build pairs for hours.
_MOST_PAIRS = 10_000

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Choices of an `LM`."""

  #: Mixer of the first block of each pair.
  first: MixerConfig
  #: Mixer of the second block of each pair.
  second: MixerConfig
  #: V, the size of the vocabulary.
  vocab_size: int
  #: D, the width of the residual stream.
  width: int
  #: Pairs of blocks, half the number of layers.
  pairs: int = 1
  #: Rows of the learned position table. None: no positions.
  positions: int | None = None
  #: Hidden width of the MLPs. None: no MLPs, and x ← x + LN(x) in their place.
  mlp_width: int | None = None
  #: Dropout of the embeddings in training.
  dropout: float = 0.0
  #: Compute dtype. Parameters are float32. The residual stream is float32 too,
  #: or float64 if this is float64.
  dtype: str = "float32"
  #: "pre-norm", or "mamba": x ← x + mixer(RMSNorm(x)), without an MLP.
  block: Literal["pre-norm", "mamba"] = "pre-norm"
  #: Whether one compiled pair is scanned over all pairs. None: yes, except on a
  #: GPU, where a scan copies all that the backward pass needs, twice.
  scan_layers: bool | None = None
  #: What the backward pass computes again instead of keeping it. "none":
  #: nothing. "dots": all but the outputs of projections. "full": everything
  #: inside a pair.
  remat: blocks.Remat = "none"

  def __post_init__(self) -> None:
    make_scalars_plain(self)
    check_positive(
      self, "vocab_size", "width", "pairs", "positions", "mlp_width"
    )
    if self.pairs > _MOST_PAIRS:
      raise ValueError(
        f"ModelConfig.pairs={self.pairs}: expected at most {_MOST_PAIRS}; each "
        "pair takes time before anything is computed"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"ModelConfig.dropout={self.dropout}: expected a number in [0, 1)"
      )
    check_one_of(self, "dtype", *DTYPES)
    check_one_of(self, "block", "pre-norm", "mamba")
    check_one_of(self, "remat", "none", "dots", "full")
    if self.block == "mamba" and self.mlp_width is not None:
      raise ValueError(
        f"ModelConfig.mlp_width={self.mlp_width}: expected None with "
        "block='mamba', which has no MLP"
      )

  @property
  def layers(self) -> int:
    """Number of blocks."""
    return 2 * self.pairs

  @property
  def scans(self) -> bool:
    """Whether pairs are scanned over, on the device that calls run on."""
    if self.scan_layers is None:
      return devices.platform() != "gpu"
    return self.scan_layers

  def make_block(
    self, mixer: MixerConfig, layer: int, *, rngs: nnx.Rngs
  ) -> Block:
    """Return a block of this model around a mixer, with fresh parameters."""
    site = Site(self.width, layer, self.layers, self.dtype, self.positions)
    if self.block == "mamba":
      return MambaBlock(mixer, site, rngs=rngs)
    return PreNormBlock(mixer, site, mlp_width=self.mlp_width, rngs=rngs)

  def make_pair(self, index: int, *, rngs: nnx.Rngs) -> Pair:
    """Return a pair of blocks of this model, with fresh parameters."""
    first = self.make_block(self.first, 2 * index, rngs=rngs)
    return Pair(first, self.make_block(self.second, 2 * index + 1, rngs=rngs))


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
    tokens = _integer_rows("tokens", tokens)
    if positions_to_predict is not None:
      positions_to_predict = _integer_rows(
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
      preferred_element_type=sum_dtype(x_D.dtype),
    )

  def init_state(self, batch: int) -> LMState:
    """Return the state of `batch` rows before their first token."""
    states = blocks.init_states(self.pairs, batch)
    return LMState(jnp.zeros(batch, jnp.int32), states)

  @_on_any_mesh(lambda given: ("B", _state_outputs(given["state"])))
  def prefill(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, LMState]:
    """Return the logits (B, V) after T more tokens, and the state there.

    Args:
      tokens: integers (B, T).
      state: the state after the tokens before, or `init_state(B)`.
      segment_ids: integers (B, T), as in a call.
      axes: the mesh axes. None: no mesh.

    Raises:
      ValueError: T is larger than the position table, or a shape does not fit.
    """
    tokens = _integer_rows("tokens", tokens)
    T = tokens.shape[1]
    step_1T = jnp.arange(T, dtype=jnp.int32)[None]
    x_BTD = self._embed(tokens, state.position_B[:, None] + step_1T)
    x_BTD, states = blocks.prefill_pairs(
      self.pairs, x_BTD, state.pairs, segment_ids=segment_ids, axes=axes
    )
    logits_BV = self.head(self.norm(x_BTD[:, -1]))
    return logits_BV, LMState(state.position_B + T, states)

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
    tokens = _integer_rows("tokens", tokens)
    stream = Stream(self._embed(tokens, jnp.arange(tokens.shape[1])[None]))
    last = self.config.pairs - 1
    for index in range(last):
      stream = blocks.unstack(self.pairs, index)(stream)
    return blocks.unstack(self.pairs, last).attention_matrix(stream)

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

    def look_up(table_VD: Array, index_BT: Array) -> Array:
      return _look_up(_with_whole_rows(table_VD, axes), index_BT).astype(dtype)

    x_BTD = look_up(self.token_embedding[...], tokens_BT)
    x_BTD = blocks.place(x_BTD, axes)
    if self.position_embedding is not None:
      check_length(config, tokens_BT.shape[1])
      x_BTD += look_up(self.position_embedding[...], positions_BT)
    if dropout_key is None or config.dropout == 0:
      return x_BTD
    return nnx.Dropout(config.dropout)(
      x_BTD, deterministic=False, rngs=dropout_key
    )


def check_length(config: ModelConfig, length: int) -> None:
  """Check that the position table has room for a row of `length` tokens.

  Raises:
    ValueError: the row is longer than the position table.
  """
  if config.positions is not None and length > config.positions:
    raise ValueError(
      f"a row of {length} tokens: the position table has {config.positions} "
      "rows (ModelConfig.positions)"
    )


def parameter_count(model: nnx.Module) -> int:
  """Return the number of parameters; the tied head counts once."""
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _integer_rows(name: str, x: Array) -> Array:
  """Return integers (B, T) as int32, or raise ValueError for anything else."""
  check_integers(name, x)
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(f"{name} has shape {x.shape}: expected (B, T), both > 0")
  return to_int32(x)


def _with_whole_rows(table_VD: Array, axes: ShardAxes | None) -> Array:
  """Return the table with D on one device, as a lookup needs it."""
  if axes is None:
    return table_VD
  return jax.lax.with_sharding_constraint(
    table_VD, PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
  )


def _look_up(table_VD: Array, index_BT: Array) -> Array:
  """Return rows of a table; an index outside it has NaN. Indices are int32."""
  is_inside_BT = (index_BT >= 0) & (index_BT < table_VD.shape[0])
  rows_BTD = jnp.take(table_VD, index_BT, axis=0, mode="clip")
  return jnp.where(is_inside_BT[..., None], rows_BTD, jnp.nan)
