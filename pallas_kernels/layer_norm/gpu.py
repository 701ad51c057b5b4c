"""Hopper kernels of a residual sum with its layer norm, forward and backward.

    s = x + (y + c),   ŝ = (s − mean s) / σ,   σ² = mean (s − mean s)² + eps
    n = γ ∘ ŝ + β
    ds' = ds + (g − mean g − ŝ mean(g ∘ ŝ)) / σ,   g = γ ∘ dn
    dγ = Σ dn ∘ ŝ,   dβ = Σ dn,   dc = Σ dx

c is y's bias, if there is one. A warpgroup holds a row in registers, so that
every array is read or written once. With y and n of 2 bytes that is 12 D bytes
a row forward and 16 D backward; XLA's fusions move 16 D and 23 D. Each of n
programs takes every n-th row and sums its share of dγ, dβ and dc. The backward
computes ŝ again from s.
"""

import jax
from jax import Array, lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.devices import WARPGROUP
from pallas_kernels.row_kernel import over_rows, row_kernel

# So many programs run at once on a Hopper GPU's 132 multiprocessors.
PROGRAMS = 8 * 132  # at most 64 registers a thread
PROGRAMS_OF_BIAS = 7 * 132  # the backward that sums dc too: 72 registers
f32 = jnp.float32


def forward(
  x_RD: Array,
  y_RD: Array,
  y_bias_D: Array | None,
  scale_D: Array,
  bias_D: Array,
  *,
  eps: float,
) -> tuple[Array, Array]:
  """Return (s, n), (R, D) each: s in float32 and n in y's dtype.

  Args:
    x_RD: float32, D a multiple of 128.
    y_RD: bfloat16 or float16.
    y_bias_D: c, float32; None: no bias.
    scale_D: γ, float32.
    bias_D: β, float32.
    eps: added to the variance.
  """
  R, D = x_RD.shape
  programs = min(R, PROGRAMS)

  def body(x, y, scale, bias, *rest):
    *y_bias, s, n = rest
    gamma_D, beta_D = _load(scale), _load(bias)
    c_D = _load(*y_bias) if y_bias else None

    def row(r, carry):
      y_D = _load(y.at[r]).astype(f32)
      s_D = _load(x.at[r]) + (y_D if c_D is None else y_D + c_D)
      hat_D, _ = _normal(s_D, eps)
      s[r] = s_D
      n[r] = (hat_D * gamma_D + beta_D).astype(n.dtype)
      return carry

    over_rows(R, programs, row, None)

  out = jax.ShapeDtypeStruct((R, D), f32), jax.typeof(y_RD)
  y_bias = [] if y_bias_D is None else [y_bias_D]
  kernel = row_kernel(body, "add_norm", out, programs)
  return kernel(x_RD, y_RD, scale_D, bias_D, *y_bias)


def backward(
  s_RD: Array,
  ds_RD: Array,
  dn_RD: Array,
  scale_D: Array,
  *,
  eps: float,
  has_bias: bool,
) -> tuple[Array, ...]:
  """Return (dx, dy, dγ, dβ), and dc after them if y had a bias.

  Args:
    s_RD: the residual sum, float32.
    ds_RD: its cotangent, float32.
    dn_RD: the cotangent of n, bfloat16 or float16.
    scale_D: γ, float32.
    eps: added to the variance.
    has_bias: whether y had a bias.

  Returns:
    dx (R, D) in float32, dy (R, D), which is dx in dn's dtype, and the sums
    (D,) in float32.
  """
  R, D = s_RD.shape
  programs = min(R, PROGRAMS_OF_BIAS if has_bias else PROGRAMS)

  def body(s, ds, dn, scale, dx, dy, *parts):
    gamma_D = _load(scale)

    def row(r, sums):
      dscale_D, dbias_D, *dc = sums
      hat_D, rate = _normal(_load(s.at[r]), eps)
      dn_D = _load(dn.at[r]).astype(f32)
      g_D = dn_D * gamma_D
      shift, slope = _mean(g_D), _mean(g_D * hat_D)
      dx_D = _load(ds.at[r]) + rate * (g_D - shift - hat_D * slope)
      dx[r] = dx_D
      dy[r] = dx_D.astype(dy.dtype)
      dc = [x_D + dx_D for x_D in dc]
      return dscale_D + dn_D * hat_D, dbias_D + dn_D, *dc

    zero_D = plgpu.layout_cast(jnp.zeros(D, f32), _layout(D))
    p = lax.axis_index("p")
    sums = over_rows(R, programs, row, (zero_D,) * len(parts))
    for part, sum_D in zip(parts, sums, strict=True):
      part[p] = sum_D

  dx_type = jax.ShapeDtypeStruct((R, D), f32)
  part_type = jax.ShapeDtypeStruct((programs, D), f32)
  sums = 3 if has_bias else 2
  out = dx_type, jax.typeof(dn_RD), *[part_type] * sums
  kernel = row_kernel(body, "add_norm_backward", out, programs)
  dx_RD, dy_RD, *parts = kernel(s_RD, ds_RD, dn_RD, scale_D)
  return dx_RD, dy_RD, *jnp.stack(parts).sum(axis=1)


def _layout(D: int):
  """Return the register layout of a row: D / 128 numbers a thread."""
  of_thread = D // WARPGROUP
  vector = next(v for v in (4, 2, 1) if of_thread % v == 0)
  return plgpu.Layout.WG_STRIDED((D,), vec_size=vector)


def _load(ref) -> Array:
  return plgpu.load(ref, layout=_layout(ref.shape[-1]))


def _mean(x_D: Array) -> Array:
  return jnp.sum(x_D) * (1 / x_D.shape[0])


def _normal(s_D: Array, eps: float) -> tuple[Array, Array]:
  """Return ŝ and 1 / σ."""
  off_D = s_D - _mean(s_D)
  rate = lax.rsqrt(_mean(off_D * off_D) + eps)
  return off_D * rate, rate
