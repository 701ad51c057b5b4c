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

  def __init__(
    self,
    width: int,
    config: MambaConfig,
    *,
    layers: int = 1,
    dtype: str = "float32",
    precision: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Make the parameters.

    Args:
      width: D.
      config: the mixer's config.
      layers: number of layers of the model, for the initial W_o.
      dtype: name of the compute dtype.
      precision: of float32 products: "default", "high" or "highest". None:
        jax's setting.
      rngs: draws the initial parameters.

    Raises:
      ValueError: an argument does not fit.
    """
    super().__init__(width, config, dtype=dtype)
    I, N, R = config.expand * width, config.state, math.ceil(width / 16)
    make = functools.partial(
      linear, dtype=dtype, precision=precision, rngs=rngs
    )
    self.in_proj = make(width, I)
    self.gate_proj = make(width, I)
    self.conv = ShortConv(I, config.taps, rngs=rngs)
    self.x_proj = make(I, R + 2 * N)
    self.scan_dtype = sum_dtype(self.dtype)
    self.dt_proj = _make_dt_proj(
      R, I, config.initialization, self.scan_dtype, precision, rngs
    )
    states_N = jnp.arange(1, N + 1, dtype=jnp.float32)
    self.A_log = nnx.Param(jnp.tile(jnp.log(states_N), (I, 1)))
    self.D = nnx.Param(jnp.ones(I, jnp.float32))
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
    y_BTI, h_BIN = selective_scan(
      u_BTI,
      jax.nn.softplus(self.dt_proj(dt_BTR)),
      -jnp.exp(self.A_log[...].astype(self.scan_dtype)),
      B_BTN,
      C_BTN,
      initial_state=state.h_BIN,
      segment_ids=segment_ids,
    )
    y_BTI += self.D[...].astype(self.scan_dtype)[None, None] * u_BTI
    return y_BTI.astype(self.dtype), MambaState(past_BKI, h_BIN)

  def _gate_output(self, y_BTI: Array, x_BTD: Array) -> Array:
    return self.out_proj(y_BTI * jax.nn.silu(self.gate_proj(x_BTD)))


def _make_dt_proj(
  rank: int,
  channels: int,
  initialization: str,
  dtype: jnp.dtype,
  precision: str | None,
  rngs: nnx.Rngs,
) -> Linear:
  """Return W_Δ (R, I) and b_Δ (I,) as a linear layer."""
  if initialization == "published":
    return linear(
      rank,
      channels,
      dtype=dtype.name,
      use_bias=True,
      precision=precision,
      rngs=rngs,
    )
  bound = rank**-0.5

  def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  def inverse_softplus(
    key: Array, shape: tuple[int, ...], dtype: jnp.dtype
  ) -> Array:
    low, high = (math.log(x) for x in DELTA_RANGE)
    delta = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return delta + jnp.log(-jnp.expm1(-delta))  # softplus of this is delta

  return Linear(
    rank,
    channels,
    kernel_init=uniform,
    bias_init=inverse_softplus,
    dtype=dtype,
    param_dtype=jnp.float32,
    precision=asked_precision(precision, dtype),
    rngs=rngs,
  )
