"""Layouts of tiles, and products on the tensor core.

A tile is a matrix in registers or shared memory. Its first axis is tokens of a
chunk, or value columns of a state; its second axis is features, value columns
or the tokens of the other side of the scores. Registers are spread over the
threads of a warpgroup as the tensor core's results are (`LAYOUT`).

Products sum in float32. Operands are bfloat16 or float16, as the inputs are.
The left operand may be in registers or in shared memory, the right one is in
shared memory. `mma` starts from zeros, `add_mma` from a tile.

An operand of a float32 launch is a `HighLow`: two bfloat16 tiles whose sum is
exact to 16 bits. A product of two such operands is three products,

    A B ≈ A_high B_high + A_high B_low + A_low B_high

The fourth, A_low B_low, is left out. It is at most 2⁻¹⁶ of the first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial.gpu.launch import PART, TILE, C, Launch
from pallas_kernels.polynomial.gpu.warpgroup import Work

SCORE_COLUMNS = 32  # columns of scores at a time, as they fit the registers
LAYOUT = plgpu.Layout.WGMMA
FIRST_AXIS = LAYOUT.reduce(1)  # one value for each index of the first axis
SECOND_AXIS = LAYOUT.reduce(0)  # one value for each index of the second axis
f32 = jnp.float32

# Swizzles, as the tensor core reads tiles of 16 and of 64 columns.
SWIZZLE_32 = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))
SWIZZLE_128 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Swizzles of float32 outputs.
FLOAT32_64 = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(64))
FLOAT32_128 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def compiler_params() -> plgpu.CompilerParams:
  """Return the compiler parameters of every kernel.

  Barriers are set by hand, because the two warpgroups of a walk run different
  code. Approximate division is far more exact than the 16-bit results.
  """
  return plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,
  )


# Tiles.


def smem(launch: Launch, *shape: int, swizzle=SWIZZLE_32):
  """Describe shared memory of this shape, in the operands' dtype."""
  return plgpu.SMEM(shape, launch.dtype, transforms=swizzle)


def output_swizzle(launch: Launch, width: int) -> tuple:
  """Return the swizzle of the staging of an output this wide in HBM."""
  if launch.float32:
    return FLOAT32_128 if width % TILE == 0 else FLOAT32_64
  return SWIZZLE_128 if width % TILE == 0 else SWIZZLE_32


def zeros(shape: tuple[int, ...], dtype=f32):
  """Make a tile of zeros in registers."""
  return plgpu.layout_cast(jnp.zeros(shape, dtype), LAYOUT)


def iota(shape: tuple[int, ...], axis: int):
  """Make a tile of each element's index along an axis."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)


def block(r: int) -> slice:
  """Return the columns of feature block r."""
  return slice(r * PART, (r + 1) * PART)


def load(work: Work, slot, name: str):
  """Load a chunk (C, ·) of an input from shared memory into registers."""
  x_s = read(work, slot, name)
  if isinstance(x_s, HighLow):
    high, low = (plgpu.load(ref, layout=LAYOUT) for ref in x_s)
    return high.astype(f32) + low.astype(f32)
  return plgpu.load(x_s, layout=LAYOUT)


def columns(x_C, width: int):
  """Repeat one value a token (C,) over columns, (C, width)."""
  return lax.broadcast_in_dim(x_C, (C, width), [0])


def two_columns(dtype, first, second=None):
  """Make a tile (C, PART): one or two columns of values, and zeros.

  Args:
    dtype: the dtype of the result.
    first: the value of column 0, a scalar or (C, PART).
    second: the value of column 1; None takes `first` there too.
  """
  second = first if second is None else second
  column = iota((C, PART), 1)
  value = jnp.where(column == 0, first, jnp.where(column == 1, second, 0.0))
  return value.astype(dtype)


def times(x, factor: float):
  """Multiply by a static factor, which costs nothing where it is 1."""
  return x if factor == 1 else x * factor


def value_columns(work: Work, ref, chunk):
  """Select a chunk's value tile from an array (B, T, H, P) in HBM."""
  here, tokens = work.here, pl.ds(chunk * C, C)
  if here.tile is None:
    return ref.at[here.b, tokens, here.h]
  return ref.at[here.b, tokens, here.h, pl.ds(here.tile * TILE, TILE)]


# Operands of the tensor core.


class HighLow(NamedTuple):
  """A float32 operand: two tiles, or references to them, that sum to it."""

  high: Any
  low: Any


def operand(launch: Launch, x):
  """Make an operand of a tile in registers."""
  if not launch.float32:
    return x.astype(launch.dtype)
  # Round x to bfloat16 by its bits. A conversion to bfloat16 and back would go
  # number by number through a slow unit of the GPU.
  bits = lax.bitcast_convert_type(x, jnp.int32)
  bits = (bits + 0x8000) & -0x10000
  high = lax.bitcast_convert_type(bits, f32)
  return HighLow(high.astype(launch.dtype), (x - high).astype(launch.dtype))


def each(function: Callable, x):
  """Apply a function to an operand, or to both tiles of a `HighLow`."""
  return HighLow(*map(function, x)) if isinstance(x, HighLow) else function(x)


def store(ref, index, x) -> None:
  """Store an operand at an index of shared memory of its kind."""
  if not isinstance(ref, HighLow):
    ref[index] = x
    return
  for tile_s, tile in zip(ref, x, strict=True):
    tile_s[index] = tile


def read(work: Work, slot, name: str):
  """Select a chunk (C, ·) of an input, as an operand in shared memory."""
  x_s = work.inputs[name].at[slot]
  if not work.launch.float32:
    return x_s
  return HighLow(x_s, work.inputs[low_name(name)].at[slot])


def low_name(name: str) -> str:
  """Name the input that holds the low tiles of an input."""
  return f"{name}_low"


def select(x_s, index):
  """Select lines or columns of an operand in shared memory."""
  return each(lambda ref: ref.at[index], x_s)


def transpose(x_s):
  """Transpose an operand in shared memory, as the tensor core reads it."""
  return each(lambda ref: ref.transpose((1, 0)), x_s)


# Products on the tensor core.


def _single(operands) -> list[tuple]:
  """List the products of single tiles that the operands' products stand for.

  Of two `HighLow`, the product of both low tiles is left out.
  """
  tiles_of = lambda x: x if isinstance(x, HighLow) else (x,)
  return [
    (a_tile, b_tile)
    for a, b in operands
    for i, a_tile in enumerate(tiles_of(a))
    for j, b_tile in enumerate(tiles_of(b))
    if i + j < 2
  ]


def mma(work: Work, *operands, shape: tuple[int, int]) -> Array:
  """Compute Σ A B over the operands (A, B), in float32."""
  return mmas(work, (shape, *operands))[0]


def mmas(work: Work, *products) -> Sequence[Array]:
  """Compute Σ A B for each (shape, (A, B), …).

  The tensor core works on all of them at once. The warpgroup waits once.
  """
  if work.launch.by_shared:
    return [
      _add_by_shared(work, zeros(shape), operands)
      for shape, *operands in products
    ]

  def run(*accs):
    for acc, (_, *operands) in zip(accs, products, strict=True):
      for a, b in _single(operands):
        plgpu.wgmma(acc, a, b)
    return tuple(acc[...] for acc in accs)

  return pl.run_scoped(run, *(plgpu.ACC(x[0], f32) for x in products))


def add_mma(work: Work, acc, *operands) -> Array:
  """Compute acc + Σ A B over the operands (A, B)."""
  return add_mmas(work, (acc, *operands))[0]


def add_mmas(work: Work, *sums) -> Sequence[Array]:
  """Compute acc + Σ A B for each (acc, (A, B), …), all at once as in `mmas`."""
  if work.launch.by_shared:
    return [_add_by_shared(work, acc, operands) for acc, *operands in sums]

  def run(refs):
    for ref, (_, *operands) in zip(refs, sums, strict=True):
      for a, b in _single(operands):
        plgpu.wgmma(ref, a, b)

  refs = tuple(plgpu.ACC.init(acc) for acc, *_ in sums)
  # `run_state` returns the values of the references, as arrays.
  return pl.run_state(run)(refs)  # pyrefly: ignore[bad-return]


def _add_by_shared(work: Work, acc, operands):
  """Compute acc + Σ A B one product after the other, A from shared memory."""

  def product(a, b):
    def run(ref):
      plgpu.wgmma(ref, a, b)
      return ref[...]

    return pl.run_scoped(run, plgpu.ACC(acc.shape, f32))

  for a, b in _single(operands):
    if not isinstance(a, jax.Array):
      acc = acc + product(a, b)
      continue
    for start in range(0, a.shape[1], PART):
      work.operand[...] = a[:, start : start + PART]
      plgpu.commit_smem()
      b_rows = b if a.shape[1] == PART else b.at[pl.ds(start, PART)]
      acc = acc + product(work.operand, b_rows)
  return acc


# Numbers as a high and a low half, whose sum is exact to 16 bits.


def split(value: float, dtype) -> tuple[float, float]:
  """Return (high, low), numbers of the dtype that sum to the value."""
  rounded = float(np.asarray(value, dtype))
  return rounded, float(np.asarray(value - rounded, dtype))


def store_high_low(ref, x) -> None:
  """Store a float32 tile as two halves of the operands' dtype.

  Args:
    ref: shared memory (2, TILE, PART).
    x: (TILE, PART) float32.
  """
  high = x.astype(ref.dtype)
  ref[0] = high
  ref[1] = (x - high.astype(f32)).astype(ref.dtype)


def high_low(kk_s, start: int) -> list:
  """Select 16 lines of both halves of KK; products with both are summed."""
  return [kk_s.at[i, pl.ds(start, PART)] for i in (0, 1)]


# Scores.


def polynomial(a, launch: Launch):
  """Compute sim' of a = q·k."""
  sim = times(a * a, launch.c2)
  if launch.c1:
    sim = sim + launch.c1 * a
  return sim + launch.c0 if launch.c0 else sim


def derivative(a, launch: Launch):
  """Compute d sim' / d a."""
  slope = (2.0 * launch.c2) * a
  return slope + launch.c1 if launch.c1 else slope
