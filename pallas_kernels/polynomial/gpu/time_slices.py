"""The states at the boundaries of slices of time.

Where batch × heads give too few walks, time is cut into slices that are
walked at once. Each needs the state before it. First, kernels sum the state of
each half slice from its own keys alone (`forward.key_states`). Then the kernel
here adds up these sums x, from slice boundary to slice boundary:

    y_0 = initial,    y_{s+1} = x_{2s+1} + w_{2s+1} (x_{2s} + w_{2s} y_s)

y_S is the state after the last of S slices. w is 1 where the half slice has no
document boundary, and 0 where it has one: the state before does not reach
beyond it. The backward does the same with the cotangents of the state, from the
end (`backward.query_cotangents`).

A state is (KVᵀ, KK) as the kernels hold it, (B, walks, TILE, ·) float32.
"""

from collections.abc import Callable

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import backward, documents, forward, tiles
from pallas_kernels.polynomial.gpu.documents import Documents
from pallas_kernels.polynomial.gpu.launch import PART, TILE, C, Launch
from pallas_kernels.polynomial.gpu.tiles import f32
from pallas_kernels.polynomial.state import State


def states_before(
  k: Array,
  v: Array,
  masks: Documents | None,
  initial: tuple[Array, Array] | None,
  state: State | None,
  launch: Launch,
) -> tuple[Array, ...]:
  """Compute the state before each slice, and how many tokens it sums.

  Args:
    k: (B, T, H, 16 · parts), padded.
    v: (B, T, H, P), padded.
    masks: the masks of documents.
    initial: the state before the first slice; None for zeros.
    state: the same in the public form, which has the count of its tokens.
    launch: the launch that has the slices.

  Returns:
    KVᵀ and KK, (slices + 1, B, walks, TILE, ·), and the count (slices, B, H),
    all float32. The last entry of KVᵀ and KK is the state after the last slice.
    A single slice has its own entry only, or () where the initial state is 0.
  """
  if launch.slices == 1:
    if initial is None:
      return ()
    kv, kk = (x[None] for x in initial)
  else:
    kv, kk = _key_boundaries(k, v, masks, initial, launch)
  step = launch.chunks * C
  count_S = jnp.arange(launch.slices, dtype=jnp.float32) * step
  if masks is not None:
    # The masks count tokens of the row, document by document.
    count_S = jnp.zeros_like(count_S)
  count_BH = jnp.zeros((launch.B, launch.H), jnp.float32)
  if state is not None and launch.c0:
    count_BH = _count(state)
  return kv, kk, count_S[:, None, None] + count_BH[None]


def cotangents_after(
  q: Array,
  do: Array,
  per_token: dict[str, Array],
  masks: Documents | None,
  final: tuple[Array, Array] | None,
  launch: Launch,
) -> tuple[Array, ...]:
  """Compute the cotangent of the state after each slice.

  Args:
    q: (B, T, H, 16 · parts), padded.
    do: (B, T, H, P), padded.
    per_token: r, dz and the codes of documents, as `backward.backward_keys`
      takes them.
    masks: the masks of documents.
    final: the cotangent of the state after the last token; None for zeros.
    launch: the launch that has the slices.

  Returns:
    The cotangents of KVᵀ and KK, (slices + 1, B, walks, TILE, ·), of which the
    first entry is before the first slice. A single slice has the entry after it
    only, or () where that is 0.
  """
  if launch.slices == 1:
    return tuple(x[None] for x in final or ())
  return _query_boundaries(q, do, per_token, masks, final, launch)


def key_state(
  k: Array, v: Array, masks: Documents | None, launch: Launch
) -> list[Array]:
  """Compute the state after the last token, from zeros."""
  if launch.slices == 1:
    per_token = documents.kernel_inputs(masks, launch)
    sums = forward.key_states(k, v, per_token, launch)
  else:
    sums = _key_boundaries(k, v, masks, None, launch)
  return [x[-1] for x in sums]


def query_cotangent(
  q: Array,
  do: Array,
  per_token: dict[str, Array],
  masks: Documents | None,
  launch: Launch,
) -> list[Array]:
  """Compute the cotangent of the state before the first token, from zeros."""
  if launch.slices == 1:
    sums = backward.query_cotangents(q, do, per_token, launch)
  else:
    sums = _query_boundaries(q, do, per_token, masks, None, launch)
  return [x[0] for x in sums]


def total_count(
  own_BH: Array, outer: State | None, masks: Documents | None, launch: Launch
) -> Array:
  """Add the count of an initial state, or its cotangent, to a row's own.

  The count is the last corner of KK of a public state, which the kernels' KK
  has not. The initial state counts where the row is a single document.
  """
  if outer is None or not launch.affine:
    return own_BH
  outer_BH = _count(outer)
  if masks is not None:
    outer_BH = jnp.where(masks.single_B[:, None], outer_BH, 0)
  return own_BH + outer_BH


def _count(state: State) -> Array:
  """Select the count of tokens of a state with c0 or c1, (B, H)."""
  return state.kk_BHGG[:, :, -1, -1]


def _key_boundaries(
  k, v, masks, initial, launch: Launch
) -> tuple[Array, Array]:
  """Compute the states at all slice boundaries."""
  halves = launch.half_slices
  per_token = documents.kernel_inputs(masks, launch)
  sums = forward.key_states(k, v, per_token, halves)
  unbroken_NB = documents.unbroken_slices(masks, halves)
  return boundary_states(sums, initial, unbroken_NB, launch)


def _query_boundaries(
  q, do, per_token, masks, final, launch: Launch
) -> tuple[Array, Array]:
  """Compute the cotangents of the states at all slice boundaries."""
  halves = launch.half_slices
  sums = backward.query_cotangents(q, do, per_token, halves)
  unbroken_NB = documents.unbroken_slices(masks, halves)
  return boundary_states(sums, final, unbroken_NB, launch, from_end=True)


# The kernel.


def boundary_states(
  sums: tuple[Array, Array] | list[Array],
  outer: tuple[Array, Array] | None,
  unbroken_NB: Array | None,
  launch: Launch,
  *,
  from_end: bool = False,
) -> tuple[Array, Array]:
  """Add up the sums of half slices, from slice boundary to slice boundary.

  Args:
    sums: (KVᵀ, KK) of each of N half slices, (N, B, walks, TILE, ·). N may be
      odd: the last slice is a single half then.
    outer: the state before the first slice, or with `from_end` the cotangent
      after the last one; None for zeros.
    unbroken_NB: which half slices have no document boundary; None: all.
    launch: the launch that has the slices.
    from_end: whether to add up from the last slice to the first.

  Returns:
    (KVᵀ, KK) at each slice boundary, (slices + 1, B, walks, TILE, ·).
  """
  flags = () if unbroken_NB is None else (unbroken_NB.astype(jnp.int32),)
  arrays = (*map(_as_tiles, sums), *map(_as_tiles, outer or ()), *flags)
  N, kv_tiles = sums[0].shape[0], launch.E // PART

  def body(*refs):
    n, tile = lax.axis_index("n"), lax.axis_index("tile")
    b, walk = lax.div(n, launch.walks), lax.rem(n, launch.walks)
    inputs, outputs = refs[: len(arrays)], refs[len(arrays) :]

    def run(which: int, tile) -> None:
      """Add up KVᵀ (which = 0) or KK (1), one tile of it."""
      start = tiles.zeros((TILE, PART))
      if outer:
        start = _load(inputs[2 + which].at[b, walk, tile])

      def half_sum(n):
        return _load(inputs[which].at[n, b, walk, tile])

      def is_unbroken(n):
        return inputs[-1][n, b] != 0 if flags else None

      def write(boundary, y):
        outputs[which].at[boundary, b, walk, tile][...] = y

      _add_up(launch, N, start, half_sum, is_unbroken, write, from_end=from_end)

    pl.when(tile < kv_tiles)(lambda: run(0, tile))
    pl.when(tile == kv_tiles)(lambda: run(1, 0))

  shape = (launch.slices + 1, launch.B, launch.walks)
  kernel = plgpu.kernel(
    body,
    out_type=[
      jax.ShapeDtypeStruct((*shape, n, TILE, PART), f32) for n in (kv_tiles, 1)
    ],
    compiler_params=tiles.compiler_params(),
    kernel_name="polynomial_borders",
    grid=(launch.B * launch.walks, kv_tiles + 1),
    grid_names=("n", "tile"),
  )
  kv, kk = (x.reshape(*shape, TILE, -1) for x in kernel(*arrays))
  return kv, kk


def _as_tiles(x: Array) -> Array:
  """Cut (…, TILE, ·) into tiles (TILE, PART) that are contiguous in memory.

  The sums go element by element, so that it does not matter which elements
  are in a tile.
  """
  return x.reshape(*x.shape[:-2], -1, TILE, PART)


def _load(ref):
  return plgpu.load(ref, layout=tiles.LAYOUT, optimized=False)


def _add_up(
  launch: Launch,
  N: int,
  y,
  half_sum: Callable,
  is_unbroken: Callable,
  write: Callable,
  *,
  from_end: bool,
) -> None:
  """Write one tile of the state at every slice boundary.

  Args:
    launch: the launch that has the slices.
    N: the number of half slices.
    y: the tile of the outer state.
    half_sum: loads the tile of half slice n.
    is_unbroken: whether half slice n has no document boundary; None: it has
      none.
    write: takes (boundary, tile).
    from_end: whether to add up from the last slice to the first.
  """
  S = launch.slices

  def add(y, value, unbroken):
    if unbroken is None:
      return value + y
    return value + jnp.where(unbroken, y, jnp.zeros_like(y))

  def step(i, y):
    s = S - 1 - i if from_end else i
    halves = (2 * s + 1, 2 * s) if from_end else (2 * s, 2 * s + 1)
    values = [half_sum(n) for n in halves]  # both loads before the first sum
    for n, value in zip(halves, values, strict=True):
      y = add(y, value, is_unbroken(n))
    write(s if from_end else s + 1, y)
    return y

  write(S if from_end else 0, y)
  odd = N % 2  # the last slice is a single half
  if odd and from_end:
    y = add(y, half_sum(N - 1), is_unbroken(N - 1))
    write(S - 1, y)
  first = odd if from_end else 0
  y = lax.fori_loop(first, S if from_end else S - odd, step, y)
  if odd and not from_end:
    write(S, add(y, half_sum(N - 1), is_unbroken(N - 1)))
