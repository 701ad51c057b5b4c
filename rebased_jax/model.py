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

from typing import Any

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from pallas_kernels.arguments import check_not_cut
from pallas_kernels.numerics import asked_precision, sum_dtype
from rebased_jax import blocks
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import compute_dtype
from rebased_jax.decoding import Decoder
from rebased_jax.dropout import draws_own_key
from rebased_jax.embedding import look_up, token_positions
from rebased_jax.explicit_mesh import method_on_any_mesh
from rebased_jax.integers import integer_rows
from rebased_jax.model_config import ModelConfig, check_length
from rebased_jax.random_keys import in_linear_time


def _position_outputs(arguments: dict[str, Any]) -> str:
  """Return the axes of a result that are split as those of the tokens are."""
  return "B" if arguments.get("positions_to_predict") is not None else "BT"


class LM(Decoder):
  """The language model; `Decoder` adds reading a row part by part.

  `method_on_any_mesh` acts under a mesh with Explicit axes alone: it splits the
  results of a method as the tokens are split.

  Parameters: token_embedding (V, D), position_embedding (positions, D),
  norm/{scale,bias} (D,), and pairs/{first,second}/{norm1,mixer,norm2,mlp}/…,
  stacked over the pairs.
  """

  #: The class of config that the model is made from.
  config_type = ModelConfig

  @explain_unknown_names
  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Make the model; embeddings start from N(0, 0.02²).

    Args:
      config: the model's config.
      rngs: draws the initial parameters. A stream named "dropout" is kept, for
        calls after train().

    Raises:
      ValueError: a dtype is float64 and `jax_enable_x64` is not set, or a mixer
        has more heads than the width has channels.
    """
    compute_dtype(config.dtype)
    param_dtype = compute_dtype(config.param_dtype, "param_dtype")
    keys = in_linear_time(rngs)

    def embedding(rows: int) -> nnx.Param:
      shape = rows, config.width
      return nnx.Param(
        0.02 * jax.random.normal(keys.params(), shape, param_dtype)
      )

    self.config = config
    self.token_embedding = embedding(config.vocab_size)
    rows = config.positions
    self.position_embedding = None if rows is None else embedding(rows)
    self.pairs = blocks.stack(
      [config.make_pair(index, rngs=keys) for index in range(config.pairs)]
    )
    self.norm = blocks.make_layer_norm(
      config.width, config.dtype, keys, config.param_dtype
    )
    self.keep_dropout_stream(rngs)

  @draws_own_key
  @method_on_any_mesh("BT", _position_outputs)
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
        equal ids. Learned positions start from 0 at each of them if the config
        has `restart_positions`. None: each row is one document.
      positions_to_predict: integers (B, M), each in [0, T). The logits, and the
        last block's queries and output, are computed only there. Logits at a
        position outside [0, T) are NaN. None: all positions.
      axes: the mesh axes that split batch, heads and time. None: no mesh.
      dropout_key: a PRNG key, which switches dropout on. None: no dropout,
        except after train(), when the model draws a key.

    Raises:
      ValueError: T is larger than the position table, a shape does not fit, or
        there is no key in training mode.
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

  @draws_own_key
  @method_on_any_mesh("BT", _position_outputs)
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
    stream = blocks.run_pairs(
      self.pairs,
      self._embed(
        tokens,
        self._positions(tokens, segment_ids),
        axes=axes,
        dropout_key=dropout_key,
      ),
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

  def _embed(
    self,
    tokens_BT: Array,
    position_BT: Array | None = None,
    *,
    axes: ShardAxes | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Return the residual stream before the first block, (B, T, D).

    Args:
      tokens_BT: int32.
      position_BT: int32, (1, T) for all rows. None: 0 to T − 1.
      axes: the mesh axes. None: no mesh.
      dropout_key: a PRNG key. None: no dropout.
    """
    config = self.config
    dtype = sum_dtype(jnp.dtype(config.dtype))
    x_BTD = look_up(self.token_embedding[...], tokens_BT, axes)
    x_BTD = blocks.place(x_BTD.astype(dtype), axes)
    if self.position_embedding is not None:
      check_length(config, tokens_BT.shape[1])
      if position_BT is None:
        position_BT = token_positions(tokens_BT.shape[1])
      table = self.position_embedding[...]
      x_BTD += look_up(table, position_BT, axes).astype(dtype)
    if dropout_key is None or config.dropout == 0:
      return x_BTD
    dropout = nnx.Dropout(config.dropout)
    return dropout(x_BTD, deterministic=False, rngs=dropout_key)

  def _positions(
    self,
    tokens_BT: Array,
    segment_ids: Array | None,
    start_B: Array | None = None,
  ) -> Array:
    """Return the position of each token, int32 (B, T), or (1, T).

    Args:
      tokens_BT: int32.
      segment_ids: as in a call.
      start_B: int32, the position of each row's first token. None: 0.

    Raises:
      ValueError: positions restart, and `segment_ids` has a wrong shape or
        dtype.
    """
    shape = tokens_BT.shape
    if segment_ids is None or not self.config.restart_positions:
      return token_positions(shape[1], start_B)
    check_not_cut("segment_ids", segment_ids)
    segment_ids = integer_rows("segment_ids", segment_ids)
    if segment_ids.shape != shape:
      raise ValueError(
        f"segment_ids has shape {segment_ids.shape}: expected (B, T) = {shape}"
      )
    return token_positions(shape[1], start_B, segment_ids)

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

  @property
  def has_dropout(self) -> bool:
    """Whether embeddings or a mixer have dropout."""
    return self.config.dropout > 0 or self.pairs.has_dropout

  @property
  def heads_to_split(self) -> int | None:
    """How many heads a mesh may split; None: the mixer has none."""
    return self.pairs.second.mixer.heads_to_split

  @property
  def has_attention_matrix(self) -> bool:
    """Whether `attention_matrix` returns something."""
    return self.pairs.second.mixer.has_attention_matrix

  @method_on_any_mesh("BT", lambda given: "BHT")
  def attention_matrix(self, tokens: Array) -> Array:
    """Return the attention matrix (B, H, T, T) of the last block, to look at.

    Time and memory are quadratic in T.

    Args:
      tokens: integers (B, T).

    Raises:
      NotImplementedError: the mixer has no such matrix.
    """
    tokens = integer_rows("tokens", tokens)
    return blocks.attention_matrix(self.pairs, self._embed(tokens))


def parameter_count(model: nnx.Module) -> int:
  """Return the number of parameters; the tied head counts once."""
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
