"""Layer normalisation in XLA: forward, backward, and a row's moments."""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.numerics import add_bias, broadcast_parameter, sum_dtype


def residual_sum(x_D: Array, y_D: Array, y_bias_D: Array | None) -> Array:
  """Return x + (y + y_bias) (…, D) in x's dtype.

  Args:
    x_D: (…, D).
    y_D: (…, D), of any float dtype.
    y_bias_D: (D,); None: no bias.
  """
  y_D = y_D.astype(x_D.dtype)
  return x_D + (y_D if y_bias_D is None else add_bias(y_D, y_bias_D))


def reference_layer_norm(
  x_D: Array, scale_D: Array, bias_D: Array, *, eps: float
) -> Array:
  """Return LN(x) (…, D) in x's dtype, in plain jax.

  It has derivatives of any kind and order. The derivative that jax makes of it
  keeps more of every token than that of `layer_norm`.

  Args:
    x_D: (…, D), of any float dtype.
    scale_D: γ, of the shape of x's last axes.
    bias_D: β, of scale's shape.
    eps: added to the variance.
  """
  wide_D = x_D.astype(sum_dtype(x_D.dtype))
  wide_D = wide_D - wide_D.mean(axis=-1, keepdims=True)
  variance_1 = jnp.square(wide_D).mean(axis=-1, keepdims=True)
  hat_D = wide_D * jax.lax.rsqrt(variance_1 + eps)
  y_D = hat_D * broadcast_parameter(scale_D, hat_D)
  return (y_D + broadcast_parameter(bias_D, hat_D)).astype(x_D.dtype)


def forward(
  x_D: Array, scale_D: Array, bias_D: Array, eps: float, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, Array]]:
  """Return y (…, D) in `dtype` and what the backward needs, (μ, 1/σ) (…, 1)."""
  wide_D = x_D.astype(sum_dtype(x_D.dtype))
  mean_1, variance_1 = moments(wide_D)
  rate_1 = jax.lax.rsqrt(variance_1 + eps)
  hat_D = (wide_D - mean_1) * rate_1
  gamma_D = broadcast_parameter(scale_D, hat_D)
  y_D = gamma_D * hat_D + broadcast_parameter(bias_D, hat_D)
  return y_D.astype(dtype), (mean_1, rate_1)


def backward(
  x_D: Array,
  scale_D: Array,
  bias_D: Array,
  mean_1: Array,
  rate_1: Array,
  dy_D: Array,
) -> tuple[Array, Array, Array]:
  """Return (dx, dγ, dβ), each in the dtype of its primal."""
  # The barrier makes XLA compute x̂ again. Without it XLA shares the forward's
  # x̂ and so keeps it for the backward, in float32.
  x_D, mean_1, rate_1 = jax.lax.optimization_barrier((x_D, mean_1, rate_1))
  hat_D = (x_D.astype(mean_1.dtype) - mean_1) * rate_1
  dy_D = dy_D.astype(mean_1.dtype)
  g_D = broadcast_parameter(scale_D, hat_D) * dy_D
  shift_1, slope_1 = _means(g_D, g_D * hat_D)
  dx_D = rate_1 * (g_D - shift_1 - hat_D * slope_1)
  tokens = tuple(range(x_D.ndim - scale_D.ndim))
  dscale_D = (dy_D * hat_D).sum(axis=tokens).astype(scale_D.dtype)
  dbias_D = dy_D.sum(axis=tokens).astype(bias_D.dtype)
  return dx_D.astype(x_D.dtype), dscale_D, dbias_D


def moments(x_D: Array) -> tuple[Array, Array]:
  """Return μ and mean (x − μ)² (…, 1) over the last axis."""
  if devices.platform() == "gpu":
    return _in_one_pass(x_D)
  (mean_1,) = _means(x_D)
  return mean_1, *_means(jnp.square(x_D - mean_1))


@jax.custom_jvp
def _in_one_pass(x_D: Array) -> tuple[Array, Array]:
  """Compute `moments` in one reduction, so that a GPU reads x once.

  Parts of a row are joined as Chan, Golub and LeVeque (1979) do. Each part has
  its share of the row, its mean, and its Σ (x − mean)² / D. The derivative is
  our own because jax does not differentiate such a reduction.
  """
  zero = jnp.zeros((), x_D.dtype)

  def join(a, b):
    (share_a, mean_a, square_a), (share_b, mean_b, square_b) = a, b
    share = share_a + share_b
    of_b = share_b / jnp.maximum(share, jnp.finfo(share.dtype).tiny)
    apart = mean_b - mean_a
    square = square_a + square_b + jnp.square(apart) * share_a * of_b
    return share, mean_a + apart * of_b, square

  share_D = jnp.full_like(x_D, 1 / x_D.shape[-1])
  _, mean, variance = jax.lax.reduce(
    (share_D, x_D, jnp.zeros_like(x_D)), (zero,) * 3, join, (x_D.ndim - 1,)
  )
  return mean[..., None], variance[..., None]


@_in_one_pass.defjvp
def _tangents(primals, tangents):
  (x_D,), (dx_D,) = primals, tangents
  mean_1, variance_1 = _in_one_pass(x_D)
  mean = lambda y_D: y_D.mean(axis=-1, keepdims=True)
  dvariance_1 = mean(2 * (x_D - mean_1) * dx_D)
  return (mean_1, variance_1), (mean(dx_D), dvariance_1)


def _means(*values_D: Array) -> list[Array]:
  """Return means over the last axis, all from one reduction.

  Each value is read once. The division by D comes before the sum, where XLA
  fuses it into the reduction; after the sum it would need another kernel.
  """
  zeros = [jnp.zeros((), x.dtype) for x in values_D]
  add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
  parts_D = tuple(x / x.shape[-1] for x in values_D)
  last = values_D[0].ndim - 1
  means = jax.lax.reduce(parts_D, tuple(zeros), add, (last,))
  return [x[..., None] for x in means]
