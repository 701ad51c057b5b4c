"""Mamba's S6 mixer (arXiv 2312.00752): a selective state-space layer.

    x_t = silu(conv(u W_x)_t),   z_t = u_t W_z
    (δ_t, B_t, C_t) = x_t W_s,   Δ_t = softplus(δ_t W_Δ + b_Δ)
    h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ,   A = −exp(A_log)
    y_t = ( (h_t C_t + D ∘ x_t) ∘ silu(z_t) ) W_o

with I = expand · D channels of N states each. δ has R = ⌈D / 16⌉ numbers. The
convolution is causal and depthwise, with K taps and a bias. Among the linear
layers only W_Δ has a bias.

The initial values are "published" or "intended". The published ones are an
accident of the ReBased paper's code (arXiv 2402.10644): its backbone resets
every linear layer, W_Δ and b_Δ included. So Δ starts at softplus(0) = 0.69, and
a state forgets within two tokens.
"""

import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, selective_scan
from pallas_kernels.numerics import asked_precision, sum_dtype
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.linear import Linear, linear, output_stddev
from rebased_jax.mixer_configs import MambaConfig as MambaConfig
from rebased_jax.mixers.base import Mixer, take_positions
from rebased_jax.mixers.conv import ShortConv

#: The range of Δ at zero input that the intended initial values have.
DELTA_RANGE = (1e-3, 0.1)


class MambaState(NamedTuple):
  """The past of a document."""

  past_BKI: Array  # the convolution's last K − 1 inputs, in the compute dtype
  h_BIN: Array  # float32; float64 if that is the compute dtype


class Mamba(Mixer):
  """The S6 mixer.

  Parameters: in_proj/kernel and gate_proj/kernel (D, I), conv/kernel (K, I),
  conv/bias (I,), x_proj/kernel (I, R + 2 N), dt_proj/kernel (R, I),
  dt_proj/bias (I,), A_log (I, N), D (I,), out_proj/kernel (I, D).

  A mesh may split batch and channels, but not time.
  """

  config_type = MambaConfig
  no_time_axis = "its scan runs over whole rows; split batch or channels"

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: MambaConfig,
    *,
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
      layers: number of layers of the model, for the initial W_o.
      dtype: the compute dtype. None: `param_dtype`.
      param_dtype: dtype of the parameters.
      precision: of float32 products: "default", "high", "highest" or a
        jax.lax.Precision. None: jax's setting.
      kernel_init: draws the initial kernels of all linear layers. None: the
        distributions of the config.
      rngs: draws the initial parameters.

    Raises:
      ValueError: an argument does not fit.
    """
    super().__init__(width, config, dtype=dtype, param_dtype=param_dtype)
    I, N, R = config.expand * width, config.state, math.ceil(width / 16)
    make = functools.partial(
      linear,
      dtype=self.dtype,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      rngs=rngs,
    )
    self.in_proj = make(width, I)
    self.gate_proj = make(width, I)
    self.conv = ShortConv(
      I, config.taps, param_dtype=self.param_dtype, rngs=rngs
    )
    self.x_proj = make(I, R + 2 * N)
    self.scan_dtype = sum_dtype(self.dtype)
    self.implementation = config.implementation
    drawn, bias = nnx.initializers.normal(0.02), nnx.initializers.zeros
    if config.initialization == "intended":
      drawn, bias = _uniform(R**-0.5), _inverse_softplus
    self.dt_proj = Linear(
      R,
      I,
      kernel_init=kernel_init or drawn,
      bias_init=bias,
      dtype=self.scan_dtype,
      param_dtype=self.param_dtype,
      precision=asked_precision(precision, self.scan_dtype),
      rngs=rngs,
    )
    states_N = jnp.arange(1, N + 1, dtype=jnp.float32)
    A_log_IN = jnp.tile(jnp.log(states_N), (I, 1))
    self.A_log = nnx.Param(A_log_IN.astype(self.param_dtype))
    self.D = nnx.Param(jnp.ones(I, self.param_dtype))
    self.out_proj = make(I, width, stddev=output_stddev(layers))

  def init_state(self, batch: int) -> MambaState:
    """Return the state before a document's first token: zeros."""
    I, N = self.A_log.shape[-2:]
    past = self.conv.kernel.shape[-2] - 1
    return MambaState(
      jnp.zeros((batch, past, I), self.dtype),
      jnp.zeros((batch, I, N), self.scan_dtype),
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
    y_BTI, _ = self._scan(x_BTD, state, segment_ids)
    return self._gate_output(
      take_positions(y_BTI, query_positions),
      take_positions(x_BTD, query_positions),
    )

  def _prefill(
    self,
    x_BTD: Array,
    state: MambaState,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, MambaState]:
    del axes
    y_BTI, state = self._scan(x_BTD, state, segment_ids)
    return self._gate_output(y_BTI, x_BTD), state

  def _scan(
    self, x_BTD: Array, state: MambaState, segment_ids: Array | None
  ) -> tuple[Array, MambaState]:
    """Return h_t C_t + D ∘ x_t, (B, T, I), and the state after the row."""
    u_BTI, past_BKI = self.conv(
      self.in_proj(x_BTD), state.past_BKI, segment_ids
    )
    u_BTI = jax.nn.silu(u_BTI)
    parts = self.x_proj(u_BTI).astype(self.scan_dtype)
    R, N = self.dt_proj.kernel.shape[-2], self.A_log.shape[-1]
    dt_BTR, B_BTN, C_BTN = jnp.split(parts, (R, R + N), axis=-1)
    u_BTI = u_BTI.astype(self.scan_dtype)
    # The kernels walk chunks, of which a decoded token is a small part.
    is_step = x_BTD.shape[1] == 1
    y_BTI, h_BIN = selective_scan(
      u_BTI,
      jax.nn.softplus(self.dt_proj(dt_BTR)),
      -jnp.exp(self.A_log[...].astype(self.scan_dtype)),
      B_BTN,
      C_BTN,
      initial_state=state.h_BIN,
      segment_ids=segment_ids,
      implementation="xla" if is_step else self.implementation,
    )
    y_BTI += self.D[...].astype(self.scan_dtype)[None, None] * u_BTI
    return y_BTI.astype(self.dtype), MambaState(past_BKI, h_BIN)

  def _gate_output(self, y_BTI: Array, x_BTD: Array) -> Array:
    return self.out_proj(y_BTI * jax.nn.silu(self.gate_proj(x_BTD)))


def _uniform(bound: float) -> nnx.Initializer:
  """Return an initializer that draws from U(−bound, bound)."""

  def initialize(key, shape, dtype=jnp.float32, **_):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return initialize


def _inverse_softplus(key, shape, dtype=jnp.float32, **_) -> Array:
  """Draw biases b such that softplus(b) is log-uniform in `DELTA_RANGE`."""
  low, high = (math.log(x) for x in DELTA_RANGE)
  delta = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  return delta + jnp.log(-jnp.expm1(-delta))  # softplus of this is delta
