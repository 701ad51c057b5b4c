"""Multi-head softmax attention (arXiv 1706.03762), causal.

    q_t, k_t, v_t = split(x_t W_qkv + b)         for each head, F = D / H wide
    a_ts = softmax_s( q_t·k_s / √F )             over s ≤ t of t's document
    y_t  = concat_heads(Σ_s a_ts v_s) W_O + b_O

With `rotary`, q_t and k_t are rotated in the planes (i, i + F/2) by the angle
p · 10000^(−2i/F), where p is t's position in its document (arXiv 2104.09864).
A packed document so has the output that it has alone.

The state is a cache of fixed length. Attention takes quadratic time and linear
memory, and is the baseline that linear attention is measured against.
"""

import functools
from typing import NamedTuple

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, devices
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.linear import linear, output_stddev
from rebased_jax.mixer_configs import AttentionConfig as AttentionConfig
from rebased_jax.mixers import softmax
from rebased_jax.mixers.base import Mixer, take_positions, tree_bytes


class AttentionState(NamedTuple):
  """The keys and values of one document's past tokens, in S slots.

  Slots from `position` on are 0. A token after the last slot is not kept.
  """

  k_BSHF: Array  # in the compute dtype, rotated if the config says so
  v_BSHF: Array  # in the compute dtype
  position_B: Array  # int32, the number of the document's tokens so far


class Attention(Mixer):
  """Softmax attention.

  Parameters: qkv/kernel (D, 3 D), qkv/bias (3 D,), out_proj/kernel (D, D),
  out_proj/bias (D,).

  A token that has no slot in the cache of a state has NaN as its output.
  """

  config_type = AttentionConfig
  no_time_axis = "its scores are of whole rows; split batch or heads"

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: AttentionConfig,
    *,
    layers: int = 1,
    length: int | None = None,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
    precision: Precision | None = None,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Make the projections.

    Args:
      width: D.
      config: the mixer's config.
      layers: number of layers of the model. W_O starts from
        N(0, 0.02² / (2 · layers)).
      length: tokens that the cache of a state holds, where the config does not
        say it. None: `init_state` raises ValueError.
      dtype: the compute dtype. None: `param_dtype`.
      param_dtype: dtype of the parameters.
      precision: of float32 products: "default", "high", "highest" or a
        jax.lax.Precision. None: jax's setting.
      kernel_init: draws the initial kernels of all linear layers. None: the
        distributions of the config.
      rngs: draws the initial parameters.

    Raises:
      ValueError: an argument does not fit, or the heads do not fit the width.
    """
    super().__init__(width, config, dtype=dtype, param_dtype=param_dtype)
    _check_heads(config, width)
    make = functools.partial(
      linear,
      dtype=self.dtype,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      rngs=rngs,
    )
    self.qkv = make(width, 3 * width, use_bias=config.use_bias)
    self.out_proj = make(
      width, width, use_bias=True, stddev=output_stddev(layers)
    )
    self.heads = config.heads
    self.heads_to_split = config.heads
    self.rotary = config.rotary
    self.length = config.length or length
    self.implementation = config.implementation
    self.dropout = config.dropout
    self.takes_dropout_key = config.dropout > 0
    self.keep_dropout_stream(rngs)

  def _mix(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
    query_positions: Array | None,
    dropout_key: Array | None = None,
  ) -> Array:
    del axes  # XLA splits batch and heads by itself
    runs_BT = softmax.runs(segment_ids, x_BTD.shape[1])
    q_BTHF, k_BTHF, v_BTHF = self._project(x_BTD, softmax.steps(runs_BT))
    if dropout_key is None and self._takes_cudnn(segment_ids):
      named = self.implementation == "cudnn"
      o_BTHF = softmax.attend_by_cudnn(q_BTHF, k_BTHF, v_BTHF, named=named)
      o_BTD = _merge_heads(o_BTHF)
      return self.out_proj(take_positions(o_BTD, query_positions))
    q_BMD = take_positions(_merge_heads(q_BTHF), query_positions)
    o_BMHF = softmax.attend(
      self._split_heads(q_BMD),
      k_BTHF,
      v_BTHF,
      softmax.visible(runs_BT, query_positions),
      dropout=self.dropout,
      dropout_key=dropout_key,
    )
    return self.out_proj(_merge_heads(o_BMHF))

  def init_state(self, batch: int) -> AttentionState:
    """Return an empty cache.

    Raises:
      ValueError: neither the config nor the model says how long it is.
    """
    if self.length is None:
      raise ValueError(
        "Attention keeps its past in a cache of fixed length, and nothing says "
        "how long it is: set AttentionConfig.length or ModelConfig.positions"
      )
    return self._empty_cache(batch, self.length)

  def _prefill(
    self,
    x_BTD: Array,
    state: AttentionState,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, AttentionState]:
    del axes
    B, T, S = *x_BTD.shape[:2], state.k_BSHF.shape[1]
    runs_BT = jnp.broadcast_to(softmax.runs(segment_ids, T), (B, T))
    is_first_BT = runs_BT == 0
    is_last_BT = runs_BT == runs_BT[:, -1:]
    position_B1 = state.position_B[:, None]
    steps_BT = softmax.steps(runs_BT) + jnp.where(is_first_BT, position_B1, 0)
    q_BTHF, k_BTHF, v_BTHF = self._project(x_BTD, steps_BT)

    # The cache belongs to the first document: other tokens do not see it.
    is_held_BS = jnp.arange(S, dtype=jnp.int32)[None] < position_B1
    past_BTS = is_first_BT[:, :, None] & is_held_BS[:, None]
    o_BTHF = softmax.attend(
      q_BTHF,
      jnp.concatenate([state.k_BSHF, k_BTHF], axis=1),
      jnp.concatenate([state.v_BSHF, v_BTHF], axis=1),
      jnp.concatenate([past_BTS, softmax.visible(runs_BT)], axis=2),
    )
    y_BTD = self._project_out(o_BTHF, steps_BT, S)

    # Slot S does not exist, so that tokens of earlier documents are dropped.
    slots_BT = jnp.where(is_last_BT, steps_BT, S)
    keeps_past_B111 = is_first_BT[:, -1, None, None, None]

    def updated(cache_BSHF: Array, x_BTHF: Array) -> Array:
      past_BSHF = jnp.where(keeps_past_B111, cache_BSHF, 0)
      return _put(past_BSHF, slots_BT, x_BTHF)

    return y_BTD, AttentionState(
      updated(state.k_BSHF, k_BTHF),
      updated(state.v_BSHF, v_BTHF),
      steps_BT[:, -1] + 1,
    )

  def _step(
    self, x_BD: Array, state: AttentionState
  ) -> tuple[Array, AttentionState]:
    S = state.k_BSHF.shape[1]
    position_B1 = state.position_B[:, None]
    q_B1HF, k_B1HF, v_B1HF = self._project(x_BD[:, None], position_B1)
    k_BSHF = _put(state.k_BSHF, position_B1, k_B1HF)
    v_BSHF = _put(state.v_BSHF, position_B1, v_B1HF)
    is_held_BS = jnp.arange(S, dtype=jnp.int32)[None] <= position_B1
    o_B1HF = softmax.attend(
      q_B1HF, k_BSHF, v_BSHF, is_held_BS[:, None], sees_all=True
    )
    y_B1D = self._project_out(o_B1HF, position_B1, S)
    return y_B1D[:, 0], AttentionState(k_BSHF, v_BSHF, state.position_B + 1)

  def state_size(self, length: int) -> int:
    """Return the bytes of the cache, which does not grow.

    Args:
      length: slots of the cache, where neither the config nor the model says
        how long it is.
    """
    return tree_bytes(lambda: self._empty_cache(1, self.length or length))

  def attention_matrix(self, x_BTD: Array) -> Array:
    """Return a (B, H, T, T), to look at; quadratic in T."""
    runs_1T = softmax.runs(None, x_BTD.shape[1])
    q_BTHF, k_BTHF, _ = self._project(x_BTD, softmax.steps(runs_1T))
    return softmax.weights(q_BTHF, k_BTHF, softmax.visible(runs_1T))

  def _project(
    self, x_BTD: Array, steps_BT: Array
  ) -> tuple[Array, Array, Array]:
    """Return q, k and v (B, T, H, F) of tokens at positions of a document."""
    parts = softmax.project_to_thirds(self.qkv, x_BTD.astype(self.dtype))
    q, k, v = (self._split_heads(part_BTD) for part_BTD in parts)
    if self.rotary:
      q, k = softmax.rotate(q, steps_BT), softmax.rotate(k, steps_BT)
    return q, k, v

  def _split_heads(self, x_BTD: Array) -> Array:
    return x_BTD.reshape(*x_BTD.shape[:2], self.heads, -1)

  def _project_out(self, o_BTHF: Array, steps_BT: Array, slots: int) -> Array:
    """Return y (B, T, D), NaN for tokens that the cache has no slot for."""
    y_BTD = self.out_proj(_merge_heads(o_BTHF))
    return jnp.where(steps_BT[..., None] < slots, y_BTD, jnp.nan)

  def _empty_cache(self, batch: int, length: int) -> AttentionState:
    shape = batch, length, self.heads, self.width // self.heads
    return AttentionState(
      jnp.zeros(shape, self.dtype),
      jnp.zeros(shape, self.dtype),
      jnp.zeros(batch, jnp.int32),
    )

  def _takes_cudnn(self, segment_ids: Array | None) -> bool:
    """Whether cuDNN computes this call.

    Raises:
      NotImplementedError: the config names cuDNN, and cuDNN cannot do it.
    """
    named = self.implementation == "cudnn"
    if self.implementation == "xla" or (segment_ids is not None and not named):
      return False
    if segment_ids is not None:
      raise NotImplementedError(
        "AttentionConfig.implementation='cudnn' keeps no documents apart: "
        "expected no segment_ids, or implementation='xla'"
      )
    reason = devices.why_not_cudnn(self.dtype, self.width // self.heads)
    if named and reason is not None:
      raise NotImplementedError(
        f"AttentionConfig.implementation='cudnn' {reason}"
      )
    return reason is None


def _put(cache_BSHF: Array, slots_BT: Array, x_BTHF: Array) -> Array:
  """Return the cache with x in these slots; other slots are dropped."""
  rows_B1 = jnp.arange(len(slots_BT))[:, None]
  return cache_BSHF.at[rows_B1, slots_BT].set(x_BTHF, mode="drop")


def _merge_heads(x_BTHF: Array) -> Array:
  return x_BTHF.reshape(*x_BTHF.shape[:2], -1)


def _check_heads(config: AttentionConfig, width: int) -> None:
  """Check that the heads fit the width.

  Raises:
    ValueError: they do not.
  """
  F, rest = divmod(width, config.heads)
  if rest:
    raise ValueError(
      f"AttentionConfig.heads={config.heads} at width {width}: expected a "
      "divisor of the width"
    )
  if config.rotary and F % 2:
    raise ValueError(
      f"AttentionConfig.rotary with heads={config.heads} at width {width}: "
      f"expected an even head width, not {F}"
    )
