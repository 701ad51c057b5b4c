"""Hopper kernel of the states at the borders of the slices of time.

    y_0 = outer,    y_{s+1} = x_{2s+1} + w_{2s+1} (x_{2s} + w_{2s} y_s)

of the sums x over half slices; y_S is the state behind the last slice. w is 1
where the half is whole, of one document, that of the token before it, and else
0; without documents all are. For cotangents the same from the end.
"""

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import tiles as common
from pallas_kernels.polynomial.gpu.tiles import Call, F, V, f32


def sums(
  halves: tuple,
  outer: tuple | None,
  whole_NB: Array | None,
  call: Call,
  *,
  left: bool = False,
) -> tuple[Array, Array]:
  """(KVᵀ, KK) at the slices + 1 borders.

  Args:
    halves: (KVᵀ, KK) of the N half slices, (N, B, heads, V, ·); N may be odd.
    outer: what is before the first slice, or from the `left` behind the last;
      None: zeros.
    whole_NB: whether halves are whole; None: all are.
    call: of the slices.
    left: whether to walk from the end.
  """
  flags = () if whole_NB is None else (whole_NB.astype(jnp.int32),)
  arrays = (*map(_tiles, halves), *map(_tiles, outer or ()), *flags)
  N, wide = halves[0].shape[0], call.E // F

  def body(*refs):
    row, tile = lax.axis_index("row"), lax.axis_index("tile")
    b, head = lax.div(row, call.heads), lax.rem(row, call.heads)
    ins, outs = refs[: len(arrays)], refs[len(arrays) :]
    whole = ins[-1] if flags else None

    def run(i: int, tile) -> None:
      at = lambda ref, n: ref.at[n, b, head, tile]
      start = common.zeros((V, F))
      if outer:
        start = _load(ins[2 + i].at[b, head, tile])
      joined = lambda n: None if whole is None else whole[n, b] != 0
      x = lambda n: _load(at(ins[i], n))
      _walk(call, N, start, x, joined, lambda s: at(outs[i], s), left=left)

    pl.when(tile < wide)(lambda: run(0, tile))
    pl.when(tile == wide)(lambda: run(1, 0))

  shape = (call.slices + 1, call.B, call.heads)
  kernel = plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct((*shape, n, V, F), f32) for n in (wide, 1)],
    compiler_params=common.compiler_params(),
    kernel_name="polynomial_borders",
    grid=(call.B * call.heads, wide + 1),
    grid_names=("row", "tile"),
  )
  return tuple(x.reshape(*shape, V, -1) for x in kernel(*arrays))


def _tiles(x: Array) -> Array:
  """(…, V, ·) as tiles of V × F that lie together, whatever they are of."""
  return x.reshape(*x.shape[:-2], -1, V, F)


def _load(ref):
  return plgpu.load(ref, layout=common.LAYOUT, optimized=False)


def _walk(call: Call, N: int, y, x, joined, out, *, left: bool) -> None:
  """Writes y at every border; x(n) is the sum of a half."""
  S = call.slices

  def add(y, value, keep):
    return value + (
      y if keep is None else jnp.where(keep, y, jnp.zeros_like(y))
    )

  def step(i, y):
    s = S - 1 - i if left else i
    halves = (2 * s + 1, 2 * s) if left else (2 * s, 2 * s + 1)
    values = [x(n) for n in halves]  # both loads before the first sum
    for n, value in zip(halves, values, strict=True):
      y = add(y, value, joined(n))
    out(s if left else s + 1)[...] = y
    return y

  out(S if left else 0)[...] = y
  odd = N % 2  # the last slice is its first half alone
  if odd and left:
    y = add(y, x(N - 1), joined(N - 1))
    out(S - 1)[...] = y
  y = lax.fori_loop(odd if left else 0, S if left else S - odd, step, y)
  if odd and not left:
    out(S)[...] = add(y, x(N - 1), joined(N - 1))
