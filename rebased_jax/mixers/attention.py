"""Multi-head softmax attention (arXiv 1706.03762), causal.

    q_t, k_t, v_t = W_qkv x_t + b                a head each, F = D / H wide
    a_ts = softmax_s( q_t·k_s / √F )             over s ≤ t of t's document
    y_t  = W_o concat_h( Σ_s a_ts v_s ) + b_o

With `rotary`, q_t and k_t are turned in the planes (i, i + F/2) by the angle
p · 10000^(−2i/F), where p counts the tokens of the document from 0 (arXiv
2104.09864): a packed document is what it is alone.

Its state is a cache of fixed length, so it is quadratic in time and linear in
memory, which is what linear attention is measured against.
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, devices
from rebased_jax.mixers import base, softmax

IMPLEMENTATIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class AttentionConfig(base.MixerConfig):
  """The defaults are the ReBased paper's, one head as in its code.

  But for its dropout of the weights in training, 0.1, which is not here.

  `implementation` is of whole rows; states and documents are always "xla". None
  is "cudnn" on a GPU that has it for the dtype and the head width, in a call
  without documents; else "xla".
  """

  heads: int = 1  # H
  use_bias: bool = True  # of q, k and v; the output always has one
  rotary: bool = False
  length: int | None = None  # of the cache; None: the longest row of the model
  implementation: str | None = None

  def __post_init__(self):
    base.positive(self, "heads", "length")
    if self.implementation not in (None, *IMPLEMENTATIONS):
      raise ValueError(
        f"AttentionConfig.implementation={self.implementation!r}: expected "
        f"None or one of {IMPLEMENTATIONS}"
      )

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "Attention":
    return Attention(
      site.width,
      self,
      layers=site.layers,
      length=site.length,
      dtype=site.dtype,
      rngs=rngs,
    )


class AttentionState(NamedTuple):
  """The keys and values of one document's past tokens.

  Slots from `position` on are 0. A token past the last slot is not kept.
  """

  k_BSHF: Array  # in the dtype of the computation, turned if rotary
  v_BSHF: Array
  position_B: Array  # int32: tokens of the document so far


class Attention(base.Mixer):
  """Softmax attention. Parameters: qkv/…, out_proj/….

  Where tokens of a document do not fit in the cache of a state, their y is NaN.
  A time axis in `axes` raises NotImplementedError.
  """

  def __init__(
    self,
    width: int,
    config: AttentionConfig,
    *,
    layers: int = 1,
    length: int | None = None,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Raises ValueError where the heads do not fit the width.

    Args:
      width: D.
      config: what it is.
      layers: of the model; W_o starts from N(0, 0.02² / (2 · layers)).
      length: of the cache, unless the config says it.
      dtype: of the computation.
      rngs: of the initial parameters.
    """
    base.check_made(width, config, AttentionConfig)
    _check_heads(config, width)
    self.qkv = base.linear(
      width, 3 * width, dtype=dtype, rngs=rngs, use_bias=config.use_bias
    )
    self.out_proj = base.linear(
      width,
      width,
      dtype=dtype,
      rngs=rngs,
      use_bias=True,
      stddev=base.depth_scaled(layers),
    )
    self.width, self.heads = width, config.heads
    self.rotary = config.rotary
    self.length = config.length or length
    self.implementation = config.implementation
    self.dtype = base.computation(dtype)

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    self._check_axes(axes)
    base.check_rows(self, x_BTD, segment_ids, query_positions=query_positions)
    runs_BT = softmax.runs(segment_ids, x_BTD.shape[1])
    q_BTHF, k_BTHF, v_BTHF = self._project(x_BTD, softmax.steps(runs_BT))
    if self._takes_cudnn(segment_ids):
      o_BTD = _merge_heads(softmax.by_cudnn(q_BTHF, k_BTHF, v_BTHF))
      return self.out_proj(base.take_positions(o_BTD, query_positions))
    q_BMD = base.take_positions(_merge_heads(q_BTHF), query_positions)
    o_BMHF = softmax.attend(
      self._split_heads(q_BMD),
      k_BTHF,
      v_BTHF,
      softmax.visible(runs_BT, query_positions),
      documents=segment_ids is not None,
    )
    return self.out_proj(_merge_heads(o_BMHF))

  def init_state(self, batch: int) -> AttentionState:
    """An empty cache; ValueError where nothing says how long it is."""
    if self.length is None:
      raise ValueError(
        "Attention keeps its past in a cache of fixed length, and nothing says "
        "which: set AttentionConfig.length, or ModelConfig.positions"
      )
    return self._empty(batch, self.length)

  def prefill(
    self,
    x_BTD: Array,
    state: AttentionState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, AttentionState]:
    self._check_axes(axes)
    base.check_rows(self, x_BTD, segment_ids, state=state)
    B, T, S = *x_BTD.shape[:2], state.k_BSHF.shape[1]
    runs_BT = jnp.broadcast_to(softmax.runs(segment_ids, T), (B, T))
    first_BT, last_BT = runs_BT == 0, runs_BT == runs_BT[:, -1:]
    position_B1 = state.position_B[:, None]
    steps_BT = softmax.steps(runs_BT) + jnp.where(first_BT, position_B1, 0)
    q_BTHF, k_BTHF, v_BTHF = self._project(x_BTD, steps_BT)
    held_BS = jnp.arange(S, dtype=jnp.int32)[None] < position_B1
    past_BTS = first_BT[:, :, None] & held_BS[:, None]
    o_BTHF = softmax.attend(
      q_BTHF,
      jnp.concatenate([state.k_BSHF, k_BTHF], axis=1),
      jnp.concatenate([state.v_BSHF, v_BTHF], axis=1),
      jnp.concatenate([past_BTS, softmax.visible(runs_BT)], axis=2),
      documents=segment_ids is not None,
    )
    y_BTD = self._out_of_cache(o_BTHF, steps_BT, S)
    # A slot S drops what is of an earlier document.
    slots_BT = jnp.where(last_BT, steps_BT, S)
    kept_B111 = first_BT[:, -1, None, None, None]
    keep = lambda cache_BSHF, x_BTHF: _put(
      jnp.where(kept_B111, cache_BSHF, 0), slots_BT, x_BTHF
    )
    return y_BTD, AttentionState(
      keep(state.k_BSHF, k_BTHF),
      keep(state.v_BSHF, v_BTHF),
      steps_BT[:, -1] + 1,
    )

  def step(
    self, x_BD: Array, state: AttentionState
  ) -> tuple[Array, AttentionState]:
    base.check_token(self, x_BD, state)
    S = state.k_BSHF.shape[1]
    position_B1 = state.position_B[:, None]
    q_B1HF, k_B1HF, v_B1HF = self._project(x_BD[:, None], position_B1)
    k_BSHF = _put(state.k_BSHF, position_B1, k_B1HF)
    v_BSHF = _put(state.v_BSHF, position_B1, v_B1HF)
    held_BS = jnp.arange(S, dtype=jnp.int32)[None] <= position_B1
    o_B1HF = softmax.attend(
      q_B1HF, k_BSHF, v_BSHF, held_BS[:, None], documents=False
    )
    y_B1D = self._out_of_cache(o_B1HF, position_B1, S)
    return y_B1D[:, 0], AttentionState(k_BSHF, v_BSHF, state.position_B + 1)

  def state_size(self, length: int) -> int:
    """Bytes of the cache; without a length of its own, of one of `length`."""
    return base.tree_bytes(lambda: self._empty(1, self.length or length))

  def attention_matrix(self, x_BTD: Array) -> Array:
    """a_BHTT; quadratic, to look at."""
    runs_1T = softmax.runs(None, x_BTD.shape[1])
    q_BTHF, k_BTHF, _ = self._project(x_BTD, softmax.steps(runs_1T))
    return softmax.weights(q_BTHF, k_BTHF, softmax.visible(runs_1T))

  def _project(self, x_BTD: Array, steps_BT: Array) -> tuple[Array, ...]:
    """q, k and v (B, T, H, F) of tokens at these positions of a document."""
    x_BTD = x_BTD.astype(self.dtype)
    q, k, v = map(self._split_heads, softmax.thirds(self.qkv, x_BTD))
    if self.rotary:
      q, k = softmax.turn(q, steps_BT), softmax.turn(k, steps_BT)
    return q, k, v

  def _split_heads(self, x_BTD: Array) -> Array:
    return x_BTD.reshape(*x_BTD.shape[:2], self.heads, -1)

  def _out_of_cache(self, o_BTHF: Array, steps_BT: Array, slots: int) -> Array:
    """y_BTD, NaN for tokens that the cache has no slot for."""
    y_BTD = self.out_proj(_merge_heads(o_BTHF))
    return jnp.where(steps_BT[..., None] < slots, y_BTD, jnp.nan)

  def _empty(self, batch: int, length: int) -> AttentionState:
    cache = lambda: jnp.zeros(
      (batch, length, self.heads, self.width // self.heads), self.dtype
    )
    return AttentionState(cache(), cache(), jnp.zeros(batch, jnp.int32))

  def _check_axes(self, axes: ShardAxes | None) -> None:
    base.refuse_time_axis(
      "Attention", axes, "its scores are of whole rows; split batch or heads"
    )

  def _takes_cudnn(self, segment_ids: Array | None) -> bool:
    """Whether whole rows go to cuDNN.

    Raises:
      NotImplementedError: it was named, and cannot.
    """
    named = self.implementation == "cudnn"
    if self.implementation == "xla" or (segment_ids is not None and not named):
      return False
    if segment_ids is not None:
      raise NotImplementedError(
        "AttentionConfig.implementation='cudnn' keeps no documents apart: "
        "expected no segment_ids, or 'xla'"
      )
    reason = devices.why_not_cudnn(self.dtype, self.width // self.heads)
    if named and reason is not None:
      raise NotImplementedError(
        f"AttentionConfig.implementation='cudnn' {reason}"
      )
    return reason is None


def _put(cache_BSHF: Array, slots_BT: Array, x_BTHF: Array) -> Array:
  """The cache with x in these slots; a slot past the last drops it."""
  rows_B1 = jnp.arange(len(slots_BT))[:, None]
  return cache_BSHF.at[rows_B1, slots_BT].set(x_BTHF, mode="drop")


def _merge_heads(x_BTHF: Array) -> Array:
  return x_BTHF.reshape(*x_BTHF.shape[:2], -1)


def _check_heads(config: AttentionConfig, width: int) -> None:
  """Raises ValueError where the heads do not fit the width."""
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
