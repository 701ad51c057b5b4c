"""The static record of a kernel launch, and the plan of the launches of a call.

A call is one call of the public operator, or one pass of its derivative. A
launch is one kernel started on the GPU. It makes many walks: each is over the
chunks of a slice of time, for one row, one head, one value tile and one term.

With F ≤ 16 features there is one term. More features are cut into m parts of
16, x = (x_1, …, x_m), and

    (q·k)² = Σ_i (q_i·k_i)² + 2 Σ_{i<j} (q_i·k_i)(q_j·k_j)

is a sum of m squares and m (m − 1) / 2 pairs. A pair has twice the features of
a square, so that it is done in two halves. A square or a half of a pair is a
term: its state fits the registers of one warpgroup. One launch does all the
squares, another one all the halves of pairs.
"""

import dataclasses
import itertools
import math
from typing import Any

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.operator import Kernel

C = 64  # tokens of a chunk
PART = 16  # features of a part of q or k, and columns of a feature block
TILE = 64  # columns of a value tile
SQUARE_BLOCKS = PART // 2 + 1  # feature blocks of a square (i, i)
HALF_BLOCKS = PART // 2  # feature blocks of a half of a pair (i, j)

# How many walks a launch should have: two in a program, and a program for each
# of the 132 multiprocessors of an H100, whose registers it fills. Where
# batch × heads give fewer, time is cut into slices of at least `SLICE_CHUNKS`
# chunks.
#
# Measured on an H100 with jax 0.11.2, forward and backward, for 19 shapes with
# 66, 132, 264, 396 and 528 walks and 8, 16 and 32 chunks: nothing was faster
# than these two values by 3 % or more. There is nothing left to tune.
WALKS = 264
SLICE_CHUNKS = 8


@dataclasses.dataclass(frozen=True)
class Launch:
  """The static record of one kernel launch.

  The coefficients are those of the operator divided by c2, which cancels in
  o, and multiplied by a power of two: sim' = c2 a² + c1 a + c0 of a = q·k.
  c2 is 1 for bfloat16. For float16, which has little range, it is the
  operator's c2 rounded to a power of two.

  Attributes:
    B: rows, the examples of the batch.
    T: tokens of a row.
    H: heads.
    P: value width of the arrays in memory: a multiple of 16, up to 128.
    c2: the coefficient of a² in sim'.
    c1: the coefficient of a in sim'.
    c0: the constant in sim'.
    eps: the operator's eps, scaled as the coefficients are.
    slices: slices of time, which different programs walk at once.
    chunks: chunks of a slice; the last slice may have fewer.
    dtype: of every operand of the tensor core, and of q, k and v unless they
      are float32.
    segments: whether rows hold several documents.
    by_shared: whether operands reach the tensor core through shared memory
      only. The kernels are slower then. Interpret mode cannot run products with
      an operand in registers, so that its tests set this.
    stages: chunks of inputs that fit shared memory at once.
    parts: m, the number of parts of q and k.
    pairs: whether the launch does the halves of pairs, instead of the squares.
    float32: whether q, k and v are float32. An operand of the tensor core is a
      high and a low tile of bfloat16 then (`tiles.HighLow`).
  """

  B: int
  T: int
  H: int
  P: int
  c2: float
  c1: float
  c0: float
  eps: float
  slices: int
  chunks: int
  dtype: Any
  segments: bool
  by_shared: bool
  stages: int = 2
  parts: int = 1
  pairs: bool = False
  float32: bool = False

  @property
  def array_dtype(self) -> Any:
    """The dtype of q, k, v and the outputs, in which features are computed."""
    return jnp.float32 if self.float32 else self.dtype

  @property
  def warpgroups(self) -> int:
    """Warpgroups of a program: two for each walk that fits a multiprocessor.

    Two walks leave 128 registers a thread. The tiles of a float32 walk take
    twice the shared memory, so that one fits, and threads have 255 registers.
    """
    return 2 if self.float32 else 4

  @property
  def fused(self) -> bool:
    """Whether one kernel does a whole pass, which it can with one part."""
    return self.parts == 1

  @property
  def value_tiles(self) -> int:
    """Number of tiles that the value columns are cut into."""
    return -(-self.P // TILE)

  @property
  def tile_width(self) -> int:
    """Columns of a value tile that exist in memory."""
    return min(self.P, TILE)

  @property
  def terms(self) -> int:
    """Number of terms: the squares, or the halves of the pairs."""
    return self.parts * (self.parts - 1) if self.pairs else self.parts

  @property
  def walks(self) -> int:
    """Walks over a slice of one row: a head, a value tile and a term each."""
    return self.H * self.value_tiles * self.terms

  @property
  def kernel_prefix(self) -> str:
    """The prefix of the kernels' names, as a profile shows them."""
    if self.fused:
      return ""
    return "pair_" if self.pairs else "part_"

  @property
  def state_scale(self) -> float:
    """The factor of the tensor core's copy of a state."""
    return 2.0**-self._range

  @property
  def gradient_scale(self) -> float:
    """The factor of r and dz, and so of every cotangent of a state."""
    return 2.0 ** (self._range // 2)

  @property
  def _range(self) -> int:
    # A sum over T tokens grows like T, and leaves float16's range at 65504.
    return math.ceil(math.log2(self.T)) if self.dtype == jnp.float16 else 0

  @property
  def blocks(self) -> int:
    """Feature blocks of a term: products, then linear, then constant."""
    if self.pairs:
      return HALF_BLOCKS
    return SQUARE_BLOCKS + (self.c1 != 0) + (self.c0 != 0)

  @property
  def E(self) -> int:
    """Expanded features of a term."""
    return PART * self.blocks

  def block_groups(self, size: int) -> list[range]:
    """Cut the blocks into groups of `size`, so that a group fits registers."""
    starts = range(0, self.blocks, size)
    return [range(r, min(r + size, self.blocks)) for r in starts]

  @property
  def padded_T(self) -> int:
    """T of the arrays in memory, a multiple of 8 as TMA needs it."""
    return -(-self.T // 8) * 8

  @property
  def total_chunks(self) -> int:
    """Chunks of a row."""
    return -(-self.T // C)

  @property
  def half_slices(self) -> "Launch":
    """This launch with slices half as long.

    Kernels that only sum a state put four walks in a program instead of two,
    so that half slices keep the number of programs.
    """
    chunks = self.chunks // 2
    slices = -(-self.total_chunks // chunks)
    return dataclasses.replace(self, chunks=chunks, slices=slices)

  @property
  def affine(self) -> bool:
    """Whether sim' has a linear or a constant term."""
    return bool(self.c0 or self.c1)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Every launch that a call needs.

  Attributes:
    whole: the call as a whole, with all its parts. Where a pass is not fused,
      the kernels of `within_chunk.py` are launched with it.
    launches: the launches that walk over chunks. One where F ≤ 16; else one for
      the squares and one for the halves of pairs.
    F: features of the public q and k.
    P: value width of the public v.
  """

  whole: Launch
  launches: tuple[Launch, ...]
  F: int
  P: int

  @property
  def fused(self) -> bool:
    """Whether the only launch does the tokens of a chunk as well."""
    return self.whole.fused

  def pad_features(self, x_BTHF: Array) -> Array:
    """Pad q or k with zeros up to whole parts and T up to a multiple of 8."""
    return _pad(x_BTHF, self.whole.parts * PART)

  def pad_values(self, x_BTHP: Array) -> Array:
    """Pad v or do with zeros up to P % 16 = 0 and T up to a multiple of 8."""
    return _pad(x_BTHP, self.whole.P)


def make_plan(
  q: Array, v: Array, runs_BT: Array | None, kernel: Kernel
) -> Plan:
  """Plan the launches of a call.

  Args:
    q: queries or keys (B, T, H, F), of which the shape and dtype are read.
    v: values or their cotangent (B, T, H, P), of which P is read.
    runs_BT: the number of each token's document; None: one document a row.
    kernel: the static numbers of the call.
  """
  B, T, H, F = q.shape
  P = v.shape[-1]
  parts = -(-F // PART)
  c0, c1, c2 = dataclasses.astuple(kernel.coefficients)
  scaled_c2 = 1.0
  is_float32 = q.dtype == jnp.float32
  if q.dtype == jnp.float16:
    scaled_c2 = 2.0 ** round(math.log2(c2))
  whole = Launch(
    B,
    T,
    H,
    -(-P // 16) * 16,
    scaled_c2,
    scaled_c2 * c1 / c2,
    scaled_c2 * c0 / c2,
    scaled_c2 * kernel.eps / c2,
    slices=1,
    chunks=-(-T // C),
    dtype=jnp.dtype(jnp.bfloat16) if is_float32 else q.dtype,
    segments=runs_BT is not None,
    by_shared=kernel.by_shared,
    parts=parts,
    float32=is_float32,
  )
  # The linear term is a sum over the parts by itself. The constant is not: each
  # square takes an equal share of it.
  squares = dataclasses.replace(whole, c0=whole.c0 / parts)
  launches = [squares]
  if parts > 1:
    launches.append(dataclasses.replace(whole, pairs=True, c1=0.0, c0=0.0))
  return Plan(whole, tuple(map(_cut_time, launches)), F, P)


def _cut_time(launch: Launch) -> Launch:
  """Cut time into slices until there are about `WALKS` walks.

  With float32 a program has one walk instead of two, so that half are enough.
  """
  total = launch.total_chunks
  walks = WALKS * launch.warpgroups // 4
  wanted = min(walks // (launch.B * launch.walks), total // SLICE_CHUNKS)
  slices = max(1, wanted)
  chunks = -(-total // slices)
  if slices > 1:
    chunks += chunks % 2  # even, so that the half slices are equally long
  return dataclasses.replace(launch, slices=-(-total // chunks), chunks=chunks)


def pairs_of(parts: int) -> list[tuple[int, int]]:
  """List the pairs (i, j), i < j, in the order of their terms."""
  return list(itertools.combinations(range(parts), 2))


def _pad(x_BTHX: Array, width: int) -> Array:
  """Pad with zeros; no copy is made where the sizes fit, as they mostly do."""
  pad = (
    (0, 0),
    (0, -x_BTHX.shape[1] % 8),
    (0, 0),
    (0, width - x_BTHX.shape[-1]),
  )
  return x_BTHX if not any(after for _, after in pad) else jnp.pad(x_BTHX, pad)
