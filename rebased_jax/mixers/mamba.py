"""Mamba's S6 mixer (arXiv 2312.00752): a state that the token steers.

    x_t = silu(conv(W_x u)_t),   z_t = W_z u_t
    (δ_t, B_t, C_t) = W_s x_t,   Δ_t = softplus(W_Δ δ_t + b_Δ)
    h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ,   A = −exp(A_log)
    y_t = W_o ( (h_t C_t + D ∘ x_t) ∘ silu(z_t) )

with I = expand · D channels of N states each, δ of R = ⌈D / 16⌉ numbers and a
depthwise causal convolution of K taps with a bias; W_Δ alone has a bias.

The published initialisation is the paper's (arXiv 2402.10644) by accident: its
backbone resets every linear layer, b_Δ and W_Δ included, so Δ starts at
softplus(0) = 0.69 and a state forgets within two tokens.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from pallas_kernels.numerics import sum_dtype
from pallas_kernels.selective_scan import xla
from rebased_jax.mixers import base, conv

DELTA = (1e-3, 0.1)  # Δ of zero input, as intended


@dataclasses.dataclass(frozen=True)
class MambaConfig(base.MixerConfig):
  """The defaults are the paper's.

  "published" draws every projection from N(0, 0.02²), W_o from
  N(0, 0.02² / (2 · layers)), and sets b_Δ to 0. "intended" has W_Δ uniform
  within ±R^−½ and b_Δ such that softplus(b_Δ) is log-uniform in [0.001, 0.1].
  """

  state: int = 16  # N
  taps: int = 4  # K
  expand: int = 2  # I / D
  initialization: Literal["published", "intended"] = "published"

  def __post_init__(self):
    base.positive(self, "state", "taps", "expand")
    base.one_of(self, "initialization", "published", "intended")

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "Mamba":
    return Mamba(
      site.width, self, layers=site.layers, dtype=site.dtype, rngs=rngs
    )


class MambaState(NamedTuple):
  """What a document's past tokens are to later ones."""

  past_BKI: Array  # the convolution's last K − 1 inputs
  h_BIN: Array  # float32 (float64 where that is the computation's dtype)


class Mamba(base.Mixer):
  """The S6 mixer.

  Parameters: in_proj, gate_proj (D, I), conv/{kernel (K, I), bias (I,)}, x_proj
  (I, R + 2 N), dt_proj (R, I) with a bias, A_log (I, N), D (I,), out_proj
  (I, D). Batch and channels may be split over a mesh; time may not.
  """

  def __init__(
    self,
    width: int,
    config: MambaConfig,
    *,
    layers: int = 1,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    base.check_made(width, config, MambaConfig)
    I, N, R = config.expand * width, config.state, math.ceil(width / 16)
    make = lambda *sizes, stddev=0.02: base.linear(
      *sizes, dtype=dtype, rngs=rngs, stddev=stddev
    )
    self.in_proj, self.gate_proj = make(width, I), make(width, I)
    self.conv = conv.ShortConv(I, config.taps, rngs=rngs)
    self.x_proj = make(I, R + 2 * N)
    self.width, self.dtype = width, base.computation(dtype)
    self.acc = sum_dtype(self.dtype)  # the scan's
    self.dt_proj = _dt_proj(R, I, config.initialization, self.acc, rngs)
    states_N = jnp.arange(1, N + 1, dtype=jnp.float32)
    self.A_log = nnx.Param(jnp.tile(jnp.log(states_N), (I, 1)))
    self.D = nnx.Param(jnp.ones(I, jnp.float32))
    self.out_proj = make(I, width, stddev=base.depth_scaled(layers))

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    base.check_rows(self, x_BTD, segment_ids, query_positions=query_positions)
    state = self.init_state(x_BTD.shape[0])
    y_BTI, _ = self._mix(x_BTD, state, segment_ids, axes)
    take = lambda x: base.take_positions(x, query_positions)
    return self._out(take(y_BTI), take(x_BTD))

  def init_state(self, batch: int) -> MambaState:
    I, N = self.A_log.shape[-2:]
    past = self.conv.kernel.shape[-2] - 1
    return MambaState(
      jnp.zeros((batch, past, I), self.dtype),
      jnp.zeros((batch, I, N), self.acc),
    )

  def prefill(
    self,
    x_BTD: Array,
    state: MambaState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, MambaState]:
    """y_BTD of T more tokens, and the state after them.

    Raises:
      NotImplementedError: `axes` splits time.
    """
    base.check_rows(self, x_BTD, segment_ids, state=state)
    y_BTI, state = self._mix(x_BTD, state, segment_ids, axes)
    return self._out(y_BTI, x_BTD), state

  def step(self, x_BD: Array, state: MambaState) -> tuple[Array, MambaState]:
    base.check_token(self, x_BD, state)
    y_B1D, state = self.prefill(x_BD[:, None], state)
    return y_B1D[:, 0], state

  def _mix(self, x_BTD, state, segment_ids, axes) -> tuple[Array, MambaState]:
    """h_t C_t + D ∘ x_t of every token, and the state after the last."""
    base.refuse_time_axis(
      "Mamba", axes, "its scan runs over whole rows; split batch or channels"
    )
    u_BTI, past_BKI = self.conv(
      self.in_proj(x_BTD), state.past_BKI, segment_ids
    )
    u_BTI = jax.nn.silu(u_BTI)
    steered = self.x_proj(u_BTI).astype(self.acc)
    R, N = self.dt_proj.kernel.shape[-2], self.A_log.shape[-1]
    dt_BTR, B_BTN, C_BTN = jnp.split(steered, (R, R + N), axis=-1)
    u_BTI = u_BTI.astype(self.acc)
    y_BTI, h_BIN = xla.selective_scan(
      u_BTI,
      jax.nn.softplus(self.dt_proj(dt_BTR)),
      -jnp.exp(self.A_log[...].astype(self.acc)),
      B_BTN,
      C_BTN,
      state.h_BIN,
      segment_ids=segment_ids,
    )
    y_BTI += self.D[...].astype(self.acc)[None, None] * u_BTI
    return y_BTI.astype(self.dtype), MambaState(past_BKI, h_BIN)

  def _out(self, y_BTI: Array, x_BTD: Array) -> Array:
    return self.out_proj(y_BTI * jax.nn.silu(self.gate_proj(x_BTD)))


def _dt_proj(rank: int, inner: int, initialization: str, dtype, rngs: nnx.Rngs):
  """W_Δ and b_Δ."""
  if initialization == "published":
    return base.linear(rank, inner, dtype=dtype.name, use_bias=True, rngs=rngs)
  bound = rank**-0.5

  def bias_init(key, shape, dtype):
    low, high = (math.log(x) for x in DELTA)
    delta = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return delta + jnp.log(-jnp.expm1(-delta))  # softplus of it is delta

  return base.Linear(
    rank,
    inner,
    kernel_init=lambda key, shape, dtype: jax.random.uniform(
      key, shape, dtype, -bound, bound
    ),
    bias_init=bias_init,
    dtype=dtype,
    param_dtype=jnp.float32,
    rngs=rngs,
  )
