"""Decide by cost whether chosen positions of a row are computed alone.

There are two ways to M outputs of a row of T tokens:

    alone   `polynomial_attention_at`: M · T similarities a head
    whole   `polynomial_attention`, of whose outputs M are taken

For a token and head, with features of width F, E products of two features and
values of width P, a forward and a backward pass take

    alone   6 M (F + P)                                  operations
            4 (11 M + 10 (F + P))                        bytes
    whole   6 (C (F + P) + 2 E P + 2 F²)                 operations
            4 (25 C + 12 E + 28 E P / C + 10 (F + P))    bytes

and "whole" also projects and normalises the queries of the other T − M tokens.
C is the length of a chunk. A row of one chunk, C = T, needs no state: the terms
with E and F² drop out, and 14 C takes the place of 25 C.

The operations are those of the matrix products: 2 for a product of two numbers,
times 3 for both passes. The bytes are those of float32 arrays, times how often
they are written and read. These numbers were counted in the programs that XLA
compiles for an H200, for F = 8, 16 and 32 and P = 5 and 64. The formulas are
within 5 % of the programs' bytes.

A cost is a number of operations. A byte counts as many as a device does while
it moves one. An H200 does 60e12 float32 operations and moves 4.8e12 bytes a
second. On a CPU a chunk stays in the cache.

The kernels move few bytes, and so their operations alone count. They hold
values in tiles 64 wide and pad rows to whole chunks. On an H200 they do about
180e12 operations a second. Forward and backward they took 1.64 ms for 2.1
million tokens and heads with F = 16 and P = 12, and 8.07 ms for 0.8 million
with F = P = 64.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.polynomial.api import which_implementation
from pallas_kernels.polynomial.coefficients import Coefficients
from pallas_kernels.polynomial.state import state_widths
from pallas_kernels.polynomial.xla import CHUNKS, SPANS

#: The most bytes that an array of similarities may take. The backward pass
#: holds three of them.
MOST_BYTES = 2**31
_TILE = 64  # values of a head that the kernels hold together, and their chunk


@dataclasses.dataclass(frozen=True)
class Form:
  """A form of the linear operator, and what limits the device that runs it.

  Attributes:
    chunk: tokens of a chunk.
    operations_per_byte: float32 operations that take as long as one byte.
    has_kernels: whether kernels compute the operator.
  """

  chunk: int
  operations_per_byte: int
  has_kernels: bool = False


#: XLA on a CPU, XLA on a GPU, and the kernels of GPUs and TPUs.
ON_CPU = Form(CHUNKS.chunk, 1)
ON_GPU = Form(SPANS.chunk, 12)
BY_KERNELS = Form(_TILE, 12, has_kernels=True)


def expected_form(dtype: jax.typing.DTypeLike) -> Form:
  """Return the form that calls with q, k and v of this dtype are expected in.

  The kernels take 16-bit inputs; others run in XLA.
  """
  if devices.platform() == "cpu":
    return ON_CPU
  has_kernels = which_implementation()[0] in devices.KERNEL_PLATFORMS
  is_narrow = jnp.dtype(dtype).itemsize == 2
  return BY_KERNELS if has_kernels and is_narrow else ON_GPU


@dataclasses.dataclass(frozen=True)
class PositionCall:
  """The sizes of a call, from the tokens that the queries are projected from.

  Attributes:
    rows: rows on a device.
    length: T, tokens of a row.
    positions: M, positions of a row.
    width: D, of a token before the projection.
    heads: H.
    features: F.
    value_features: P.
    coefficients: those of sim.
    itemsize: bytes of a number of q, k and v.
  """

  rows: int
  length: int
  positions: int
  width: int
  heads: int
  features: int
  value_features: int
  coefficients: Coefficients
  itemsize: int


def cost_alone(call: PositionCall, form: Form) -> float:
  """Return the cost for each token and head of the positions alone."""
  M, F, P = call.positions, call.features, call.value_features
  operations = 6 * M * (F + P)
  floats = 11 * M + 10 * (F + P)
  return operations + form.operations_per_byte * 4 * floats


def cost_whole(call: PositionCall, form: Form) -> float:
  """Return the cost for each token and head of the linear operator."""
  F, P = call.features, call.value_features
  if form.has_kernels or call.length > form.chunk:
    C, passes = form.chunk, 25
    E, G = state_widths(F, call.coefficients)
  else:
    C, passes = max(call.length, 1), 14
    E = G = 0
  if form.has_kernels:
    P = _TILE * math.ceil(P / _TILE)
    # Three of their operations take as long as one in float32.
    operator = 2 * (C * (F + P) + 2 * E * P + 2 * G**2)
  else:
    operations = 6 * (C * (F + P) + 2 * E * P + 2 * G**2)
    floats = passes * C + 12 * E + 28 * E * P / C + 10 * (F + P)
    operator = operations + form.operations_per_byte * 4 * floats
  # 16-bit products take a sixteenth of the time of float32 ones on a GPU.
  is_fast = call.itemsize == 2 and form.operations_per_byte > 1
  operations = 6 * call.width * F / (16 if is_fast else 1)
  numbers = 10 * F * call.itemsize
  queries = operations + form.operations_per_byte * numbers
  return operator + queries * (1 - call.positions / max(call.length, 1))


def is_cheaper_alone(call: PositionCall, form: Form) -> bool:
  """Whether to compute the positions alone, not the linear operator.

  Their similarities must also fit in `MOST_BYTES`. Where `jax.export` leaves a
  size open, a chunk of positions or fewer is computed alone.
  """
  sizes = call.rows, call.length, call.positions
  if not all(isinstance(size, int) for size in sizes):
    M = call.positions
    return isinstance(M, int) and form.chunk >= M
  similarities = 4 * call.rows * call.heads * call.length * call.positions
  fits = similarities <= MOST_BYTES
  return fits and cost_alone(call, form) < cost_whole(call, form)
