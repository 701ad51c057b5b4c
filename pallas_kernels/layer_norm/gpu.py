"""Hopper kernels of a residual sum and its layer norm, forward and backward.

    s = x + (y + c),   ŝ = (s − mean s) / σ,   σ² = mean (s − mean s)² + eps
    n = γ ∘ ŝ + β
    ds' = ds + (g − mean g − ŝ mean(g ∘ ŝ)) / σ,   g = γ ∘ dn
    dγ = Σ dn ∘ ŝ,   dβ = Σ dn,   dc = Σ dx

A row is one warpgroup's, held in registers, so that every array is read or
written once: with y and n in 2 bytes, 12 D bytes a row forward and 16 D
backward. XLA's fusions for the same move 16 D and 23 D. Of n programs each
takes every n-th row, and sums its share of dγ, dβ and dc. ŝ is made again in
the backward. c is the bias of y, where it has one that was not added.
"""

import jax
from jax import Array, lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper import WARPGROUP
from pallas_kernels.row_kernel import over_rows, row_kernel

# On a Hopper's 132 multiprocessors, all at once: of 64 registers a thread at
# most, and of 72 where dc is summed too.
PROGRAMS, PROGRAMS_OF_BIAS = 8 * 132, 7 * 132
f32 = jnp.float32


def forward(
  x_RD: Array,
  y_RD: Array,
  of_y_D: Array | None,
  scale_D: Array,
  bias_D: Array,
  *,
  eps: float,
) -> tuple[Array, Array]:
  """(s, n): x's float32 and y's dtype.

  Args:
    x_RD: float32, D a multiple of 128.
    y_RD: bfloat16 or float16.
    of_y_D: c, float32, or None.
    scale_D: γ, float32.
    bias_D: β, float32.
    eps: added to the variance.
  """
  R, D = x_RD.shape
  programs = min(R, PROGRAMS)

  def body(x, y, scale, bias, *rest):
    *of_y, s, n = rest
    gamma_D, beta_D = _load(scale), _load(bias)
    c_D = _load(*of_y) if of_y else None

    def row(r, carry):
      y_D = _load(y.at[r]).astype(f32)
      s_D = _load(x.at[r]) + (y_D if c_D is None else y_D + c_D)
      hat_D, _ = _normal(s_D, eps)
      s[r] = s_D
      n[r] = (hat_D * gamma_D + beta_D).astype(n.dtype)
      return carry

    over_rows(R, programs, row, None)

  out = jax.ShapeDtypeStruct((R, D), f32), jax.typeof(y_RD)
  of_y = [] if of_y_D is None else [of_y_D]
  kernel = row_kernel(body, "add_norm", out, programs)
  return kernel(x_RD, y_RD, scale_D, bias_D, *of_y)


def backward(
  s_RD: Array,
  ds_RD: Array,
  dn_RD: Array,
  scale_D: Array,
  *,
  eps: float,
  has_bias: bool,
) -> tuple[Array, ...]:
  """(dx, dy, dγ, dβ), and dc of a y with a bias: dy is dx in dn's dtype."""
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

  wide = lambda rows: jax.ShapeDtypeStruct((rows, D), f32)
  parts = [wide(programs)] * (2 + has_bias)
  out = wide(R), jax.typeof(dn_RD), *parts
  kernel = row_kernel(body, "add_norm_backward", out, programs)
  dx_RD, dy_RD, *parts = kernel(s_RD, ds_RD, dn_RD, scale_D)
  return dx_RD, dy_RD, *jnp.stack(parts).sum(axis=1)


def _layout(D: int):
  """A thread's part of a row is D / 128 elements, in vectors."""
  of_thread = D // WARPGROUP
  vector = next(v for v in (4, 2, 1) if of_thread % v == 0)
  return plgpu.Layout.WG_STRIDED((D,), vec_size=vector)


def _load(ref) -> Array:
  return plgpu.load(ref, layout=_layout(ref.shape[-1]))


def _mean(x_D: Array) -> Array:
  return jnp.sum(x_D) * (1 / x_D.shape[0])


def _normal(s_D: Array, eps: float) -> tuple[Array, Array]:
  """ŝ and 1 / σ."""
  off_D = s_D - _mean(s_D)
  rate = lax.rsqrt(_mean(off_D * off_D) + eps)
  return off_D * rate, rate
