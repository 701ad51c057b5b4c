"""A Hopper kernel of the backward of a gated short convolution.

    c_t = Σ_j w_j ∘ u_{t−K+1+j} + b,   g = z + a,   y = c ∘ g + u
    e = dy ∘ g,   dz = dy ∘ c
    du_t = dy_t + Σ_j w_j ∘ e_{t+K−1−j}
    dw_j = Σ_t e_t ∘ u_{t−K+1+j},   db = Σ e,   da = Σ dz

A program walks a slice of a row's tokens from left to right, for some of the
channels. It holds the last K − 1 tokens, and the K − 1 gradients du that later
tokens still add to. Every array is therefore read or written once, 10 bytes an
element, except for K − 1 tokens on either side of the slice. c is computed
again. XLA's fusions move twice as much.
"""

from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.row_kernel import load, row_kernel, split, zeros

# So many programs run at once on a Hopper GPU's 132 multiprocessors.
PROGRAMS = 7 * 132
f32 = jnp.float32


class _Slice(NamedTuple):
  """A program's part of the arrays: a slice of time, and some channels."""

  refs: dict[str, Any]  # u, z, dy; du, dz
  b: Array  # the row of the batch
  first: Array  # the slice's first token
  channels: pl.Slice

  def load(self, name: str, t: Array) -> Array:
    """Load the channels of token t as float32."""
    return load(self.refs[name].at[self.b, t, self.channels])

  def store(self, name: str, t: Array, x_W: Array) -> None:
    """Store the channels of token t in the array's dtype."""
    ref = self.refs[name]
    ref[self.b, t, self.channels] = x_W.astype(ref.dtype)

  def zero(self) -> Array:
    """Return zeros as `load` has them."""
    return zeros(self.channels.size)


def backward(
  u_BTD: Array,
  z_BTD: Array,
  dy_BTD: Array,
  taps_KD: Array,
  bias_D: Array,
  z_bias_D: Array,
) -> tuple[Array, Array, Array]:
  """Return (du, dz, sums).

  Args:
    u_BTD: bfloat16 or float16, D a multiple of 128.
    z_BTD: the gate, in u's dtype.
    dy_BTD: the cotangent of y, in u's dtype.
    taps_KD: w, float32.
    bias_D: b, float32.
    z_bias_D: a, float32.

  Returns:
    du and dz (B, T, D) in u's dtype, and float32 sums (K + 2, D): the K rows of
    dw, then db, then da.
  """
  B, T, D = u_BTD.shape
  K = taps_KD.shape[0]
  width, columns = split(D, 2)
  slices = max(PROGRAMS // (columns * B), 1)  # of a row
  tokens = -(-T // slices)
  slices = -(-T // tokens)

  def body(u, z, dy, taps, bias, z_bias, du, dz, sums):
    p, at = lax.axis_index("p"), pl.ds(lax.axis_index("c") * width, width)
    b, first = p // slices, p % slices * tokens
    last = jnp.minimum(first + tokens, T)
    refs = dict(u=u, z=z, dy=dy, du=du, dz=dz)
    own = _Slice(refs, b, first, at)
    w = [load(taps.at[j, at]) for j in range(K)]
    z_bias_W, bias_W = load(z_bias.at[at]), load(bias.at[at])
    waiting, sums_W = _own_tokens(own, last, w, bias_W, z_bias_W)
    _next_tokens(own, last, T, w, z_bias_W, waiting)
    for n, sum_W in enumerate(sums_W):
      sums[p, n, at] = sum_W

  like = jax.typeof(u_BTD)
  sums = jax.ShapeDtypeStruct((B * slices, K + 2, D), f32)
  kernel = row_kernel(
    body, "gated_conv_backward", (like, like, sums), B * slices, columns
  )
  arrays = u_BTD, z_BTD, dy_BTD, taps_KD, bias_D, z_bias_D
  du_BTD, dz_BTD, sums = kernel(*arrays)
  return du_BTD, dz_BTD, sums.sum(axis=0)


def _own_tokens(own: _Slice, last, w: list, bias_W, z_bias_W):
  """Walk the slice's tokens: write dz, and du of all but the last K − 1.

  Returns:
    du of the last K − 1 tokens so far, and the slice's sums dw, db, da.
  """
  K, first = len(w), own.first

  def token(t, carry):
    past, waiting, sums = carry
    window, dy_W = [*past, own.load("u", t)], own.load("dy", t)
    e_W = dy_W * (own.load("z", t) + z_bias_W)
    c_W = bias_W
    for w_W, u_W in zip(w, window, strict=True):
      c_W = c_W + w_W * u_W
    dz_W = dy_W * c_W
    own.store("dz", t, dz_W)
    more = [*(e_W * u_W for u_W in window), e_W, dz_W]
    sums = [x + y for x, y in zip(sums, more, strict=True)]
    return window[1:], _add(own, t, w, e_W, [*waiting, dy_W]), sums

  past = [
    own.load("u", jnp.maximum(first - n, 0)) * _one_if(first >= n)
    for n in range(K - 1, 0, -1)
  ]
  zero_W = own.zero()
  carry = past, [zero_W] * (K - 1), [zero_W] * (K + 2)
  _, waiting, sums = lax.fori_loop(first, last, token, carry)
  return waiting, sums


def _next_tokens(own: _Slice, last, T: int, w: list, z_bias_W, waiting) -> None:
  """Write du of the slice's last K − 1 tokens; the next K − 1 add to them."""
  for n in range(len(w) - 1):
    t = jnp.minimum(last + n, T - 1)
    e_W = own.load("dy", t) * (own.load("z", t) + z_bias_W)
    e_W = e_W * _one_if(last + n < T)
    waiting = _add(own, last + n, w, e_W, [*waiting, own.zero()])


def _add(own: _Slice, t, w: list, e_W, waiting: list) -> list:
  """Add e_t to du of tokens t − K + 1 … t, and write the first of them.

  No later token adds to that first one. It is written by the slice that it
  belongs to.
  """
  waiting = [x + w_W * e_W for x, w_W in zip(waiting, w, strict=True)]
  whole = t - (len(w) - 1)
  pl.when(whole >= own.first)(lambda: own.store("du", whole, waiting[0]))
  return waiting[1:]


def _one_if(true) -> Array:
  """Return 1.0 if true, else 0.0: a factor that masks loaded values."""
  return jnp.where(true, 1.0, 0.0).astype(f32)
