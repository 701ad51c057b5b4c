"""A Hopper kernel of the backward of a gated short convolution.

    c_t = Σ_j w_j ∘ u_{t−K+1+j} + b,   g = z + a,   y = c ∘ g + u
    e = dy ∘ g,   dz = dy ∘ c
    du_t = dy_t + Σ_j w_j ∘ e_{t+K−1−j}
    dw_j = Σ_t e_t ∘ u_{t−K+1+j},   db = Σ e,   da = Σ dz

A warpgroup goes through some tokens of a row, for some of its channels, from
left to right. It holds the K − 1 tokens behind it and the K − 1 gradients du
that later tokens add to, so that every array is read or written once, but for
K − 1 tokens on either side of its own: 10 bytes an element. c is made again.
XLA's fusions for the same move twice as much.
"""

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_conv import WARPGROUP
from pallas_kernels.row_kernel import row_kernel

PROGRAMS = 10 * 132  # all at once on a Hopper's 132 multiprocessors
f32 = jnp.float32


def backward(
  u_BTD: Array,
  z_BTD: Array,
  dy_BTD: Array,
  taps_KD: Array,
  bias_D: Array,
  of_z_D: Array,
) -> tuple[Array, Array, Array]:
  """(du, dz, in the dtype of u; dw (K, D), db and da, stacked, float32).

  Args:
    u_BTD, z_BTD, dy_BTD: bfloat16 or float16, D a multiple of 128.
    taps_KD: w, float32.
    bias_D: b, float32.
    of_z_D: a, float32.
  """
  B, T, D = u_BTD.shape
  K = taps_KD.shape[0]
  width = WARPGROUP * (1 + (D % (2 * WARPGROUP) == 0))
  columns = D // width
  chunks = min(T, max(PROGRAMS // (columns * B), 1))  # of a row
  tokens = -(-T // chunks)
  chunks = -(-T // tokens)
  layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // WARPGROUP)
  load = lambda ref: plgpu.load(ref, layout=layout).astype(f32)

  def body(u, z, dy, taps, bias, of_z, du, dz, parts):
    p, at = lax.axis_index("p"), pl.ds(lax.axis_index("c") * width, width)
    b, first = lax.div(p, chunks), lax.rem(p, chunks) * tokens
    last = jnp.minimum(first + tokens, T)
    w = [load(taps.at[j, at]) for j in range(K)]
    bias_W, of_z_W = load(bias.at[at]), load(of_z.at[at])

    def behind(t, carry):
      """With the gradient of token t: du of token t − K + 1 is whole."""
      e_W, pending = carry
      pending = [x + w[m] * e_W for m, x in enumerate(pending)]

      @pl.when(t - (K - 1) >= first)
      def _():
        du[b, t - (K - 1), at] = pending[0].astype(du.dtype)

      return pending[1:]

    def token(t, carry):
      past, waiting, sums = carry
      window = [*past, load(u.at[b, t, at])]
      dy_W = load(dy.at[b, t, at])
      e_W = dy_W * (load(z.at[b, t, at]) + of_z_W)
      c_W = bias_W
      for w_W, u_W in zip(w, window, strict=True):
        c_W = c_W + w_W * u_W
      dz_W = dy_W * c_W
      dz[b, t, at] = dz_W.astype(dz.dtype)
      more = [*(e_W * u_W for u_W in window), e_W, dz_W]
      sums = [x + y for x, y in zip(sums, more, strict=True)]
      return window[1:], behind(t, (e_W, [*waiting, dy_W])), sums

    zero_W = plgpu.layout_cast(jnp.zeros(width, f32), layout)
    past = [
      load(u.at[b, jnp.maximum(first - n, 0), at]) * _one_if(first >= n)
      for n in range(K - 1, 0, -1)
    ]
    carry = past, [zero_W] * (K - 1), [zero_W] * (K + 2)
    _, waiting, sums = lax.fori_loop(first, last, token, carry)
    for n in range(K - 1):
      t = jnp.minimum(last + n, T - 1)
      e_W = load(dy.at[b, t, at]) * (load(z.at[b, t, at]) + of_z_W)
      e_W = e_W * _one_if(last + n < T)
      waiting = behind(last + n, (e_W, [*waiting, zero_W]))
    for n, sum_W in enumerate(sums):
      parts[p, n, at] = sum_W

  like = jax.typeof(u_BTD)
  parts = jax.ShapeDtypeStruct((B * chunks, K + 2, D), f32)
  kernel = row_kernel(
    body, "gated_conv_backward", (like, like, parts), B * chunks, columns
  )
  du_BTD, dz_BTD, parts = kernel(u_BTD, z_BTD, dy_BTD, taps_KD, bias_D, of_z_D)
  return du_BTD, dz_BTD, parts.sum(axis=0)


def _one_if(true):
  return jnp.where(true, 1.0, 0.0).astype(f32)
