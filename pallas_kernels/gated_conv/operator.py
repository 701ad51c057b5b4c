"""Short causal convolutions, plain and gated, and the kernel's derivative.

    c_t = Σ_j w_j ∘ x_{t−K+1+j} + b,   j = 0 … K − 1
    y_t = c_t ∘ (z_t + a) + u_t,   c the convolution of u

with x = 0 before a document's first token. Each channel has K taps.
"""

import functools

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.arguments import float_array, integer_array
from pallas_kernels.by_platform import by_platform
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.gated_conv import xla
from pallas_kernels.numerics import add_bias
from pallas_kernels.sharding import (
  ShardAxes,
  check_axes,
  map_over_mesh,
  sum_over_tokens,
  unsplit_axes,
  vary_alike,
)

_MOST_TAPS = 4  # the channels of so many taps fit in a program's registers


@on_any_mesh("BTD", "BTD")
def gated_conv(
  u: Array,
  z: Array,
  taps: Array,
  bias: Array,
  z_bias: Array | None = None,
  *,
  segment_ids: Array | None = None,
  axes: ShardAxes | None = None,
) -> Array:
  """Gate a short causal convolution of u by z, and add u.

      c_t = Σ_j taps_j ∘ u_{t−K+1+j} + bias,   j = 0 … K − 1
      y_t = c_t ∘ (z_t + z_bias) + u_t

  The gradients of taps and biases are summed in float32. On a Hopper GPU the
  backward pass of 16-bit rows of one document each, with K ≤ 4 and D a multiple
  of 128, is one kernel; it has no forward mode and no second derivative.
  Everything else is computed by XLA.

  Args:
    u: (B, T, D), of any float dtype.
    z: (B, T, D), the gate, of u's dtype. Usually a product that lacks its bias.
    taps: (K, D); the last one is that of the token itself.
    bias: (D,).
    z_bias: (D,), added to z. None: no bias.
    segment_ids: integers (B, T). A document is a run of one id; tokens before
      its first one count as 0. None: a row is one document.
    axes: the axes of the ambient mesh that split batch, time and D (as heads).
      The kernel runs if only the batch is split. None: the arrays are whole, or
      XLA splits them.

  Returns:
    y (B, T, D), in u's dtype.

  Raises:
    ValueError: an argument does not fit, the mesh does not fit batch and time,
      or a device would hold fewer than K − 1 tokens of a row. The message names
      the argument.
  """
  u, taps, bias, segment_ids = _conv_arrays("u", u, taps, bias, segment_ids)
  z = float_array("z", z, u.shape, like=("u", u))
  if z_bias is not None:
    z_bias = float_array("z_bias", z_bias, u.shape[-1:])
  check_axes(axes)
  u, z, taps, bias, z_bias = vary_alike(u, z, taps, bias, z_bias)
  if has_kernel(u, taps.shape[0], segment_ids=segment_ids, axes=axes):
    if z_bias is None:
      z_bias = jnp.zeros(u.shape[-1:], jnp.float32)
    return compile_once(_by_kernel, (axes,), u, z, taps, bias, z_bias)
  c, _ = causal_conv(u, taps, bias, segment_ids=segment_ids, axes=axes)
  return c * (z if z_bias is None else add_bias(z, z_bias)) + u


@on_any_mesh("BTD", ("BTD", "BKD"))
def causal_conv(
  x: Array,
  taps: Array,
  bias: Array,
  *,
  initial_state: Array | None = None,
  segment_ids: Array | None = None,
  axes: ShardAxes | None = None,
) -> tuple[Array, Array]:
  """Compute c_t = Σ_j taps_j ∘ x_{t−K+1+j} + bias, and the state after it.

  The state is the last K − 1 tokens. A token of another document than the last
  one's is held as 0, which is what it counts for.

  Args:
    x: (B, T, D), of any float dtype.
    taps: (K, D); the last one is that of the token itself. Its gradient is
      summed in float32, as bias's is.
    bias: (D,).
    initial_state: (B, K − 1, D), the tokens before the row, in x's dtype. They
      belong to the document of token 0. None: zeros.
    segment_ids: integers (B, T). A document is a run of one id; tokens before
      its first one count as 0. None: a row is one document.
    axes: the axes of the ambient mesh that split batch, time and D (as heads).
      Where time is split, each device takes the K − 1 tokens before its own
      from its neighbour. None: the arrays are whole, or XLA splits them.

  Returns:
    (c, state): c (B, T, D) and the state (B, K − 1, D), in x's dtype.

  Raises:
    ValueError: an argument does not fit, the mesh does not fit batch and time,
      or a device would hold fewer than K − 1 tokens of a row. The message names
      the argument.
  """
  x, taps, bias, segment_ids = _conv_arrays("x", x, taps, bias, segment_ids)
  check_axes(axes)
  (B, _, D), K = x.shape, taps.shape[0]
  if initial_state is None:
    initial_state = jnp.zeros_like(x, shape=(B, K - 1, D))
  initial_state = float_array(
    "initial_state", initial_state, (B, K - 1, D), like=("x", x)
  )
  if axes is None or axes.time is None:
    return xla.causal_conv(taps, bias, x, initial_state, segment_ids)
  arrays = taps, bias, x, initial_state, segment_ids
  return compile_once(xla.over_time, (axes,), *arrays)


def has_kernel(
  u: Array,
  taps: int,
  *,
  segment_ids: Array | None = None,
  axes: ShardAxes | None = None,
) -> bool:
  """Whether the backward of `gated_conv` runs its Hopper kernel.

  Args:
    u: (B, T, D), as in `gated_conv`.
    taps: K.
    segment_ids: as in `gated_conv`; the kernel knows no documents.
    axes: as in `gated_conv`; the kernel needs whole rows with all channels.
  """
  whole_rows = (
    not unsplit_axes() if axes is None else axes.are_alone(axes.batch)
  )
  fits = u.shape[-1] % devices.WARPGROUP == 0 and 1 <= taps <= _MOST_TAPS
  return (
    fits
    and segment_ids is None
    and whole_rows
    and devices.takes_row_kernel(u)
    and devices.can_import_kernels("pallas_kernels.gated_conv.gpu")
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(axes, u_BTD, z_BTD, taps_KD, bias_D, z_bias_D):
  return _forward(axes, u_BTD, z_BTD, taps_KD, bias_D, z_bias_D)[0]


def _forward(axes, u_BTD, z_BTD, taps_KD, bias_D, z_bias_D):
  del axes  # XLA splits the rows of the forward
  kept = u_BTD, z_BTD, taps_KD, bias_D, z_bias_D
  return xla.gated_conv(*kept), kept


def _backward(axes, kept, dy_BTD):
  from pallas_kernels.gated_conv import gpu  # takes long to import

  def run(*arrays):
    hopper = devices.kernels_of("gpu")
    du_BTD, dz_BTD, sums = by_platform(
      hopper, gpu.backward, xla.gated_conv_backward, *arrays
    )
    return du_BTD, dz_BTD, sum_over_tokens(sums, axes)

  u_BTD, z_BTD, *parameters = kept
  run = map_over_mesh(
    run,
    axes,
    inputs=("tokens", "tokens", "tokens", "whole", "whole", "whole"),
    outputs=("tokens", "tokens", "whole"),
  )
  wide = [x.astype(jnp.float32) for x in parameters]
  du_BTD, dz_BTD, sums = run(u_BTD, z_BTD, dy_BTD, *wide)
  dtaps_KD, dbias_D, dz_bias_D = sums[:-2], sums[-2], sums[-1]
  taps_KD, bias_D, z_bias_D = parameters
  return (
    du_BTD,
    dz_BTD,
    dtaps_KD.astype(taps_KD.dtype),
    dbias_D.astype(bias_D.dtype),
    dz_bias_D.astype(z_bias_D.dtype),
  )


_by_kernel.defvjp(_forward, compiled_backward(_backward))


def _conv_arrays(name, x, taps, bias, segment_ids):
  """Return the arguments as arrays; raise ValueError if one does not fit."""
  x = float_array(name, x, ("B", "T", "D"))
  taps = float_array("taps", taps, ("K", x.shape[-1]), nonempty=True)
  bias = float_array("bias", bias, x.shape[-1:])
  if segment_ids is not None:
    segment_ids = integer_array("segment_ids", segment_ids, x.shape[:2])
  return x, taps, bias, segment_ids
