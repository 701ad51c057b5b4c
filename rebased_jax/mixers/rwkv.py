"""RWKV-4's time-mix (arXiv 2305.13048).

    x̃_j = μ_j ∘ x_t + (1 − μ_j) ∘ x_{t−1}                   for j in k, v, r
    k_t = x̃_k W_k,  v_t = x̃_v W_v,  r_t = x̃_r W_r
    y_t = (σ(r_t) ∘ wkv_t) W_o

where x = 0 before a document's first token. Each channel has a weighted mean of
its past values,

    wkv_t = (Σ_{i<t} e^{(t−1−i) w + k_i} v_i + e^{u + k_t} v_t)
            / (Σ_{i<t} e^{(t−1−i) w + k_i} + e^{u + k_t}),      w = −e^{decay}

`pallas_kernels.wkv` computes it in chunks, without the limit of 2048 tokens
that the official CUDA kernel has. A decay above 40 counts as 40, where e^w has
long been 0.
"""

from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import (
  ShardAxes,
  WKVState,
  document_runs,
  empty_wkv_state,
  numerics,
  wkv,
  wkv_step,
)
from pallas_kernels.numerics import asked_precision, sum_dtype
from pallas_kernels.plain_derivatives import OwnDerivative
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.linear import Linear
from rebased_jax.mixer_configs import RWKVConfig as RWKVConfig
from rebased_jax.mixers.base import Mixer, take_positions

_LARGEST_DECAY = 40.0


class RWKVState(NamedTuple):
  """The past of a document."""

  last_BD: Array  # the last token, in the compute dtype
  sums: WKVState  # the two sums of wkv, (B, D) each, scaled by e^(−maximum)


class RWKV(Mixer):
  """The time-mix.

  Parameters: decay, first (u), mix_k, mix_v, mix_r (μ), (D,) each, and
  {k,v,r,o}/kernel (D, D). That is 4 D² + 5 D numbers. The first five start at
  values that differ from channel to channel and depend on the layer.

  The backward pass keeps k, v, and the sums before each of √T chunks. A mesh
  may split batch and channels, but not time.
  """

  config_type = RWKVConfig
  no_time_axis = "its sums run from chunk to chunk; split batch or channels"

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: RWKVConfig,
    *,
    layer: int = 0,
    layers: int = 1,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
    precision: Precision | None = None,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Make the parameters.

    Args:
      width: D.
      config: the mixer's config.
      layer: index of the layer, from 0, for the initial values.
      layers: number of layers of the model, for the initial values.
      dtype: the compute dtype. None: `param_dtype`.
      param_dtype: dtype of the parameters.
      precision: of float32 products: "default", "high", "highest" or a
        jax.lax.Precision. None: jax's setting.
      kernel_init: draws the initial kernels of all linear layers. None: the
        distributions of the config.
      rngs: draws the initial projections.

    Raises:
      ValueError: an argument does not fit.
    """
    super().__init__(width, config, dtype=dtype, param_dtype=param_dtype)
    start = jax.tree.map(
      lambda x_D: nnx.Param(x_D.astype(self.param_dtype)),
      _initial_values(width, layer, layers),
    )
    self.decay, self.first = start.decay_D, start.first_D
    self.mix_k, self.mix_v, self.mix_r = start[2:]

    def projection(drawn: nnx.Initializer) -> Linear:
      return Linear(
        width,
        width,
        use_bias=False,
        kernel_init=kernel_init or drawn,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        precision=asked_precision(precision, self.dtype),
        rngs=rngs,
      )

    if config.initialization == "published":
      uniform = _uniform(width**-0.5)  # PyTorch's default
      self.k, self.v = projection(uniform), projection(uniform)
      self.r, self.o = projection(uniform), projection(uniform)
    else:
      zeros = nnx.initializers.zeros
      self.k = projection(zeros)
      self.v = projection(nnx.initializers.normal(0.02))
      self.r, self.o = projection(zeros), projection(zeros)
    self.rounded = config.wkv_dtype == "bfloat16"
    self.sums_dtype = sum_dtype(self.dtype)
    self.implementation = config.implementation

  def init_state(self, batch: int) -> RWKVState:
    """Return the state before a document's first token: no past."""
    shape = batch, self.width
    return RWKVState(
      jnp.zeros(shape, self.dtype), empty_wkv_state(shape, self.sums_dtype)
    )

  def _mix(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
    query_positions: Array | None,
  ) -> Array:
    del axes  # XLA splits batch and channels by itself
    state = self.init_state(x_BTD.shape[0])
    y_BMD, _ = self._whole_rows(x_BTD, state, segment_ids, query_positions)
    return y_BMD

  def _prefill(
    self,
    x_BTD: Array,
    state: RWKVState,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, RWKVState]:
    del axes
    return self._whole_rows(x_BTD, state, segment_ids, None)

  def _whole_rows(
    self,
    x_BTD: Array,
    state: RWKVState,
    segment_ids: Array | None,
    positions_BM: Array | None,
  ) -> tuple[Array, RWKVState]:
    """Return y at all or at chosen positions, and the state after the row."""
    x_BTD = x_BTD.astype(self.dtype)
    before_BTD = jnp.concatenate(
      [state.last_BD[:, None], x_BTD[:, :-1]], axis=1
    )
    if segment_ids is not None:
      is_new_BT = jnp.diff(document_runs(segment_ids), axis=1) > 0
      starts_BT = jnp.pad(is_new_BT, ((0, 0), (1, 0)))
      before_BTD = jnp.where(starts_BT[..., None], 0, before_BTD)
    k_BTD, v_BTD = self._keys_and_values(x_BTD, before_BTD)
    w_D, u_D = self._decay_and_first()
    o_BTD, sums = wkv(
      k_BTD,
      v_BTD,
      w_D,
      u_D,
      initial_state=state.sums,
      segment_ids=segment_ids,
      implementation=self.implementation,
    )
    y_BMD = self._gate_output(
      take_positions(self._rounded(o_BTD), positions_BM),
      take_positions(x_BTD, positions_BM),
      take_positions(before_BTD, positions_BM),
    )
    return y_BMD, RWKVState(x_BTD[:, -1], sums)

  def _step(self, x_BD: Array, state: RWKVState) -> tuple[Array, RWKVState]:
    x_BD = x_BD.astype(self.dtype)
    k_BD, v_BD = self._keys_and_values(x_BD, state.last_BD)
    w_D, u_D = self._decay_and_first()
    o_BD, sums = wkv_step(
      k_BD.astype(self.sums_dtype),
      v_BD.astype(self.sums_dtype),
      w_D,
      u_D,
      state.sums,
    )
    o_BD = self._rounded(o_BD).astype(self.dtype)
    y_BD = self._gate_output(o_BD, x_BD, state.last_BD)
    return y_BD, RWKVState(x_BD, sums)

  def _shift(self, mix: nnx.Param, x: Array, before: Array) -> Array:
    """Return μ ∘ x + (1 − μ) ∘ the token before."""
    mix_D = mix[...].astype(sum_dtype(self.dtype))
    now = numerics.scale_channels(x, mix_D)
    return now + numerics.scale_channels(before, 1 - mix_D)

  def _keys_and_values(self, x: Array, before: Array) -> tuple[Array, Array]:
    k = self.k(self._shift(self.mix_k, x, before))
    v = self.v(self._shift(self.mix_v, x, before))
    if self.rounded:
      k, v = _round_gradient(k), _round_gradient(v)
    return k, v

  def _decay_and_first(self) -> tuple[Array, Array]:
    """Return w and u (D,), in the dtype of the sums."""
    decay_D, u_D = self.decay[...], self.first[...]
    if self.rounded:
      decay_D, u_D = _round_gradient(decay_D), _round_gradient(u_D)
    decay_D = jnp.minimum(decay_D.astype(self.sums_dtype), _LARGEST_DECAY)
    return -jnp.exp(decay_D), u_D.astype(self.sums_dtype)

  def _rounded(self, o: Array) -> Array:
    return _round_to_bfloat16(o) if self.rounded else o

  def _gate_output(self, o: Array, x: Array, before: Array) -> Array:
    r = self.r(self._shift(self.mix_r, x, before))
    return self.o(jax.nn.sigmoid(r) * o)


class _InitialValues(NamedTuple):
  decay_D: Array
  first_D: Array
  mix_k_D: Array
  mix_v_D: Array
  mix_r_D: Array


def _initial_values(width: int, layer: int, layers: int) -> _InitialValues:
  """Return the initial values of the (D,) parameters, as in RWKV's code."""
  i_D = jnp.arange(width, dtype=jnp.float32)
  depth = layer / max(layers - 1, 1)  # from 0 to 1
  speed_D = (i_D / max(width - 1, 1)) ** (0.7 + 1.3 * depth)
  mix_D = (i_D / width) ** (1 - layer / layers)
  return _InitialValues(
    decay_D=-5 + 8 * speed_D,
    first_D=jnp.log(0.3) + 0.5 * ((i_D + 1) % 3 - 1),
    mix_k_D=mix_D,
    mix_v_D=mix_D + 0.3 * depth,
    mix_r_D=jnp.sqrt(mix_D),
  )


def _uniform(bound: float) -> nnx.Initializer:
  """Return an initializer that draws from U(−bound, bound)."""

  def initialize(key, shape, dtype=jnp.float32, **_):
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

  return initialize


def _round_to_bfloat16(x: Array) -> Array:
  """Return x rounded to bfloat16 values, in its dtype; so is its gradient."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@OwnDerivative
def _round_gradient(x: Array) -> Array:
  """Return x itself; its gradient is rounded to bfloat16 values."""
  return x


def _round_gradient_forward(x: Array) -> tuple[Array, None]:
  return x, None


def _round_gradient_backward(_: None, dx: Array) -> tuple[Array]:
  return (_round_to_bfloat16(dx),)


_round_gradient.defvjp(_round_gradient_forward, _round_gradient_backward)
