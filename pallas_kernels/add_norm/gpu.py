"""Hopper kernels of a residual sum and its layer norm, forward and backward.

    s = x + y,   ŝ = (s − mean s) / σ,   σ² = mean (s − mean s)² + eps
    n = γ ∘ ŝ + β
    ds' = ds + (g − mean g − ŝ mean(g ∘ ŝ)) / σ,   g = γ ∘ dn
    dγ = Σ dn ∘ ŝ,   dβ = Σ dn

A row is one warpgroup's, held in registers, so that every array is read or
written once: with y and n in 2 bytes, 12 D bytes a row forward and 16 D
backward. XLA's fusions for the same move 16 D and 23 D. A program takes every
PROGRAMS-th row, and sums its share of dγ and dβ. ŝ is made again in the
backward.
"""

import jax
from jax import Array, lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.add_norm import WARPGROUP

PROGRAMS = 1056  # 8 on each of a Hopper's 132 multiprocessors
f32 = jnp.float32


def forward(
  x_RD: Array, y_RD: Array, scale_D: Array, bias_D: Array, *, eps: float
) -> tuple[Array, Array]:
  """(s, n): x's float32 and y's dtype.

  Args:
    x_RD: float32, D a multiple of 128.
    y_RD: bfloat16 or float16.
    scale_D: γ, float32.
    bias_D: β, float32.
    eps: added to the variance.
  """
  R, D = x_RD.shape
  programs = min(R, PROGRAMS)

  def body(x, y, scale, bias, s, n):
    gamma_D, beta_D = _load(scale), _load(bias)

    def row(r, carry):
      s_D = _load(x.at[r]) + _load(y.at[r]).astype(f32)
      hat_D, _ = _normal(s_D, eps)
      s[r] = s_D
      n[r] = (hat_D * gamma_D + beta_D).astype(n.dtype)
      return carry

    _over_rows(R, programs, row, None)

  out = jax.ShapeDtypeStruct((R, D), f32), jax.typeof(y_RD)
  return _kernel(body, "add_norm", out, programs)(x_RD, y_RD, scale_D, bias_D)


def backward(
  s_RD: Array, ds_RD: Array, dn_RD: Array, scale_D: Array, *, eps: float
) -> tuple[Array, Array, Array, Array]:
  """(dx, dy, dγ, dβ): of dx = dy the first in float32, dy in dn's dtype."""
  R, D = s_RD.shape
  programs = min(R, PROGRAMS)

  def body(s, ds, dn, scale, dx, dy, dscale, dbias):
    gamma_D = _load(scale)

    def row(r, sums):
      dscale_D, dbias_D = sums
      hat_D, rate = _normal(_load(s.at[r]), eps)
      dn_D = _load(dn.at[r]).astype(f32)
      g_D = dn_D * gamma_D
      shift, slope = _mean(g_D), _mean(g_D * hat_D)
      dx_D = _load(ds.at[r]) + rate * (g_D - shift - hat_D * slope)
      dx[r] = dx_D
      dy[r] = dx_D.astype(dy.dtype)
      return dscale_D + dn_D * hat_D, dbias_D + dn_D

    zero_D = plgpu.layout_cast(jnp.zeros(D, f32), _layout(D))
    p = lax.axis_index("p")
    dscale[p], dbias[p] = _over_rows(R, programs, row, (zero_D, zero_D))

  wide = lambda rows: jax.ShapeDtypeStruct((rows, D), f32)
  out = wide(R), jax.typeof(dn_RD), wide(programs), wide(programs)
  kernel = _kernel(body, "add_norm_backward", out, programs)
  dx_RD, dy_RD, *parts = kernel(s_RD, ds_RD, dn_RD, scale_D)
  return dx_RD, dy_RD, *jnp.stack(parts).sum(axis=1)


def _kernel(body, name: str, out, programs: int):
  return plgpu.kernel(
    body,
    out_type=out,
    grid=(programs,),
    grid_names=("p",),
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(),
  )


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


def _over_rows(rows: int, programs: int, row, carry):
  """This program's rows, one after the other."""
  p = lax.axis_index("p")
  count = (rows - p + programs - 1) // programs
  return lax.fori_loop(0, count, lambda i, c: row(p + i * programs, c), carry)
