"""Hopper kernels of the exact GELU of a product and its bias.

    x = z + b,   y = x Φ(x)
    dz = dy (Φ(x) + x φ(x)),   db = Σ dz

Φ is the normal distribution, φ its density. With t = 1 / (1 + p |x| / √2),

    Φ(−|x|) = t (a₁ + t (a₂ + … + t a₅)) exp(−x²/2) / 2

to 7.5e-8 (Abramowitz and Stegun, 7.1.26), which hands φ on. A warpgroup takes
every n-th row of some columns, so that every array is read or written once: 4
bytes an element forward, 6 backward, and db is summed in float32 on the way.
"""

import math

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.row_kernel import load, over_rows, row_kernel, split, zeros

PROGRAMS = 10 * 132  # forward, all at once on a Hopper's 132 multiprocessors
PROGRAMS_BACKWARD = 8 * 132
f32 = jnp.float32
_P = 0.3275911
_A = 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429


def forward(z_RD: Array, b_D: Array) -> Array:
  """y (R, D) in the dtype of z.

  Args:
    z_RD: bfloat16 or float16, D a multiple of 128.
    b_D: float32.
  """
  R, D = z_RD.shape
  width, columns = split(D, 8)
  programs = _programs(R, columns, PROGRAMS)

  def body(z, b, y):
    at = pl.ds(lax.axis_index("c") * width, width)
    b_W = load(b.at[at])

    def row(r, carry):
      x_W = load(z.at[r, at]) + b_W
      y[r, at] = (x_W * _normal(x_W)[0]).astype(y.dtype)
      return carry

    over_rows(R, programs, row, None)

  kernel = row_kernel(
    body, "gelu", jax.typeof(z_RD), programs, columns, approx_math=True
  )
  return kernel(z_RD, b_D)


def backward(z_RD: Array, b_D: Array, dy_RD: Array) -> tuple[Array, Array]:
  """(dz in the dtype of z, db in float32)."""
  R, D = z_RD.shape
  width, columns = split(D, 8)
  programs = _programs(R, columns, PROGRAMS_BACKWARD)

  def body(z, b, dy, dz, parts):
    at = pl.ds(lax.axis_index("c") * width, width)
    b_W = load(b.at[at])

    def row(r, db_W):
      # Both loads stand before the store, which nothing passes.
      x_W, dy_W = load(z.at[r, at]) + b_W, load(dy.at[r, at])
      below_W, bell_W = _normal(x_W)
      density_W = x_W * bell_W * (1 / math.sqrt(2 * math.pi))
      dz_W = dy_W * (below_W + density_W)
      dz[r, at] = dz_W.astype(dz.dtype)
      return db_W + dz_W

    parts[lax.axis_index("p"), at] = over_rows(R, programs, row, zeros(width))

  out = jax.typeof(z_RD), jax.ShapeDtypeStruct((programs, D), f32)
  kernel = row_kernel(
    body, "gelu_backward", out, programs, columns, approx_math=True
  )
  dz_RD, parts_PD = kernel(z_RD, b_D, dy_RD)
  return dz_RD, parts_PD.sum(axis=0)


def _normal(x_W: Array) -> tuple[Array, Array]:
  """Φ(x) and exp(−x²/2)."""
  bell_W = jnp.exp2(x_W * x_W * (-0.5 / math.log(2)))
  u_W = 1 + jnp.abs(x_W) * (_P / math.sqrt(2))
  t_W = lax.rsqrt(u_W * u_W)  # a reciprocal is many instructions
  sum_W = t_W * (0.5 * _A[-1]) + 0.5 * _A[-2]
  for a in _A[-3::-1]:
    sum_W = sum_W * t_W + 0.5 * a
  tail_W = sum_W * t_W * bell_W
  return jnp.where(x_W < 0, tail_W, 1 - tail_W), bell_W


def _programs(R: int, columns: int, all_at_once: int) -> int:
  """Of each part of the columns."""
  return min(R, max(all_at_once // columns, 1))
