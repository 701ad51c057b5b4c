"""Hyena of order 2 (arXiv 2302.10866): a gated convolution as long as the row.

    (x1, x2, v)_t = conv(W_in u + b_in)_t          K taps, depthwise, bias
    g_t = x1_t ∘ v_t
    y_t = W_out ( x2_t ∘ (Σ_{s≤t} h_{t−s} ∘ g_s + d ∘ g_t) ) + b_out

The filter is implicit, a small network of the lag p = 0 … L − 1:

    h_p = exp(−p/(L−1) · |δ|) ∘ W_4 sin(f ∘ (W_3 sin(f ∘ (W_2 sin(f ∘ (W_1 z_p
          + b_1)) + b_2)) + b_3)),
    z_p = [p/(L−1), cos θ_p, −sin θ_p],   θ_p = 10⁻⁴ · 2π p / L    at the start

with z and f trained, and δ from ln(0.01)/1.5 to ln(0.01)/0.3 over the channels
not. Constants and initial values are zoology's (arXiv 2312.04927): linear
layers N(0, 0.02²), the filter's too, so that h starts near 0; d from N(0, 1).
"""

import dataclasses
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ShardAxes
from pallas_kernels.numerics import sum_dtype
from rebased_jax.mixers import base, conv

FAST, SLOW, TARGET = 0.3, 1.5, 1e-2  # at p = FAST·L a quick channel has TARGET
FREQUENCY = 1e-4  # of the one sine and cosine


@dataclasses.dataclass(frozen=True)
class HyenaConfig(base.MixerConfig):
  """The defaults are zoology's."""

  length: int | None = None  # L of the filter; None: the model's longest row
  taps: int = 3  # K
  filter_width: int = 64  # hidden, of the filter's network

  def __post_init__(self):
    base.positive(self, "length", "taps", "filter_width")

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "Hyena":
    return Hyena(
      site.width,
      self,
      layers=site.layers,
      length=site.length,
      dtype=site.dtype,
      rngs=rngs,
    )


class HyenaState(NamedTuple):
  """A row's past; a token past the filter is not kept."""

  gated_BLD: Array  # g of the L − 1 tokens before, the newest last; float32
  conv_BKD: Array  # the short convolution's K − 1 tokens, 3D wide
  position_B: Array  # int32: tokens of the row so far


class Filter(nnx.Module):
  """h_LD. Parameters: z (L, 3), frequency (W,), layers/{0,1,2,3}/…."""

  def __init__(
    self,
    width: int,
    length: int,
    hidden: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    p_L = np.arange(length)
    angle_L = FREQUENCY * 2 * np.pi * p_L / length
    t_L = p_L / max(length - 1, 1)
    z_L3 = np.stack([t_L, np.cos(angle_L), -np.sin(angle_L)], axis=1)
    self.z = nnx.Param(jnp.asarray(z_L3, jnp.float32))
    self.frequency = nnx.Param(jnp.ones(hidden, jnp.float32))
    make = lambda i, o, use_bias: base.linear(
      i, o, dtype=jnp.dtype(dtype).name, use_bias=use_bias, rngs=rngs
    )
    self.layers = nnx.List(
      [
        make(3, hidden, True),
        make(hidden, hidden, True),
        make(hidden, hidden, True),
        make(hidden, width, False),
      ]
    )
    self.length, self.width, self.dtype = length, width, jnp.dtype(dtype)

  def __call__(self, lags: int) -> Array:
    """h_TD of the first `lags` lags, in its dtype."""
    x_TW = self.z[...][:lags].astype(self.dtype)
    frequency_1W = self.frequency[...].astype(self.dtype)[None]
    for layer in self.layers[:-1]:
      x_TW = jnp.sin(frequency_1W * layer(x_TW))
    rates = np.abs(
      np.linspace(1 / SLOW, 1 / FAST, self.width) * math.log(TARGET)
    )
    t_T = np.arange(lags) / max(self.length - 1, 1)
    window_TD = np.exp(-t_T[:, None] * rates)
    return self.layers[-1](x_TW) * jnp.asarray(window_TD, self.dtype)


class Hyena(base.Mixer):
  """Hyena. Parameters: in_proj/…, conv/…, filter/…, bias (D,), out_proj/….

  Its state grows with the row: it holds L − 1 tokens, and `step` evaluates the
  filter anew, L lags whatever the batch, since no state could follow changing
  parameters; then it is one dot over the past. Tokens past the filter have NaN.
  Segment ids and a time axis raise NotImplementedError, rows longer than the
  filter ValueError. An Inf or NaN spoils its whole row: Fourier transforms mix.
  """

  def __init__(
    self,
    width: int,
    config: HyenaConfig,
    *,
    layers: int = 1,
    length: int | None = None,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    """Raises ValueError where nothing says how long the filter is."""
    base.check_made(width, config, HyenaConfig)
    self.length = config.length or length
    if self.length is None:
      raise ValueError(
        "Hyena's filter has a fixed length, and nothing says which: set "
        "HyenaConfig.length, or ModelConfig.positions"
      )
    self.width, self.taps = width, config.taps
    self.dtype = base.computation(dtype)
    self.in_proj = base.linear(
      width, 3 * width, dtype=dtype, use_bias=True, rngs=rngs
    )
    self.conv = conv.ShortConv(3 * width, config.taps, rngs=rngs)
    self.filter = Filter(
      width, self.length, config.filter_width, sum_dtype(self.dtype), rngs
    )
    self.bias = nnx.Param(
      jax.random.normal(rngs.params(), (width,), jnp.float32)
    )
    self.out_proj = base.linear(
      width,
      width,
      dtype=dtype,
      use_bias=True,
      stddev=base.depth_scaled(layers),
      rngs=rngs,
    )

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    self._check(x_BTD, segment_ids, axes)
    base.check_rows(self, x_BTD, None, query_positions=query_positions)
    past_BKD = self._conv_past(x_BTD.shape[0])
    outer_BTD, g_BTD, _ = self._gate(x_BTD, past_BKD)
    h_TD = self.filter(x_BTD.shape[1])
    o_BTD = self._close(outer_BTD, g_BTD, convolve(g_BTD, h_TD))
    return self.out_proj(base.take_positions(o_BTD, query_positions))

  def init_state(self, batch: int) -> HyenaState:
    acc = sum_dtype(self.dtype)
    return HyenaState(
      jnp.zeros((batch, self.length - 1, self.width), acc),
      self._conv_past(batch),
      jnp.zeros(batch, jnp.int32),
    )

  def prefill(
    self,
    x_BTD: Array,
    state: HyenaState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, HyenaState]:
    self._check(x_BTD, segment_ids, axes)
    base.check_rows(self, x_BTD, None, state=state)
    return self._continue(x_BTD, state, convolve)

  def step(self, x_BD: Array, state: HyenaState) -> tuple[Array, HyenaState]:
    base.check_token(self, x_BD, state)
    last = lambda window_BLD, h_LD: jnp.einsum(
      "bld,ld->bd",
      window_BLD,
      h_LD[::-1],
      precision=jax.lax.Precision.HIGHEST,
    )[:, None]
    y_B1D, state = self._continue(x_BD[:, None], state, last)
    return y_B1D[:, 0], state

  def _continue(self, x_BTD, state, convolution) -> tuple[Array, HyenaState]:
    T, L = x_BTD.shape[1], self.length
    outer_BTD, g_BTD, conv_BKD = self._gate(x_BTD, state.conv_BKD)
    window_BSD = jnp.concatenate([state.gated_BLD, g_BTD], axis=1)
    h_LD = self.filter(L)
    c_BTD = convolution(window_BSD, h_LD)[:, -T:]
    y_BTD = self.out_proj(self._close(outer_BTD, g_BTD, c_BTD))
    t_1T = jnp.arange(T, dtype=jnp.int32)[None]
    inside_BT = state.position_B[:, None] + t_1T < L
    y_BTD = jnp.where(inside_BT[..., None], y_BTD, jnp.nan)
    after_BLD = window_BSD[:, T:]
    return y_BTD, HyenaState(after_BLD, conv_BKD, state.position_B + T)

  def _gate(self, x_BTD, past_BKD) -> tuple[Array, Array, Array]:
    """x2_BTD, g_BTD in float32 or wider, and the short convolution's past."""
    c_BTD, past_BKD = self.conv(
      self.in_proj(x_BTD.astype(self.dtype)), past_BKD
    )
    inner_BTD, outer_BTD, v_BTD = jnp.split(c_BTD, 3, axis=-1)
    acc = sum_dtype(self.dtype)
    return outer_BTD, inner_BTD.astype(acc) * v_BTD.astype(acc), past_BKD

  def _close(self, outer_BTD, g_BTD, c_BTD) -> Array:
    d_11D = self.bias[...].astype(g_BTD.dtype)[None, None]
    return outer_BTD * (c_BTD + d_11D * g_BTD).astype(self.dtype)

  def _conv_past(self, batch: int) -> Array:
    return jnp.zeros((batch, self.taps - 1, 3 * self.width), self.dtype)

  def _check(self, x_BTD, segment_ids, axes) -> None:
    if segment_ids is not None:
      raise NotImplementedError(
        "Hyena takes no segment_ids: its filter runs over the whole row, from "
        "document to document"
      )
    base.refuse_time_axis(
      "Hyena", axes, "its Fourier transforms are of whole rows; split the batch"
    )
    if x_BTD.shape[1] > self.length:
      raise ValueError(
        f"a row of {x_BTD.shape[1]} tokens: Hyena's filter has {self.length} "
        "lags (HyenaConfig.length, or ModelConfig.positions)"
      )


def convolve(x_BSD: Array, h_LD: Array) -> Array:
  """Σ_p h_p ∘ x_{s−p} of every s, by Fourier transforms of ≥ S + L points."""
  S = x_BSD.shape[1]
  points = 1 << (S + h_LD.shape[0] - 1).bit_length()
  spectrum = jnp.fft.rfft(x_BSD, points, axis=1)
  spectrum = spectrum * jnp.fft.rfft(h_LD, points, axis=0)[None]
  return jnp.fft.irfft(spectrum, points, axis=1)[:, :S]
