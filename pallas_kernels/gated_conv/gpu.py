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

from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.row_kernel import load, row_kernel, split, zeros

PROGRAMS = 7 * 132  # all at once on a Hopper's 132 multiprocessors
f32 = jnp.float32


class _Part(NamedTuple):
  """A program's part: tokens of a row from `first` on, and some channels."""

  refs: dict[str, Any]
  b: Array
  first: Array
  channels: pl.Slice

  def load(self, name: str, t: Array) -> Array:
    return load(self.refs[name].at[self.b, t, self.channels])

  def store(self, name: str, t: Array, x_W: Array) -> None:
    ref = self.refs[name]
    ref[self.b, t, self.channels] = x_W.astype(ref.dtype)

  def zero(self) -> Array:
    return zeros(self.channels.size)


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
  width, columns = split(D, 2)
  chunks = max(PROGRAMS // (columns * B), 1)  # of a row
  tokens = -(-T // chunks)
  chunks = -(-T // tokens)

  def body(u, z, dy, taps, bias, of_z, du, dz, sums):
    p, at = lax.axis_index("p"), pl.ds(lax.axis_index("c") * width, width)
    b, first = p // chunks, p % chunks * tokens
    last = jnp.minimum(first + tokens, T)
    refs = dict(u=u, z=z, dy=dy, du=du, dz=dz)
    part = _Part(refs, b, first, at)
    w = [load(taps.at[j, at]) for j in range(K)]
    of_z_W, bias_W = load(of_z.at[at]), load(bias.at[at])
    waiting, sums_W = _own_tokens(part, last, w, bias_W, of_z_W)
    _next_tokens(part, last, T, w, of_z_W, waiting)
    for n, sum_W in enumerate(sums_W):
      sums[p, n, at] = sum_W

  like = jax.typeof(u_BTD)
  sums = jax.ShapeDtypeStruct((B * chunks, K + 2, D), f32)
  kernel = row_kernel(
    body, "gated_conv_backward", (like, like, sums), B * chunks, columns
  )
  du_BTD, dz_BTD, sums = kernel(u_BTD, z_BTD, dy_BTD, taps_KD, bias_D, of_z_D)
  return du_BTD, dz_BTD, sums.sum(axis=0)


def _own_tokens(part: _Part, last, w: list, bias_W, of_z_W):
  """Writes dz, and the du that are whole; the others, and the sums."""
  K, first = len(w), part.first

  def token(t, carry):
    past, waiting, sums = carry
    window, dy_W = [*past, part.load("u", t)], part.load("dy", t)
    e_W = dy_W * (part.load("z", t) + of_z_W)
    c_W = bias_W
    for w_W, u_W in zip(w, window, strict=True):
      c_W = c_W + w_W * u_W
    dz_W = dy_W * c_W
    part.store("dz", t, dz_W)
    more = [*(e_W * u_W for u_W in window), e_W, dz_W]
    sums = [x + y for x, y in zip(sums, more, strict=True)]
    return window[1:], _add(part, t, w, e_W, [*waiting, dy_W]), sums

  past = [
    part.load("u", jnp.maximum(first - n, 0)) * _one_if(first >= n)
    for n in range(K - 1, 0, -1)
  ]
  zero_W = part.zero()
  carry = past, [zero_W] * (K - 1), [zero_W] * (K + 2)
  _, waiting, sums = lax.fori_loop(first, last, token, carry)
  return waiting, sums


def _next_tokens(part: _Part, last, T: int, w: list, of_z_W, waiting) -> None:
  """Writes the last K − 1 du, to which the tokens behind them add."""
  for n in range(len(w) - 1):
    t = jnp.minimum(last + n, T - 1)
    e_W = part.load("dy", t) * (part.load("z", t) + of_z_W)
    e_W = e_W * _one_if(last + n < T)
    waiting = _add(part, last + n, w, e_W, [*waiting, part.zero()])


def _add(part: _Part, t, w: list, e_W, waiting: list) -> list:
  """Adds e_t to du of t − K + 1 … t; writes the first, which is whole."""
  waiting = [x + w_W * e_W for x, w_W in zip(waiting, w, strict=True)]
  whole = t - (len(w) - 1)
  pl.when(whole >= part.first)(lambda: part.store("du", whole, waiting[0]))
  return waiting[1:]


def _one_if(true):
  return jnp.where(true, 1.0, 0.0).astype(f32)
