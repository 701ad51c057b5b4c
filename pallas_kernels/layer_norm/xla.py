"""Layer normalisation whose backward keeps its input and two numbers a token.

    x̂ = (x − μ) / σ,   μ = mean x,   σ² = mean (x − μ)² + eps
    y = γ ∘ x̂ + β
    dx = (g − mean g − x̂ mean(g ∘ x̂)) / σ,   g = γ ∘ dy
    dγ = Σ dy ∘ x̂,   dβ = Σ dy

Differentiated by jax it would keep x − μ and more of every token in float32:
a third of the memory traffic of a training step's norms (Ba et al., 2016).
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import (
  ShardAxes,
  devices,
  layer_norm as add_norm,
  numerics,
)
from pallas_kernels.numerics import sum_dtype
from pallas_kernels.sharding import (
  flatten_tokens,
  map_over_mesh,
  sum_over_tokens,
  vary_alike,
)


def layer_norm(
  x_D: Array, scale_D: Array, bias_D: Array, eps: float, dtype: jnp.dtype
) -> Array:
  """y (…, D) in `dtype`; everything is computed in float32, or in float64.

  Args:
    x_D: (…, D).
    scale_D: γ, of x's last axes: (D,), or (groups, D) of its own each.
    bias_D: β, likewise.
    eps: added to the variance.
    dtype: of y.
  """
  return _layer_norm(*vary_alike(x_D, scale_D, bias_D), eps, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x_D, scale_D, bias_D, eps, dtype):
  return _forward(x_D, scale_D, bias_D, eps, dtype)[0]


def _forward(x_D, scale_D, bias_D, eps, dtype):
  wide = x_D.astype(sum_dtype(x_D.dtype))
  mean_1, variance_1 = _moments(wide)
  rate_1 = jax.lax.rsqrt(variance_1 + eps)
  hat_D = (wide - mean_1) * rate_1
  y_D = numerics.broadcast_parameter(
    scale_D, hat_D
  ) * hat_D + numerics.broadcast_parameter(bias_D, hat_D)
  return y_D.astype(dtype), (x_D, scale_D, bias_D, mean_1, rate_1)


def _backward(eps, dtype, kept, dy_D):
  del eps, dtype
  x_D, scale_D, bias_D, *moments = kept
  # So that x̂ is made again: XLA would keep the forward's, in float32.
  x_D, mean_1, rate_1 = jax.lax.optimization_barrier((x_D, *moments))
  hat_D = (x_D.astype(mean_1.dtype) - mean_1) * rate_1
  dy_D = dy_D.astype(mean_1.dtype)
  g_D = numerics.broadcast_parameter(scale_D, hat_D) * dy_D
  shift_1, slope_1 = _means(g_D, g_D * hat_D)
  dx_D = rate_1 * (g_D - shift_1 - hat_D * slope_1)
  tokens = tuple(range(x_D.ndim - scale_D.ndim))
  dscale_D = (dy_D * hat_D).sum(axis=tokens).astype(scale_D.dtype)
  dbias_D = dy_D.sum(axis=tokens).astype(bias_D.dtype)
  return dx_D.astype(x_D.dtype), dscale_D, dbias_D


_layer_norm.defvjp(_forward, _backward)


class Stream(NamedTuple):
  """The residual stream x + (y + bias), in parts that the next norm sums."""

  x_BTD: Array  # float32, or float64
  y_BTD: Array | None = None  # in the dtype of the computation; None: x alone
  bias_D: Array | None = None  # of y

  def whole(self) -> Array:
    """In the dtype of x."""
    x_BTD, y_BTD, bias_D = self
    if y_BTD is None:
      return x_BTD
    y_BTD = y_BTD.astype(x_BTD.dtype)
    return x_BTD + (
      y_BTD if bias_D is None else numerics.add_bias(y_BTD, bias_D)
    )


def add_layer_norm(
  stream: Stream,
  scale_D: Array,
  bias_D: Array,
  eps: float,
  *,
  axes: ShardAxes | None = None,
) -> tuple[Array, Array]:
  """(the whole stream in the dtype of x, its norm in the dtype of y).

  On a Hopper GPU a kernel of its own, which reads and writes every array once.

  Args:
    stream: with a y.
    scale_D: γ.
    bias_D: β.
    eps: added to the variance.
    axes: the mesh axes that split batch and time.
  """
  stream, scale_D, bias_D = vary_alike(stream, scale_D, bias_D)
  x_BTD, y_BTD, _ = stream
  if not add_norm.runs_on(x_BTD, y_BTD):
    s_BTD = stream.whole()
    return s_BTD, layer_norm(s_BTD, scale_D, bias_D, eps, y_BTD.dtype)
  return _by_kernel(stream, scale_D, bias_D, eps, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_kernel(stream: Stream, scale_D, bias_D, eps, axes):
  return _kernel_forward(stream, scale_D, bias_D, eps, axes)[0]


def _kernel_forward(stream: Stream, scale_D, bias_D, eps, axes):
  from pallas_kernels.layer_norm import gpu

  def run(stream: Stream, scale_D, bias_D):
    x_BTD, y_BTD, of_y_D = stream
    found = gpu.forward(
      flatten_tokens(x_BTD),
      flatten_tokens(y_BTD),
      of_y_D,
      scale_D,
      bias_D,
      eps=eps,
    )
    return [x_RD.reshape(x_BTD.shape) for x_RD in found]

  of_y_D = stream.bias_D
  stream = stream._replace(bias_D=jax.tree.map(_wide, of_y_D))
  parts = Stream("r", "r", "w")
  run = map_over_mesh(run, axes, inputs=(parts, "w", "w"), outputs=["r", "r"])
  s_BTD, n_BTD = run(stream, _wide(scale_D), _wide(bias_D))
  return (s_BTD, n_BTD), (s_BTD, of_y_D, scale_D, bias_D)


def _kernel_backward(eps, axes, kept, cotangents):
  from pallas_kernels.layer_norm import gpu

  def run(s_BTD, ds_BTD, dn_BTD, scale_D):
    dx_RD, dy_RD, *sums = gpu.backward(
      *map(flatten_tokens, (s_BTD, ds_BTD, dn_BTD)),
      scale_D,
      eps=eps,
      has_bias=has_bias,
    )
    whole = lambda x_RD: x_RD.reshape(s_BTD.shape)
    return [whole(dx_RD), whole(dy_RD), *sum_over_tokens(sums, axes)]

  s_BTD, of_y_D, scale_D, bias_D = kept
  has_bias = of_y_D is not None
  outputs = ["r", "r", "w", "w"] + ["w"] * has_bias
  run = map_over_mesh(run, axes, inputs=("r", "r", "r", "w"), outputs=outputs)
  dx_BTD, dy_BTD, dscale_D, dbias_D, *dof_y = run(
    s_BTD, *cotangents, _wide(scale_D)
  )
  to = lambda x_D, like_D: x_D.astype(like_D.dtype)
  return (
    Stream(dx_BTD, dy_BTD, *(to(x_D, of_y_D) for x_D in dof_y)),
    to(dscale_D, scale_D),
    to(dbias_D, bias_D),
  )


_by_kernel.defvjp(_kernel_forward, _kernel_backward)


def _wide(parameter_D: Array) -> Array:
  return parameter_D.astype(jnp.float32)


def _moments(x_D: Array) -> tuple[Array, Array]:
  """μ and mean (x − μ)² over the last axis."""
  if devices.platform() == "gpu":
    return _in_one_pass(x_D)
  (mean_1,) = _means(x_D)
  return mean_1, *_means(jnp.square(x_D - mean_1))


@jax.custom_jvp
def _in_one_pass(x_D: Array) -> tuple[Array, Array]:
  """`_moments` in one reduction, so that a GPU reads x once.

  Parts of a row are joined as of Chan, Golub and LeVeque (1979): each has its
  share of the row, its mean, and its Σ (x − mean)² / D.
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
  """Means over the last axis, of one reduction: each value is read once.

  Divided by D before, where it is fused; behind it would be a kernel.
  """
  zeros = [jnp.zeros((), x.dtype) for x in values_D]
  add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
  parts_D = tuple(x / x.shape[-1] for x in values_D)
  last = values_D[0].ndim - 1
  means = jax.lax.reduce(parts_D, tuple(zeros), add, (last,))
  return [x[..., None] for x in means]
