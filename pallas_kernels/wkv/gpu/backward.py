"""The Hopper kernels of WKV's backward.

With g_t = dy_t / (B_t + e^{u + k_t}), from the last token to the first,

    λ_t = g_t + e^w λ_{t+1},   μ_t = g_t y_t + e^w μ_{t+1}
    dv_t = e^{k_t} λ_{t+1} + e^{u + k_t} g_t
    dk_t = e^{k_t} (v_t λ_{t+1} − μ_{t+1}) + e^{u + k_t} g_t (v_t − y_t)
    du = Σ e^{u + k_t} g_t (v_t − y_t)
    dw = Σ e^w (λ_{t+1} A_t − μ_{t+1} B_t)

λ and μ are held over a common exponential, as A and B are. No exponent in these
sums is positive. A program walks its chunks from the last one. It computes A
and B of a chunk's tokens again, from those before the chunk that the forward
kept. Every array with tokens is read or written once; k, v and dy are read
twice where time is cut into slices.
"""

from typing import Any, NamedTuple

import jax
from jax import Array
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.wkv.gpu.forward import store_token
from pallas_kernels.wkv.gpu.walk import (
  C,
  Launch,
  Place,
  Token,
  W,
  advance,
  empty_sums,
  f32,
  full,
  join_slices,
  keep,
  kernel,
  load,
  load_sums,
  place,
  reset,
  store_sums,
  sums_names,
  sums_outputs,
  walk,
)
from pallas_kernels.wkv.state import Output, WKVState, add_token, output

_TOKENS = ("k", "v", "dy")


class _Back(NamedTuple):
  """The values that go from chunk to chunk.

  Attributes:
    before: the sums before the chunk, loaded one chunk ahead.
    later: λ and μ after the chunk.
    dw: the gradient of the decays so far.
    du: the gradient of the bonuses so far.
  """

  before: WKVState
  later: WKVState
  dw: Array
  du: Array


def slice_cotangents(
  launch: Launch, arrays: dict[str, Array]
) -> dict[str, Array]:
  """Compute λ and μ of each slice but the first, from its own tokens alone.

  Args:
    launch: the launch, of several slices.
    arrays: "k", "v", "dy", "w", "u", "before_…" (from the forward); "starts"
      with documents.

  Returns:
    "slice_…" (B, slices − 1, G, W), float32.
  """

  def body(refs):
    here = place(launch, skipped=1)
    back = _walk(launch, here, refs, empty_sums(), gradients=False)
    store_sums(refs, "slice", (here.b, here.s - 1, here.g), back.later)

  names = (*_TOKENS, "w", "u", *sums_names("before"), "starts")
  return kernel(
    "wkv_slice_cotangents",
    launch,
    body,
    {name: arrays[name] for name in names if name in arrays},
    sums_outputs("slice", launch, launch.slices - 1),
    slices=launch.slices - 1,
  )


def backward(launch: Launch, arrays: dict[str, Array]) -> dict[str, Array]:
  """Compute the gradients.

  Args:
    launch: the launch.
    arrays: "k", "v", "dy", "w", "u", "before_…" (from the forward), "end_…" (λ
      and μ after the row); "starts" with documents; with several slices also
      what `slice_cotangents` returns, and "broken" if there are documents.

  Returns:
    "dk" and "dv" (B, T, G, W) in k's dtype; in float32 "dw" and "du" (B,
    slices, G, W) of each slice, and "first_…" (B, G, W), λ and μ before the
    row.
  """

  def body(refs):
    here = place(launch)
    row = here.b, here.g
    w_W = load(refs["w"].at[row])
    end = load_sums(refs, "end", row)
    end = join_slices(launch, here, end, w_W, refs, from_end=True)
    back = _walk(launch, here, refs, end, gradients=True)
    at = here.b, here.s, here.g
    refs["dw"].at[at][...] = back.dw
    refs["du"].at[at][...] = back.du
    pl.when(here.s == 0)(lambda: store_sums(refs, "first", row, back.later))

  B, T, G = launch.B, launch.T, launch.G
  tokens = jax.ShapeDtypeStruct((B, T, G, W), launch.dtype)
  sums = jax.ShapeDtypeStruct((B, launch.slices, G, W), f32)
  outputs = dict(dk=tokens, dv=tokens, dw=sums, du=sums)
  outputs |= sums_outputs("first", launch)
  return kernel(
    "wkv_backward", launch, body, arrays, outputs, slices=launch.slices
  )


def _walk(
  launch: Launch,
  here: Place,
  refs: dict[str, Any],
  end: WKVState,
  *,
  gradients: bool,
) -> _Back:
  """Walk the slice from its last token to its first.

  Args:
    launch: the launch.
    here: the program's part.
    refs: the arrays in HBM.
    end: λ and μ after the slice.
    gradients: whether to compute the gradients, and not only λ and μ.
  """
  row = here.b, here.g
  w_W, u_W = load(refs["w"].at[row]), load(refs["u"].at[row])

  def sums_before(token):
    chunk = jnp.maximum(token, 0) // C
    return load_sums(refs, "before", (here.b, chunk, here.g))

  def step(first, tokens, back):
    sums, befores = back.before, []
    back = back._replace(before=sums_before(first - C))
    for token in tokens:
      sums = reset(token, sums)
      befores.append(sums)
      k_W, v_W = token.inputs["k"], token.inputs["v"]
      sums = advance(sums, w_W, k_W, v_W)
    for token, sums in zip(reversed(tokens), reversed(befores), strict=True):
      k_W, v_W = token.inputs["k"], token.inputs["v"]
      out = output(sums, k_W, v_W, u_W)
      g_W = token.inputs["dy"] / out.total
      after = back
      if gradients:
        after = _gradients(here, refs, token, sums, out, g_W, w_W, back)
      later = add_token(back.later, w_W, -out.exponent, g_W, g_W * out.y)
      back = keep(token, after._replace(later=reset(token, later)), back)
    return back

  last = here.first + here.tokens - 1
  back = _Back(sums_before(last), end, full(0), full(0))
  return walk(launch, here, refs, _TOKENS, C, step, back, from_end=True)


def _gradients(
  here: Place,
  refs: dict[str, Any],
  token: Token,
  sums: WKVState,
  out: Output,
  g_W: Array,
  w_W: Array,
  back: _Back,
) -> _Back:
  """Store dk and dv of a token, and add to dw and du."""
  k_W, v_W, later = token.inputs["k"], token.inputs["v"], back.later
  past_W, own_W = jnp.exp(k_W + later.maximum), out.own * g_W
  du_W = own_W * (v_W - out.y)
  through_W = past_W * (v_W * later.numerator - later.denominator)
  store_token(here, refs["dk"], token, through_W + du_W)
  store_token(here, refs["dv"], token, past_W * later.numerator + own_W)
  decayed_W = jnp.exp((sums.maximum + later.maximum) + w_W)
  dw_W = decayed_W * (
    later.numerator * sums.numerator - later.denominator * sums.denominator
  )
  return back._replace(dw=back.dw + dw_W, du=back.du + du_W)
