"""Layer normalisation, alone or of a residual sum, and its derivatives.

    x̂ = (x − μ) / σ,   μ = mean x,   σ² = mean (x − μ)² + eps
    y = γ ∘ x̂ + β
    dx = (g − mean g − x̂ mean(g ∘ x̂)) / σ,   g = γ ∘ dy
    dγ = Σ dy ∘ x̂,   dβ = Σ dy

(Ba et al., 2016). The backward pass keeps x and two numbers a token, and makes
x̂ again. jax's own derivative would keep x − μ and more of every token in
float32, which is a third of the memory traffic of a training step's norms.
"""

import functools

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.arguments import as_array, float_array, number_from_0
from pallas_kernels.by_platform import by_platform
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.layer_norm import xla
from pallas_kernels.plain_derivatives import OwnDerivative
from pallas_kernels.sharding import (
  ShardAxes,
  check_axes,
  flatten_tokens,
  map_over_mesh,
  sum_over_tokens,
  unsplit_axes,
  vary_alike,
)

_WIDEST = 2048  # the longest row that a warpgroup's registers hold


@on_any_mesh("…", "…")
def layer_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  *,
  eps: float = 1e-5,
  dtype: jax.typing.DTypeLike | None = None,
) -> Array:
  """Normalise x over its last axis: γ ∘ (x − mean x) / √(var x + eps) + β.

  Everything is computed in float32, or in float64 for float64 inputs.
  Derivatives of any order exist in reverse mode.

  Args:
    x: (…, D), of any float dtype.
    scale: γ, of the shape of x's last axes: (D,), or (groups, D) for another
      row of γ a group. None: 1.
    bias: β, of scale's shape; (D,) without one. None: 0.
    eps: added to the variance.
    dtype: of the result. None: x's.

  Returns:
    (…, D), in `dtype`.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  x, scale, bias = _norm_arrays(x, scale, bias)
  eps = number_from_0("eps", eps)
  if scale is None:
    scale = _filled(1, x, bias)
  if bias is None:
    bias = _filled(0, x, scale)
  dtype = x.dtype if dtype is None else jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype={dtype}: expected None or a float dtype")
  arrays = vary_alike(x, scale, bias)
  return compile_once(_layer_norm, (eps, dtype), *arrays)


@on_any_mesh("…", ("…", "…"))
def add_layer_norm(
  x: Array,
  y: Array,
  scale: Array,
  bias: Array,
  *,
  y_bias: Array | None = None,
  eps: float = 1e-5,
  axes: ShardAxes | None = None,
) -> tuple[Array, Array]:
  """Add y to the residual stream x and normalise: s = x + (y + y_bias), LN(s).

  On a Hopper GPU, a float32 x and a 16-bit y with D a multiple of 128 up to
  2048 run in one kernel a pass, which reads and writes every array once. The
  kernels have no forward mode and no second derivative. Everything else is
  computed by XLA.

  Args:
    x: the residual stream, (B, T, D) or (…, D); float32 or float64.
    y: what is added to it, of x's shape and any float dtype.
    scale: γ, (D,).
    bias: β, (D,).
    y_bias: (D,), a bias that y lacks. None: no bias.
    eps: added to the variance.
    axes: the axes of the ambient mesh that split batch and time, of (B, T, D)
      arrays. None: the arrays are whole, or XLA splits them.

  Returns:
    (s, n): s (…, D) in x's dtype and n = LN(s) (…, D) in y's dtype.

  Raises:
    ValueError: an argument does not fit, the mesh lacks an axis, or it does not
      fit batch and time where a kernel runs; the message names the argument.
  """
  x = float_array("x", x, ("…", "D") if axes is None else ("B", "T", "D"))
  y = float_array("y", y, x.shape)
  scale = float_array("scale", scale, x.shape[-1:])
  bias = float_array("bias", bias, x.shape[-1:])
  if y_bias is not None:
    y_bias = float_array("y_bias", y_bias, x.shape[-1:])
  eps = number_from_0("eps", eps)
  check_axes(axes)
  x, y, y_bias, scale, bias = vary_alike(x, y, y_bias, scale, bias)
  if has_kernel(x, y, axes=axes):
    arrays = x, y, y_bias, scale, bias
    return compile_once(_by_kernel, (eps, axes), *arrays)
  s = xla.residual_sum(x, y, y_bias)
  return s, compile_once(_layer_norm, (eps, y.dtype), s, scale, bias)


def has_kernel(x: Array, y: Array, *, axes: ShardAxes | None = None) -> bool:
  """Whether `add_layer_norm` runs its Hopper kernels for such arrays."""
  width = x.shape[-1]
  fits = width % devices.WARPGROUP == 0 and width <= _WIDEST
  return (
    fits
    and x.dtype == jnp.float32
    and (axes is not None or not unsplit_axes())
    and devices.takes_row_kernel(y)
    and devices.can_import_kernels("pallas_kernels.layer_norm.gpu")
  )


def _plain(eps, dtype, x_D, scale_D, bias_D):
  y_D = xla.reference_layer_norm(x_D, scale_D, bias_D, eps=eps)
  return y_D.astype(dtype)


@functools.partial(OwnDerivative, static=(0, 1), plain=_plain)
def _layer_norm(eps, dtype, x_D, scale_D, bias_D):
  return _forward(eps, dtype, x_D, scale_D, bias_D)[0]


def _forward(eps, dtype, x_D, scale_D, bias_D):
  y_D, moments = xla.forward(x_D, scale_D, bias_D, eps, dtype)
  return y_D, (x_D, scale_D, bias_D, *moments)


def _backward(eps, dtype, kept, dy_D):
  del eps, dtype
  return xla.backward(*kept, dy_D)


_layer_norm.defvjp(_forward, compiled_backward(_backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(eps, axes, x_BTD, y_BTD, y_bias_D, scale_D, bias_D):
  return _kernel_forward(eps, axes, x_BTD, y_BTD, y_bias_D, scale_D, bias_D)[0]


def _kernel_forward(eps, axes, x_BTD, y_BTD, y_bias_D, scale_D, bias_D):
  from pallas_kernels.layer_norm import gpu  # takes long to import

  def kernel(x_BTD, y_BTD, y_bias_D, scale_D, bias_D):
    s_RD, n_RD = gpu.forward(
      flatten_tokens(x_BTD),
      flatten_tokens(y_BTD),
      y_bias_D,
      scale_D,
      bias_D,
      eps=eps,
    )
    return s_RD.reshape(x_BTD.shape), n_RD.reshape(x_BTD.shape)

  def elsewhere(x_BTD, y_BTD, y_bias_D, scale_D, bias_D):
    s_BTD = xla.residual_sum(x_BTD, y_BTD, y_bias_D)
    return s_BTD, _layer_norm(eps, y_BTD.dtype, s_BTD, scale_D, bias_D)

  def run(*arrays):
    return by_platform(devices.kernels_of("gpu"), kernel, elsewhere, *arrays)

  run = map_over_mesh(
    run,
    axes,
    inputs=("tokens", "tokens", "whole", "whole", "whole"),
    outputs=("tokens", "tokens"),
  )
  wide = jax.tree.map(_wide, (y_bias_D, scale_D, bias_D))
  s_BTD, n_BTD = run(x_BTD, y_BTD, *wide)
  return (s_BTD, n_BTD), (s_BTD, y_bias_D, scale_D, bias_D)


def _kernel_backward(eps, axes, kept, cotangents):
  from pallas_kernels.layer_norm import gpu

  s_BTD, y_bias_D, scale_D, bias_D = kept
  has_bias = y_bias_D is not None

  def kernel(s_BTD, ds_BTD, dn_BTD, scale_D):
    dx_RD, dy_RD, *sums = gpu.backward(
      *map(flatten_tokens, (s_BTD, ds_BTD, dn_BTD)),
      scale_D,
      eps=eps,
      has_bias=has_bias,
    )
    dx_BTD, dy_BTD = (x_RD.reshape(s_BTD.shape) for x_RD in (dx_RD, dy_RD))
    return dx_BTD, dy_BTD, sums

  def elsewhere(s_BTD, ds_BTD, dn_BTD, scale_D):
    norm = functools.partial(_layer_norm, eps, dn_BTD.dtype)
    _, pull = jax.vjp(norm, s_BTD, scale_D, jnp.zeros_like(scale_D))
    dnorm_BTD, *sums = pull(dn_BTD)
    dx_BTD = ds_BTD + dnorm_BTD
    if has_bias:
      sums.append(dx_BTD.sum(axis=tuple(range(dx_BTD.ndim - 1))))
    return dx_BTD, dx_BTD.astype(dn_BTD.dtype), sums

  def run(*arrays):
    hopper = devices.kernels_of("gpu")
    dx_BTD, dy_BTD, sums = by_platform(hopper, kernel, elsewhere, *arrays)
    return dx_BTD, dy_BTD, sum_over_tokens(sums, axes)

  sums = ["whole"] * (3 if has_bias else 2)
  run = map_over_mesh(
    run,
    axes,
    inputs=("tokens", "tokens", "tokens", "whole"),
    outputs=("tokens", "tokens", sums),
  )
  dx_BTD, dy_BTD, sums = run(s_BTD, *cotangents, _wide(scale_D))
  dscale_D, dbias_D = sums[0], sums[1]
  dy_bias_D = sums[2].astype(y_bias_D.dtype) if has_bias else None
  return (
    dx_BTD,
    dy_BTD,
    dy_bias_D,
    dscale_D.astype(scale_D.dtype),
    dbias_D.astype(bias_D.dtype),
  )


_by_kernel.defvjp(_kernel_forward, compiled_backward(_kernel_backward))


def _wide(parameter_D: Array) -> Array:
  return parameter_D.astype(jnp.float32)


def _filled(value: float, x: Array, like: Array | None) -> Array:
  shape = x.shape[-1:] if like is None else like.shape
  return jnp.full(shape, value, xla.sum_dtype(x.dtype))


def _norm_arrays(
  x: Array, scale: Array | None, bias: Array | None
) -> tuple[Array, Array | None, Array | None]:
  """Return x, γ and β as arrays whose shapes fit; raise ValueError if not."""
  x = float_array("x", x, ("…", "D"))

  def of_last_axes(name: str, parameter: Array) -> Array:
    ndim = as_array(name, parameter).ndim
    axes = ndim if 1 <= ndim <= x.ndim else 1
    return float_array(name, parameter, x.shape[-axes:])

  if scale is not None:
    scale = of_last_axes("scale", scale)
  if bias is not None:
    bias = of_last_axes("bias", bias)
    if scale is not None:
      float_array("bias", bias, scale.shape)
  return x, scale, bias
