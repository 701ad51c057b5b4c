"""The exact GELU of x + bias, and its derivative where a kernel computes it.

    u = x + b,   y = u Φ(u),   Φ the normal distribution
    dx = dy (Φ(u) + u φ(u)),   db = Σ dx, over all tokens, in float32

(Hendrycks and Gimpel, 2016)
"""

import functools

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.arguments import float_array
from pallas_kernels.by_platform import by_platform
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.gelu import xla
from pallas_kernels.sharding import (
  ShardAxes,
  check_axes,
  flatten_tokens,
  map_over_mesh,
  sum_over_tokens,
  unsplit_axes,
  vary_alike,
)


@on_any_mesh("…", "…")
def gelu(
  x: Array, bias: Array | None = None, *, axes: ShardAxes | None = None
) -> Array:
  """Compute GELU(x + bias) = (x + bias) Φ(x + bias), Φ the normal distribution.

  The backward pass keeps x alone. On a Hopper GPU, 16-bit arrays whose last
  axis is a multiple of 128 run in one kernel a pass, which computes in float32.
  The kernels have no forward mode and no second derivative. Everything else is
  computed by XLA, which rounds x + bias to x's dtype.

  Args:
    x: (…, D), of any float dtype; (B, T, D) with `axes`. Usually a product
      that lacks its bias.
    bias: (D,), of any float dtype; its gradient is summed in float32. None: no
      bias.
    axes: the axes of the ambient mesh that split batch, time and D (as heads).
      The kernels run only if no other axis of the mesh splits anything: it
      might split D. None: the arrays are whole, or XLA splits them.

  Returns:
    (…, D), in x's dtype.

  Raises:
    ValueError: an argument does not fit, or the mesh does not fit batch and
      time; the message names the argument.
  """
  form = ("…", "D") if axes is None else ("B", "T", "D")
  x = float_array("x", x, form)
  if bias is not None:
    bias = float_array("bias", bias, (x.shape[-1],))
  if axes is not None:
    check_axes(axes, batch=x.shape[0], time=x.shape[1])
  x, bias = vary_alike(x, bias)
  if not has_kernel(x, axes=axes):
    return xla.gelu(x, bias)
  if bias is None:
    bias = jnp.zeros(x.shape[-1:], jnp.float32)
  return compile_once(_by_kernel, (axes,), x, bias)


def has_kernel(x: Array, *, axes: ShardAxes | None = None) -> bool:
  """Whether `gelu` runs its Hopper kernels for such an x."""
  parts = 1
  if axes is None and unsplit_axes():
    return False
  if axes is not None:
    if not axes.are_alone(axes.batch, axes.time, axes.heads):
      return False
    parts = axes.devices(axes.heads)
  fits = x.shape[-1] % (parts * devices.WARPGROUP) == 0
  return (
    fits
    and devices.takes_row_kernel(x)
    and devices.can_import_kernels("pallas_kernels.gelu.gpu")
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(axes: ShardAxes | None, x_BTD: Array, b_D: Array) -> Array:
  return _forward(axes, x_BTD, b_D)[0]


def _forward(axes, x_BTD, b_D):
  from pallas_kernels.gelu import gpu  # takes long to import

  def kernel(x_BTD, b_D):
    return gpu.forward(flatten_tokens(x_BTD), b_D).reshape(x_BTD.shape)

  def run(x_BTD, b_D):
    hopper = devices.kernels_of("gpu")
    return by_platform(hopper, kernel, xla.gelu, x_BTD, b_D)

  run = map_over_mesh(
    run,
    axes,
    inputs=("token_channels", "channels"),
    outputs="token_channels",
  )
  return run(x_BTD, b_D.astype(jnp.float32)), (x_BTD, b_D)


def _backward(axes, kept, dy_BTD):
  from pallas_kernels.gelu import gpu

  def kernel(x_BTD, b_D, dy_BTD):
    dx_RD, db_D = gpu.backward(
      flatten_tokens(x_BTD), b_D, flatten_tokens(dy_BTD)
    )
    return dx_RD.reshape(x_BTD.shape), db_D

  def run(x_BTD, b_D, dy_BTD):
    hopper = devices.kernels_of("gpu")
    arrays = x_BTD, b_D, dy_BTD
    dx_BTD, db_D = by_platform(hopper, kernel, xla.backward, *arrays)
    return dx_BTD, sum_over_tokens(db_D, axes)

  x_BTD, b_D = kept
  run = map_over_mesh(
    run,
    axes,
    inputs=("token_channels", "channels", "token_channels"),
    outputs=("token_channels", "channels"),
  )
  dx_BTD, db_D = run(x_BTD, b_D.astype(jnp.float32), dy_BTD)
  return dx_BTD, db_D.astype(b_D.dtype)


_by_kernel.defvjp(_forward, compiled_backward(_backward))
