"""Hyena of order 2 (arXiv 2302.10866): a gated convolution as long as the row.

    (x1, x2, v)_t = conv(u W_in + b_in)_t          K taps, depthwise, bias
    g_t = x1_t ∘ v_t
    y_t = ( x2_t ∘ (Σ_{s≤t} h_{t−s} ∘ g_s + d ∘ g_t) ) W_out + b_out

The filter h is implicit: a small network computes it from the lag p, which runs
from 0 to L − 1.

    h_p = exp(−p/(L−1) · |δ|) ∘ W_4 sin(f ∘ (W_3 sin(f ∘ (W_2 sin(f ∘ (W_1 z_p
          + b_1)) + b_2)) + b_3))
    z_p = [p/(L−1), cos θ_p, −sin θ_p],   θ_p = 10⁻⁴ · 2π p / L    at the start

z and f are trained. δ is fixed: it runs from ln(0.01)/1.5 to ln(0.01)/0.3 over
the channels. Constants and initial values are zoology's (arXiv 2312.04927). All
linear layers, the filter's too, start from N(0, 0.02²), so that h starts near
0. d starts from N(0, 1).
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.export
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ShardAxes
from pallas_kernels.numerics import sum_dtype
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.integers import power_of_two
from rebased_jax.linear import Linear, linear, output_stddev
from rebased_jax.mixer_configs import HyenaConfig as HyenaConfig
from rebased_jax.mixers.base import Mixer, take_positions
from rebased_jax.mixers.conv import ShortConv

# The window of the fastest channel has fallen to TARGET at p = FAST · L, that
# of the slowest at p = SLOW · L.
FAST, SLOW, TARGET = 0.3, 1.5, 1e-2
FREQUENCY = 1e-4  # of the one sine and cosine in z


class HyenaState(NamedTuple):
  """A row's past. Tokens after the last lag of the filter are not kept."""

  gated_BLD: Array  # g of the last L − 1 tokens, the newest last; float32
  conv_BKD: Array  # the last K − 1 inputs of the short convolution, 3 D wide
  position_B: Array  # int32, the number of the row's tokens so far


class Filter(nnx.Module):
  """The implicit filter h (L, D).

  Parameters: z (L, 3), frequency f (W,), layers/{0,1,2,3}/kernel and
  layers/{0,1,2}/bias.
  """

  def __init__(
    self,
    width: int,
    length: int,
    hidden: int,
    *,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    make: Callable[..., Linear],
  ):
    """Make the network.

    Args:
      width: D.
      length: L.
      hidden: W, the hidden width.
      dtype: dtype of the computation and of h.
      param_dtype: dtype of the parameters.
      make: makes a linear layer, as `linear` without `dtype` does.
    """
    p_L = np.arange(length)
    angle_L = FREQUENCY * 2 * np.pi * p_L / length
    t_L = p_L / max(length - 1, 1)
    z_L3 = np.stack([t_L, np.cos(angle_L), -np.sin(angle_L)], axis=1)
    self.z = nnx.Param(jnp.asarray(z_L3, param_dtype))
    self.frequency = nnx.Param(jnp.ones(hidden, param_dtype))
    layer = functools.partial(make, dtype=dtype)
    self.layers = nnx.List(
      [
        layer(3, hidden, use_bias=True),
        layer(hidden, hidden, use_bias=True),
        layer(hidden, hidden, use_bias=True),
        layer(hidden, width),
      ]
    )
    self.length, self.width, self.dtype = length, width, dtype

  def __call__(self, lags: int) -> Array:
    """Return h (T, D) of the first T = `lags` lags."""
    x_TW = self.z[...][:lags].astype(self.dtype)
    frequency_1W = self.frequency[...].astype(self.dtype)[None]
    for layer in self.layers[:-1]:
      x_TW = jnp.sin(frequency_1W * layer(x_TW))
    rates_D = np.abs(
      np.linspace(1 / SLOW, 1 / FAST, self.width) * math.log(TARGET)
    )
    t_T = np.arange(lags) / max(self.length - 1, 1)
    window_TD = np.exp(-t_T[:, None] * rates_D)
    return self.layers[-1](x_TW) * jnp.asarray(window_TD, self.dtype)


class Hyena(Mixer):
  """Hyena.

  Parameters: in_proj/…, conv/…, filter/…, bias d (D,), out_proj/….

  The state holds L − 1 tokens. `step` evaluates all L lags of the filter anew,
  because a state cannot follow changing parameters, and then takes one dot
  product over the past. Tokens after the last lag have NaN; a row longer than
  the filter raises ValueError. An Inf or NaN reaches no earlier token, although
  Fourier transforms mix all tokens: it is taken out before them.
  """

  config_type = HyenaConfig
  no_time_axis = "its Fourier transforms are of whole rows; split the batch"
  no_segment_ids = (
    "its filter runs over the whole row, across document boundaries; expected "
    "None"
  )

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: HyenaConfig,
    *,
    layers: int = 1,
    length: int | None = None,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
    precision: Precision | None = None,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Make the projections and the filter.

    Args:
      width: D.
      config: the mixer's config.
      layers: number of layers of the model. W_out starts from
        N(0, 0.02² / (2 · layers)).
      length: L, where the config does not say it.
      dtype: the compute dtype. None: `param_dtype`.
      param_dtype: dtype of the parameters.
      precision: of float32 products: "default", "high", "highest" or a
        jax.lax.Precision. None: jax's setting.
      kernel_init: draws the initial kernels of all linear layers. None: the
        distributions of the config.
      rngs: draws the initial parameters.

    Raises:
      ValueError: an argument does not fit, or nothing says what L is.
    """
    super().__init__(width, config, dtype=dtype, param_dtype=param_dtype)
    filter_length = config.length or length
    if filter_length is None:
      raise ValueError(
        "Hyena's filter has a fixed length, and nothing says how long it is: "
        "set HyenaConfig.length or ModelConfig.positions"
      )
    self.length = self.longest_row = filter_length
    self.taps = config.taps
    make = functools.partial(
      linear,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      rngs=rngs,
    )
    project = functools.partial(make, dtype=self.dtype, use_bias=True)
    self.in_proj = project(width, 3 * width)
    self.conv = ShortConv(
      3 * width, config.taps, param_dtype=self.param_dtype, rngs=rngs
    )
    self.filter = Filter(
      width,
      filter_length,
      config.filter_width,
      dtype=sum_dtype(self.dtype),
      param_dtype=self.param_dtype,
      make=make,
    )
    self.bias = nnx.Param(
      jax.random.normal(rngs.params(), (width,), self.param_dtype)
    )
    self.out_proj = project(width, width, stddev=output_stddev(layers))

  def init_state(self, batch: int) -> HyenaState:
    """Return the state before a row's first token: zeros."""
    return HyenaState(
      jnp.zeros((batch, self.length - 1, self.width), sum_dtype(self.dtype)),
      self._empty_conv(batch),
      jnp.zeros(batch, jnp.int32),
    )

  def _mix(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
    query_positions: Array | None,
  ) -> Array:
    del segment_ids, axes
    self._check_length(x_BTD)
    outer_BTD, g_BTD, _ = self._gate(x_BTD, self._empty_conv(x_BTD.shape[0]))
    h_TD = self.filter(x_BTD.shape[1])
    o_BTD = self._gate_output(outer_BTD, g_BTD, convolve(g_BTD, h_TD))
    return self.out_proj(take_positions(o_BTD, query_positions))

  def _prefill(
    self,
    x_BTD: Array,
    state: HyenaState,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, HyenaState]:
    del segment_ids, axes
    self._check_length(x_BTD)
    return self._continue(x_BTD, state, convolve)

  def _step(self, x_BD: Array, state: HyenaState) -> tuple[Array, HyenaState]:
    y_B1D, state = self._continue(x_BD[:, None], state, convolve_last)
    return y_B1D[:, 0], state

  def _continue(
    self,
    x_BTD: Array,
    state: HyenaState,
    convolution: Callable[[Array, Array], Array],
  ) -> tuple[Array, HyenaState]:
    """Return y of T more tokens, and the state after them.

    Args:
      x_BTD: the tokens.
      state: the row's past.
      convolution: of a window (B, L − 1 + T, D) with the filter (L, D), for at
        least its last T tokens.
    """
    T, L = x_BTD.shape[1], self.length
    outer_BTD, g_BTD, conv_BKD = self._gate(x_BTD, state.conv_BKD)
    window_BSD = jnp.concatenate([state.gated_BLD, g_BTD], axis=1)
    c_BTD = convolution(window_BSD, self.filter(L))[:, -T:]
    y_BTD = self.out_proj(self._gate_output(outer_BTD, g_BTD, c_BTD))
    t_1T = jnp.arange(T, dtype=jnp.int32)[None]
    is_inside_BT = state.position_B[:, None] + t_1T < L
    y_BTD = jnp.where(is_inside_BT[..., None], y_BTD, jnp.nan)
    after_BLD = window_BSD[:, T:]
    return y_BTD, HyenaState(after_BLD, conv_BKD, state.position_B + T)

  def _gate(self, x_BTD: Array, past_BKD: Array) -> tuple[Array, Array, Array]:
    """Return x2 in the compute dtype, g in float32, and the inputs to keep."""
    c_BTD, past_BKD = self.conv(
      self.in_proj(x_BTD.astype(self.dtype)), past_BKD
    )
    inner_BTD, outer_BTD, v_BTD = jnp.split(c_BTD, 3, axis=-1)
    acc = sum_dtype(self.dtype)
    return outer_BTD, inner_BTD.astype(acc) * v_BTD.astype(acc), past_BKD

  def _gate_output(self, outer_BTD: Array, g_BTD: Array, c_BTD: Array) -> Array:
    """Return x2 ∘ (c + d ∘ g) in the compute dtype."""
    d_11D = self.bias[...].astype(g_BTD.dtype)[None, None]
    return outer_BTD * (c_BTD + d_11D * g_BTD).astype(self.dtype)

  def _empty_conv(self, batch: int) -> Array:
    return jnp.zeros((batch, self.taps - 1, 3 * self.width), self.dtype)

  def _check_length(self, x_BTD: Array) -> None:
    if jax.export.is_symbolic_dim(x_BTD.shape[1]):
      raise NotImplementedError(
        f"Hyena: the length {x_BTD.shape[1]} of a row is left open: expected a "
        "number, which its Fourier transforms need; export one program a length"
      )
    if x_BTD.shape[1] > self.length:
      raise ValueError(
        f"a row of {x_BTD.shape[1]} tokens: Hyena's filter has {self.length} "
        "lags; raise HyenaConfig.length or ModelConfig.positions"
      )


def convolve(x_BSD: Array, h_LD: Array) -> Array:
  """Return Σ_p h_p ∘ x_{s−p} of every s, (B, S, D), by Fourier transforms.

  The transforms have at least S + L points, so that nothing wraps around. They
  mix all tokens. An Inf or NaN is therefore taken out first, and the sums that
  contain it are NaN.
  """
  S, L = x_BSD.shape[1], h_LD.shape[0]
  is_finite_BSD = jnp.isfinite(x_BSD)
  s_1S1 = jnp.arange(S, dtype=jnp.int32)[None, :, None]
  last_BSD = jax.lax.cummax(jnp.where(is_finite_BSD, -L, s_1S1), axis=1)
  has_nonfinite_BSD = s_1S1 - last_BSD < L
  x_BSD = jnp.where(is_finite_BSD, x_BSD, 0)
  points = power_of_two(S + L)
  spectrum = jnp.fft.rfft(x_BSD, points, axis=1)
  spectrum = spectrum * jnp.fft.rfft(h_LD, points, axis=0)[None]
  sums_BSD = jnp.fft.irfft(spectrum, points, axis=1)[:, :S]
  return jnp.where(has_nonfinite_BSD, jnp.nan, sums_BSD)


def convolve_last(x_BLD: Array, h_LD: Array) -> Array:
  """Return Σ_p h_p ∘ x_{L−1−p}, (B, 1, D): `convolve` at the last token."""
  return jnp.einsum(
    "bld,ld->bd", x_BLD, h_LD[::-1], precision=jax.lax.Precision.HIGHEST
  )[:, None]
