"""The exact GELU of a product and its bias, whose backward keeps the product.

    x = z + b,   y = x Φ(x),   Φ the normal distribution
    dz = dy (Φ(x) + x φ(x)),   db = Σ dz, over all tokens, in float32

(Hendrycks and Gimpel, 2016)
"""

import functools
import math

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, gelu as kernel, numerics
from pallas_kernels.numerics import sum_dtype
from pallas_kernels.sharding import (
  flatten_tokens,
  map_over_mesh,
  sum_over_tokens,
  vary_alike,
)


def gelu(z_BTD: Array, b_D: Array, *, axes: ShardAxes | None = None) -> Array:
  """y (B, T, D) in the dtype of z.

  On a Hopper GPU a kernel of its own, which computes in float32, and has no
  forward mode and no second derivative; not where an axis of the mesh is in
  none of `axes`: it may split the channels. Elsewhere XLA's, which rounds
  z + b, and dz before its sum, to the dtype of z.

  Args:
    z_BTD: (…, D); (B, T, D) with `axes`.
    b_D: the bias, float32.
    axes: the mesh axes that split batch and time, and D as they do heads.

  Raises:
    ValueError: the mesh does not fit the batch and the time.
  """
  z_BTD, b_D = vary_alike(z_BTD, b_D)
  if axes is None:
    has_kernel = kernel.runs_on(z_BTD)
  else:
    axes.check(z_BTD.shape[0], None, z_BTD.shape[1])
    alone = axes.are_alone(axes.batch, axes.time, axes.heads)
    parts = axes.devices(axes.heads)
    has_kernel = alone and kernel.runs_on(z_BTD, parts)
  return _by_kernel(z_BTD, b_D, axes) if has_kernel else _by_erf(z_BTD, b_D)


@jax.checkpoint  # the backward keeps the product alone, not its sum with b
def _by_erf(z_D: Array, b_D: Array) -> Array:
  """Of fewer operations than by erfc."""
  x_D = numerics.add_bias(z_D, b_D).astype(sum_dtype(z_D.dtype))
  return (0.5 * x_D * (1 + _erf(math.sqrt(0.5) * x_D))).astype(z_D.dtype)


@jax.custom_jvp  # jax 0.12 fails to check what its own varies over
def _erf(x: Array) -> Array:
  return jax.lax.erf(x)


@_erf.defjvp
def _erf_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return _erf(x), dx * (jnp.exp(-x * x) * (2 / math.sqrt(math.pi)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_kernel(z_BTD: Array, b_D: Array, axes: ShardAxes | None) -> Array:
  return _forward(z_BTD, b_D, axes)[0]


def _forward(z_BTD, b_D, axes):
  from pallas_kernels.gelu import gpu  # takes long to import

  def run(z_BTD, b_D):
    return gpu.forward(flatten_tokens(z_BTD), b_D).reshape(z_BTD.shape)

  run = map_over_mesh(run, axes, inputs=("c", "p"), outputs="c")
  return run(z_BTD, b_D.astype(jnp.float32)), (z_BTD, b_D)


def _backward(axes, kept, dy_BTD):
  from pallas_kernels.gelu import gpu

  def run(z_BTD, b_D, dy_BTD):
    dz_RD, db_D = gpu.backward(
      flatten_tokens(z_BTD), b_D, flatten_tokens(dy_BTD)
    )
    return dz_RD.reshape(z_BTD.shape), sum_over_tokens(db_D, axes)

  z_BTD, b_D = kept
  run = map_over_mesh(run, axes, inputs=("c", "p", "c"), outputs=("c", "p"))
  dz_BTD, db_D = run(z_BTD, b_D.astype(jnp.float32), dy_BTD)
  return dz_BTD, db_D.astype(b_D.dtype)


_by_kernel.defvjp(_forward, _backward)
