"""One launch of a Hopper kernel: its static part, and the sizes of a chunk."""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.polynomial.operator import Kernel

C = 64  # tokens of a chunk
F = 16  # query and key features
V = 64  # value width of the tiles; narrower values leave zeros
CYCLIC = F // 2 + 1  # blocks
PAIR = F // 2  # blocks of a half of a pair's

# How many programs a launch should have: two for each of the 132
# multiprocessors of an H100. Where batch × heads give fewer, time is cut into
# slices of at least `SLICE_CHUNKS` chunks.
#
# Measured on an H100 with jax 0.11.2, forward and backward, for 19 shapes with
# 66, 132, 264, 396 and 528 programs and 8, 16 and 32 chunks: nothing was faster
# than these two values by 3 % or more, so that there is nothing to tune.
PROGRAMS = 264
SLICE_CHUNKS = 8


@dataclasses.dataclass(frozen=True)
class Call:
  """The static part of one kernel launch."""

  B: int
  T: int
  H: int
  P: int  # of v in memory: a multiple of 16, up to 128
  square: float  # σ
  c1: float
  c0: float
  eps: float
  slices: int  # of time, each a program of its own
  chunks: int  # of a slice
  dtype: Any  # of the operands
  segments: bool
  by_shared: bool  # operands reach the tensor core through shared memory
  stages: int = 2  # of the inputs' copies
  m: int = 1  # queries and keys are m F wide
  pairs: bool = False  # the parts are halves of pairs i < j, not the m (i, i)

  @property
  def tiles(self) -> int:
    """Of the values, V wide."""
    return -(-self.P // V)

  @property
  def width(self) -> int:
    """Of a tile of values in memory."""
    return min(self.P, V)

  @property
  def parts(self) -> int:
    """Of a tile's features."""
    return self.m * (self.m - 1) if self.pairs else self.m

  @property
  def prefix(self) -> str:
    """Of the kernels' names."""
    return "pair_" if self.pairs else "part_" if self.m > 1 else ""

  @property
  def heads(self) -> int:
    """That are walked, of a row."""
    return self.H * self.tiles * self.parts

  @property
  def shrink(self) -> float:
    """What the tensor core's copy of a state is multiplied by."""
    return 2.0**-self._range

  @property
  def grow(self) -> float:
    """What g and dz are multiplied by."""
    return 2.0 ** (self._range // 2)

  @property
  def _range(self) -> int:
    return math.ceil(math.log2(self.T)) if self.dtype == jnp.float16 else 0

  @property
  def blocks(self) -> int:
    if self.pairs:
      return PAIR
    return CYCLIC + (self.c1 != 0) + (self.c0 != 0)

  @property
  def E(self) -> int:
    return F * self.blocks

  def groups(self, size: int) -> list[range]:
    """The blocks, a few at a time, so that they fit the registers."""
    steps = range(0, self.blocks, size)
    return [range(r, min(r + size, self.blocks)) for r in steps]

  @property
  def rows(self) -> int:
    """T of the arrays in memory, a multiple of 8."""
    return -(-self.T // 8) * 8

  @property
  def total(self) -> int:
    """Chunks of a row."""
    return -(-self.T // C)

  @property
  def halves(self) -> "Call":
    """Slices half as long, for a program that walks twice as many heads."""
    chunks = self.chunks // 2
    return dataclasses.replace(
      self, chunks=chunks, slices=-(-self.total // chunks)
    )

  @property
  def affine(self) -> bool:
    """Whether sim' is more than the square."""
    return bool(self.c0 or self.c1)


def make_call(
  B, T, H, P, kernel: Kernel, dtype, programs: int, *, segments: bool
) -> Call:
  """Cuts time into slices where heads leave half of the device idle."""
  c0, c1, c2 = dataclasses.astuple(kernel.coefficients)
  square = 1.0
  if dtype == jnp.float16:
    square = 2.0 ** round(math.log2(c2))
  call = Call(
    B,
    T,
    H,
    P,
    square,
    square * c1 / c2,
    square * c0 / c2,
    square * kernel.eps / c2,
    slices=1,
    chunks=-(-T // C),
    dtype=dtype,
    segments=segments,
    by_shared=kernel.by_shared,
  )
  return cut(call, programs)


def cut(call: Call, programs: int) -> Call:
  """Slices of time for about as many programs."""
  total = call.total
  slices = max(1, min(programs // (call.B * call.heads), total // SLICE_CHUNKS))
  chunks = -(-total // slices)
  if slices > 1:
    chunks += chunks % 2  # `halves` are as long
  return dataclasses.replace(call, slices=-(-total // chunks), chunks=chunks)


def of_parts(call: Call, m: int, *, pairs: bool) -> Call:
  """The call of one kind of the parts of queries and keys m F wide."""
  c1, c0 = (0.0, 0.0) if pairs else (call.c1, call.c0 / m)
  return dataclasses.replace(call, m=m, pairs=pairs, c1=c1, c0=c0)


def pairs_of(m: int) -> list[tuple[int, int]]:
  """(i, j), i < j, in the order of the parts."""
  return list(itertools.combinations(range(m), 2))
