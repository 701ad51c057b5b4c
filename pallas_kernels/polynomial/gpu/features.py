"""The feature blocks of queries and keys, and products with the state.

The features of a term are blocks of 16 columns. In a square (i, i) they are

    products r = 0 … 8   x ∘ (x Π_r)      weights 1, 2, …, 2, 1 on the query
    linear               x                where c1 is not 0, weight c1
    constant             (1, 1, 0, …)     where c0 is not 0, weights (high, low)

Π_r rolls the columns of x by r. It is a matrix, because the tensor core can
multiply by one while registers cannot be rolled. A product x_a x_b appears once
in the blocks r < 8. Block 8 has it twice, and so has weight 1. The constant has
two columns, so that c0 is exact to 16 bits as the sum of two weights.

In a pair (i, j) the features are x_i ∘ (x_j Π_r), r = 0 … 15, all of weight 2.
A half of a pair has 8 of these blocks, numbered 0 … 7.

A query's features are multiplied by the weights, a key's are not, so that
Σ_e φ_e(q) φ_e(k) is what the term adds to sim'.
"""

from collections.abc import Sequence

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np

from pallas_kernels.polynomial.gpu.documents import OF_STATE_BEFORE, mask
from pallas_kernels.polynomial.gpu.launch import (
  HALF_BLOCKS,
  PART,
  SQUARE_BLOCKS,
  C,
  Launch,
)
from pallas_kernels.polynomial.gpu.tiles import (
  FIRST_AXIS,
  block,
  columns,
  f32,
  high_low,
  mma,
  mmas,
  operand,
  select,
  split,
  store,
  times,
  transpose,
  two_columns,
  zeros,
)
from pallas_kernels.polynomial.gpu.warpgroup import Work

# How many blocks are in registers at a time: where features are written, in the
# gradient of queries, and in the gradient of keys.
BLOCKS_AT_ONCE = 2
QUERY_GRADIENT_BLOCKS = 2
KEY_GRADIENT_BLOCKS = 3


# The rolling matrices Π.


def rolling_matrices(launch: Launch) -> np.ndarray:
  """Make Π for all blocks of a square, or for each half of a pair.

  Returns:
    (PART, PART · 9), or (2, PART, PART · 8) for pairs: x Π holds the rolled
    copies of x side by side.
  """
  if not launch.pairs:
    return _rolling_matrix(range(SQUARE_BLOCKS))
  halves = range(HALF_BLOCKS), range(HALF_BLOCKS, 2 * HALF_BLOCKS)
  return np.stack([_rolling_matrix(shifts) for shifts in halves])


def _rolling_matrix(shifts: range) -> np.ndarray:
  table = np.zeros((PART, len(shifts) * PART), np.float32)
  for n, r in enumerate(shifts):
    for i in range(PART):
      table[(i + r) % PART, n * PART + i] = 1
  return table


def _rolls_of(rolls_s, blocks: range):
  """Select Π of those blocks that are products; None where none is."""
  blocks = range(blocks.start, min(blocks.stop, SQUARE_BLOCKS))
  if not blocks:
    return None
  return rolls_s.at[:, pl.ds(blocks.start * PART, len(blocks) * PART)]


def roll(work: Work, x_s, blocks: range):
  """Compute x Π of those blocks that are products; None where none is.

  Returns:
    (C, PART a block) float32. Each number is one number of x, unrounded.
  """
  rolls = _rolls_of(work.rolls, blocks)
  if rolls is None:
    return None
  return mma(work, (x_s, rolls), shape=(C, rolls.shape[1]))


def roll_all(work: Work, x_s):
  """Compute x Π of all blocks, (C, PART a block), in the arrays' dtype."""
  rolled = mma(work, (x_s, work.rolls), shape=(C, work.rolls.shape[1]))
  return rolled.astype(work.launch.array_dtype)


# Features.


def weight(r: int, launch: Launch) -> float:
  """Return the weight of product block r."""
  return 1.0 if r in (0, SQUARE_BLOCKS - 1) and not launch.pairs else 2.0


def query_features(
  x, rolled, blocks: Sequence[int], launch: Launch, r_C=None
) -> list:
  """Make the weighted feature blocks of queries.

  Args:
    x: queries (C, PART), or part i of a pair.
    rolled: x Π of these blocks, or x_j Π for a pair.
    blocks: which blocks to make.
    launch: the launch.
    r_C: r of each query over the columns, (C, PART) float32. The features are
      multiplied by it. None in the forward.

  Returns:
    One (C, PART) in the arrays' dtype for each block.
  """
  once = x if r_C is None else x.astype(f32) * r_C
  once = times(once, launch.c2)
  weighted = {1.0: once, 2.0: once + once}
  features = []
  for i, r in enumerate(blocks):
    if r < SQUARE_BLOCKS:
      heavy = weighted[weight(r, launch)].astype(launch.array_dtype)
      features.append(heavy * rolled[:, block(i)].astype(launch.array_dtype))
    elif r == SQUARE_BLOCKS and launch.c1:
      linear = x.astype(f32)
      linear = linear * (launch.c1 if r_C is None else launch.c1 * r_C)
      features.append(linear.astype(launch.array_dtype))
    elif r_C is None:
      constant = split(launch.c0, launch.dtype)
      features.append(two_columns(launch.array_dtype, *constant))
    else:
      value = launch.c0 * r_C
      high = value.astype(launch.dtype).astype(f32)
      features.append(two_columns(launch.array_dtype, high, value - high))
  return features


def key_features(
  x, rolled, blocks: Sequence[int], launch: Launch, exists=None
) -> list:
  """Make the feature blocks of keys.

  Args:
    x: keys (C, PART), or part i of a pair.
    rolled: x Π of these blocks, or x_j Π for a pair.
    blocks: which blocks to make.
    launch: the launch.
    exists: the constant feature (C, PART): 1 for the tokens that are summed, 0
      for the others. None: 1 for all.
  """
  features = []
  for i, r in enumerate(blocks):
    if r < SQUARE_BLOCKS:
      features.append(x * rolled[:, block(i)].astype(launch.array_dtype))
    elif r == SQUARE_BLOCKS and launch.c1:
      features.append(x)
    else:
      one = 1.0 if exists is None else exists
      features.append(two_columns(launch.array_dtype, one))
  return features


def store_blocks(work: Work, blocks: range, features: list) -> None:
  """Store feature blocks in their columns of `shared.phi` (C, E)."""
  for r, x in zip(blocks, features, strict=True):
    index = slice(None), pl.ds(r * PART, PART)
    store(work.shared.phi, index, operand(work.launch, x))


# Products with the state.


def times_kv(work: Work, phi: list) -> list:
  """List the operands whose products sum to φ KV, (C, TILE)."""

  def of_block(r):
    columns_of_r = slice(None), pl.ds(r * PART, PART)
    return transpose(select(work.shared.kv, columns_of_r))

  return [(operand(work.launch, x), of_block(r)) for r, x in enumerate(phi)]


def times_kk(work: Work, x_s, *, transposed: bool = False) -> list:
  """List the operands whose products sum to x KK, or to x KKᵀ, (C, PART)."""
  return [
    (x_s, kk.transpose((1, 0)) if transposed else kk)
    for kk in high_low(work.shared.kk, 0)
  ]


def denominator_products(work: Work, q_s) -> list:
  """List the products of Σ sim' through the state: q KK, and c1 Σ k.

  Each is (shape, operands, …) as `mmas` takes them. The second one is there
  where c1 is not 0: Σ k is in line 16 and, once more, in line 17 of KK.
  """
  launch = work.launch
  quadratic = ((C, PART), *times_kk(work, q_s))
  if not launch.c1:
    return [quadratic]
  ones = two_columns(launch.dtype, *split(launch.c1, launch.dtype))
  line = high_low(work.shared.kk, PART)
  return [quadratic, ((C, PART), *[(ones, half) for half in line])]


def denominator_forms(work: Work, products):
  """Return (c2 q KK, that + c1 Σ k) from the products' values, (C, PART) each.

  q · the second one is Σ sim' through the state, but for the constant term.
  """
  launch = work.launch
  quadratic, *linear = (times(x, 1 / launch.state_scale) for x in products)
  quadratic = times(quadratic, launch.c2)
  return quadratic, quadratic + linear[0] if linear else quadratic


# Derivatives with respect to the features.


def through_features(work: Work, values_s, x_s, blocks: range):
  """Compute u = values KVᵀ of these blocks, and x Π, in one go.

  u is the cotangent of the features through the state.

  Args:
    work: the work of the warpgroup.
    values_s: do or v of the chunk (C, TILE).
    x_s: the queries or keys that are rolled (C, PART).
    blocks: which blocks.

  Returns:
    (u, rolled): (C, PART a block) float32 and in the arrays' dtype. `rolled`
    has the products' blocks only, and is None where there are none.
  """
  some = slice(None), pl.ds(blocks.start * PART, len(blocks) * PART)
  kv = select(work.shared.kv, some)
  products = [((C, len(blocks) * PART), (values_s, kv))]
  rolls = _rolls_of(work.rolls, blocks)
  if rolls is not None:
    products.append(((C, rolls.shape[1]), (x_s, rolls)))
  u, *rolled = mmas(work, *products)
  return u, rolled[0].astype(work.launch.array_dtype) if rolled else None


def add_square_gradient(
  work: Work, gradient, u, rolled, x, blocks: range, *, weighted: bool
):
  """Add J(x)ᵀ u of a square's product blocks to a gradient (C, PART).

  J is the derivative of the blocks x ∘ (x Π_r), so that

      J(x)ᵀ u = Σ_r u_r ∘ (x Π_r) + Σ_r (u_r ∘ x) Π_rᵀ

  whose second sum is a product on the tensor core.

  Args:
    work: the work of the warpgroup.
    gradient: what is added to, float32.
    u: the cotangent of the features, as `through_features` returns it.
    rolled: x Π, likewise.
    x: queries or keys (C, PART).
    blocks: which blocks u has.
    weighted: whether the features carry weights, as those of queries do. c2 is
      not among them.
  """
  launch = work.launch
  second, twice, low = [], x + x, u.astype(launch.array_dtype)
  for i, r in enumerate(blocks):
    if r >= SQUARE_BLOCKS:
      break
    heavy = weighted and weight(r, launch) == 2.0
    first = u[:, block(i)] * rolled[:, block(i)].astype(f32)
    gradient = gradient + (first + first if heavy else first)
    product = low[:, block(i)] * (twice if heavy else x)
    second.append((operand(launch, product), _back(work, r)))
  if not second:
    return gradient
  return gradient + mma(work, *second, shape=(C, PART))


def pair_gradients(work: Work, u, rolled, x_i, blocks: range):
  """Compute J(x_i)ᵀ u and J(x_j)ᵀ u of a pair's blocks, without weights.

      J(x_i)ᵀ u = Σ_r u_r ∘ (x_j Π_r),    J(x_j)ᵀ u = Σ_r (u_r ∘ x_i) Π_rᵀ

  Args:
    work: the work of the warpgroup.
    u: the cotangent of the features, as `through_features` returns it.
    rolled: x_j Π, likewise.
    x_i: the first part of the queries or keys, (C, PART).
    blocks: which blocks u has.
  """
  first, second = zeros((C, PART)), []
  low = u.astype(work.launch.dtype)
  for n, r in enumerate(blocks):
    first = first + u[:, block(n)] * rolled[:, block(n)].astype(f32)
    second.append((low[:, block(n)] * x_i, _back(work, r)))
  return first, mma(work, *second, shape=(C, PART))


def _back(work: Work, r: int):
  """Select Π_rᵀ, which rolls back."""
  return work.rolls.at[:, pl.ds(r * PART, PART)].transpose((1, 0))


def query_factors(work: Work, slot):
  """Load r and dz of the queries that are added to the state of cotangents.

  Returns:
    r and dz over the columns, (C, PART) float32 each, multiplied by
    `gradient_scale`; 0 for queries of other documents.
  """

  def factor(name):
    value = plgpu.load(work.inputs[name].at[slot], layout=FIRST_AXIS)
    value = times(value, work.launch.gradient_scale)
    return columns(mask(work, slot, OF_STATE_BEFORE, value), PART)

  return factor("r"), factor("dz")
