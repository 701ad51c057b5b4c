"""Dtypes of sums, and per-channel parameters with float32 gradients.

Every sum is taken in float32, or in float64 for float64 inputs.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.plain_derivatives import OwnDerivative
from pallas_kernels.sharding import vary_alike


def sum_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Return the dtype of sums: float32, or float64 for float64 inputs."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def product_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
  """Return the precision of matrix products with operands of this dtype.

  It is HIGHEST for float32 and float64, which devices would otherwise round to
  fewer bits, and DEFAULT for 16-bit operands.
  """
  low = jnp.dtype(dtype).itemsize < 4
  return jax.lax.Precision.DEFAULT if low else jax.lax.Precision.HIGHEST


#: What a caller may ask of float32 products, in jax's words.
PRECISIONS = ("default", "high", "highest")


def asked_precision(
  precision: jax.lax.Precision | str | None, dtype: jax.typing.DTypeLike
) -> jax.lax.Precision | None:
  """Return the precision that a caller asked for, for operands of this dtype.

  Args:
    precision: a jax.lax.Precision, or one of `PRECISIONS`. None: jax's setting,
      `jax_default_matmul_precision`, or else the device's default.
    dtype: of the operands. 16-bit operands are never rounded, so nothing is
      asked for them.

  Raises:
    ValueError: `precision` is another value.
  """
  if isinstance(precision, jax.lax.Precision):
    precision = precision.name.lower()
  if precision is not None and precision not in PRECISIONS:
    raise ValueError(
      f"precision={precision!r}: expected None or one of {PRECISIONS}"
    )
  if precision is None or jnp.dtype(dtype).itemsize < 4:
    return None
  return jax.lax.Precision[precision.upper()]


def add_bias(x_D: Array, b_D: Array) -> Array:
  """Return x + b (…, D) in x's dtype; the gradient of b is summed in float32.

  Args:
    x_D: (…, D).
    b_D: (D,), rounded to x's dtype before the addition.
  """
  # The cast to x's dtype comes after the broadcast, so that jax's transpose
  # casts the cotangent to the wide dtype before it sums.
  wide_D = b_D.astype(sum_dtype(x_D.dtype))
  return x_D + jnp.broadcast_to(wide_D, x_D.shape).astype(x_D.dtype)


def broadcast_parameter(parameter_D: Array, like_D: Array) -> Array:
  """Return the parameter with `like_D`'s dtype and number of axes.

  New axes of size 1 come first, which strict rank promotion asks for.
  """
  shape = (1,) * (like_D.ndim - parameter_D.ndim) + parameter_D.shape
  return parameter_D.astype(like_D.dtype).reshape(shape)


def scale_channels(x_D: Array, w_D: Array) -> Array:
  """Return w ∘ x (…, D) in x's dtype; the gradient of w is summed in float32.

  Args:
    x_D: (…, D).
    w_D: (D,), rounded to x's dtype before the product.
  """
  return _scale_channels(*vary_alike(x_D, w_D))


@OwnDerivative
def _scale_channels(x_D: Array, w_D: Array) -> Array:
  return x_D * broadcast_parameter(w_D, x_D)


def _scale_forward(x_D, w_D):
  return _scale_channels(x_D, w_D), (x_D, w_D)


def _scale_backward(kept, dy_D):
  x_D, w_D = kept
  wide = sum_dtype(x_D.dtype)
  tokens = tuple(range(x_D.ndim - 1))
  dw_D = (dy_D.astype(wide) * x_D.astype(wide)).sum(axis=tokens)
  return _scale_channels(dy_D, w_D), dw_D.astype(w_D.dtype)


_scale_channels.defvjp(_scale_forward, _scale_backward)


def weighted_sum(w_ts: Array, x_s: Array, mask_ts: Array) -> Array:
  """Compute Σ_s w_ts x_s, where masked rows do not see an Inf or NaN in x.

  A weight of 0 is not enough for that, because 0 · Inf is NaN.

  Args:
    w_ts: weights (…, t, s), 0 where the mask is False.
    x_s: summands (…, s, p).
    mask_ts: whether row t sees x_s. A row that sees a non-finite x_s becomes
      NaN; the other rows ignore that x_s.

  Returns:
    The sums (…, t, p), in the dtype of sums.
  """
  finite_s = jnp.isfinite(x_s).all(axis=-1)
  y_tp = jnp.einsum(
    "...ts,...sp->...tp",
    w_ts,
    jnp.where(finite_s[..., None], x_s, 0),
    precision=product_precision(x_s.dtype),
    preferred_element_type=sum_dtype(x_s.dtype),
  )
  sees_nonfinite_t = (mask_ts & ~finite_s[..., None, :]).any(axis=-1)
  return jnp.where(sees_nonfinite_t[..., None], jnp.nan, y_tp)
