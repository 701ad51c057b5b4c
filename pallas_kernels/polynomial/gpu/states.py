"""Conversion between the public `State` and the states of the kernels.

The public state (`state.py`) has KV (B, H, E, P) and KK (B, H, G, G) with the
features of all F together. The kernels have one state for each walk:

    KVᵀ  (B, walks, TILE, E')    value columns of a tile, features of a term
    KK   (B, walks, TILE, PART)  16 lines of Σ k_i k_jᵀ, then zeros. A square
                                 with c0 or c1 has Σ k_i in lines 16 and 17.

Where the two differ:

- The constant feature has two columns in a square, and Σ k two lines, for the
  high and the low half of the weight on the query. In a state both hold the
  sum. The cotangents of both are added up.
- With several squares, the sum of the constant feature is in each of them. Of a
  cotangent given to the kernels, only the first has it.
- KK is in every value tile of a head. Its cotangent is in the first one.
- Cotangents are multiplied by `gradient_scale` in the kernels.
- A product x_a x_b with a ≠ b is one public feature, or two if b = a + F/2. In
  the terms it is one feature, or two if b = a + 8 within one square. Two alike
  share a sum's cotangent equally. With F = 16 both layouts are the same.
"""

import dataclasses
import functools
import itertools

from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial.gpu.documents import Documents
from pallas_kernels.polynomial.gpu.launch import (
  HALF_BLOCKS,
  PART,
  SQUARE_BLOCKS,
  TILE,
  Launch,
  Plan,
  pairs_of,
)
from pallas_kernels.polynomial.gpu.tiles import times
from pallas_kernels.polynomial.state import State, restore_antisymmetric_part


def to_kernel(
  state: State | None, launch: Launch, plan: Plan, *, cotangent: bool = False
) -> tuple[Array, Array] | None:
  """Convert a public state for one launch.

  Args:
    state: the state, or a cotangent of one; None for zeros.
    launch: the launch of the squares or of the pairs.
    plan: the plan of the call.
    cotangent: whether `state` is a cotangent.

  Returns:
    (KVᵀ, KK), or None for None.
  """
  if state is None:
    return None
  blocks = [_products_to_terms(state.kv_BHEP, launch, plan.F, cotangent)]
  if not launch.pairs:
    blocks += _other_features_to_squares(
      state.kv_BHEP, launch, plan.F, cotangent
    )
  kv = jnp.concatenate(blocks, axis=3)  # (B, H, terms, E', P)
  B, H, terms, E, P = kv.shape
  columns = TILE * launch.value_tiles
  kv = jnp.pad(kv, (*[(0, 0)] * 4, (0, columns - P)))
  kv = kv.reshape(B, H, terms, E, launch.value_tiles, TILE)
  kv = kv.transpose(0, 1, 4, 2, 5, 3).reshape(B, launch.walks, TILE, E)
  kk = _kk_to_terms(state.kk_BHGG, launch, plan.F, cotangent)
  if cotangent:
    scale = launch.gradient_scale
    return times(kv, scale), times(kk, scale)
  return kv, kk


def from_kernel(
  found: list, count_BH: Array, plan: Plan, *, cotangent: bool = False
) -> State:
  """Convert the states of all launches to the public form.

  Args:
    found: (KVᵀ, KK) of each launch of the plan.
    count_BH: the last corner of KK: the number of tokens, or its cotangent.
      It is read where c0 or c1 is not 0.
    plan: the plan of the call.
    cotangent: whether the states are cotangents.
  """
  squares, kvs, kks = plan.launches[0], [], []
  for (kv, kk), launch in zip(found, plan.launches, strict=True):
    if cotangent:
      scale = 1 / launch.gradient_scale
      kv, kk = times(kv, scale), times(kk, scale)
    axes = launch.B, launch.H, launch.value_tiles, launch.terms
    kv = kv.reshape(*axes, TILE, launch.E).transpose(0, 1, 3, 5, 2, 4)
    kvs.append(kv.reshape(*kv.shape[:4], -1)[..., : plan.P])
    kks.append(kk.reshape(*axes, TILE, PART)[:, :, 0])
  blocks = [_products_from_terms(kvs, plan, cotangent)]
  of_squares, start = kvs[0], SQUARE_BLOCKS * PART
  if squares.c1:
    linear = of_squares[:, :, :, start : start + PART]
    linear = linear.reshape(*linear.shape[:2], -1, plan.P)
    blocks.append(linear[:, :, : plan.F])
    start += PART
  if squares.c0 and cotangent:
    both = of_squares[:, :, :, start : start + 2]
    blocks.append(both.sum(axis=(2, 3))[:, :, None])
  elif squares.c0:
    blocks.append(of_squares[:, :, 0, start : start + 1])
  kv = jnp.concatenate(blocks, axis=2)
  return State(kv, _kk_from_terms(kks, count_BH, plan, cotangent))


def restore_lost(
  state: State, outer: State | None, masks: Documents | None, plan: Plan
) -> State:
  """Add back what the kernels' form of an initial state cannot hold.

  Two products that are one feature in the terms, and two features of a public
  state, could differ in a state that is no sum over tokens, as could the two
  halves of KK. The kernels take their mean. The difference passes through a
  call unchanged, and is added here.

  Args:
    state: the state, or cotangent, that was converted.
    outer: the state that the call started from, or the cotangent that its
      derivative started from; None for zeros.
    masks: of documents. Rows of several documents lose the outer state.
    plan: the plan of the call.
  """
  if outer is None:
    return state
  F, single_B = plan.F, None if masks is None else masks.single_B
  state = restore_antisymmetric_part(state, outer, single_B)
  if F % 2 or F == PART:
    return state
  block = slice(F // 2 * F, (F // 2 + 1) * F)
  last = outer.kv_BHEP[:, :, block]
  skew = (last - jnp.roll(last, F // 2, axis=2)) / 2
  if single_B is not None:
    skew = jnp.where(single_B[:, None, None, None], skew, 0)
  return state._replace(kv_BHEP=state.kv_BHEP.at[:, :, block].add(skew))


def in_first_tile(x_BH: Array, launch: Launch) -> Array:
  """(B, H, ·) → (B, H · value_tiles, ·): zeros except in the first tile."""
  if launch.value_tiles == 1:
    return x_BH
  lines = jnp.arange(launch.H * launch.value_tiles)
  first = lines % launch.value_tiles == 0
  x = jnp.repeat(x_BH, launch.value_tiles, axis=1)
  return jnp.where(first.reshape(-1, *[1] * (x.ndim - 2)), x, 0)


# KV.


def _products_to_terms(kv, launch: Launch, F: int, cotangent: bool) -> Array:
  """Take the products' features from KV, to (B, H, terms, ·, P)."""
  E = (F // 2 + 1) * F
  products = kv[:, :, :E]
  if F == PART:
    return products[:, :, None]
  places = _places(F, launch.parts)
  here = slice(launch.parts, None) if launch.pairs else slice(launch.parts)
  # Padded features of a last part are at E, a line of zeros.
  products = jnp.pad(products, ((0, 0), (0, 0), (0, 1), (0, 0)))
  first, second = (
    jnp.take(products, np.concatenate(x[here]), axis=2)
    for x in (places.first_of_term, places.second_of_term)
  )
  kv = (first + second) / 2
  if cotangent:
    share = np.concatenate(places.share_of_term[here])
    kv = kv * jnp.asarray(share, kv.dtype)[None, None, :, None]
  return kv.reshape(*kv.shape[:2], launch.terms, -1, kv.shape[-1])


def _products_from_terms(kvs: list, plan: Plan, cotangent: bool) -> Array:
  """Take the products' features of all terms, to (B, H, E, P)."""
  counts = SQUARE_BLOCKS * PART, HALF_BLOCKS * PART
  products = [x[:, :, :, :n] for x, n in zip(kvs, counts, strict=False)]
  products = [x.reshape(*x.shape[:2], -1, plan.P) for x in products]
  if plan.F == PART:
    return products[0]
  places = _places(plan.F, plan.whole.parts)
  kv = jnp.take(jnp.concatenate(products, axis=2), places.of_state, axis=2)
  if cotangent:
    share = jnp.asarray(places.share_of_state, kv.dtype)
    kv = kv * share[None, None, :, None]
  return kv


def _other_features_to_squares(
  kv, launch: Launch, F: int, cotangent: bool
) -> list[Array]:
  """Take the linear and constant features of the squares, (B, H, m, 16, P)."""
  blocks = []
  m, P = launch.parts, kv.shape[-1]
  E = (F // 2 + 1) * F
  if launch.c1:
    linear = kv[:, :, E : E + F]
    linear = jnp.pad(linear, ((0, 0), (0, 0), (0, m * PART - F), (0, 0)))
    blocks.append(linear.reshape(*kv.shape[:2], m, PART, P))
  if launch.c0:
    holds = np.zeros((1, 1, m, PART, 1), bool)
    if cotangent:
      holds[:, :, 0, 0] = True
    else:
      holds[:, :, :, :2] = True
    blocks.append(jnp.where(holds, kv[:, :, None, -1:], 0))
  return blocks


@dataclasses.dataclass(frozen=True)
class _Places:
  """The place of each product in the other layout.

  Attributes:
    first_of_term: for each term, the public features that its products are in.
      Products with padded features are at E, the number of public products.
    second_of_term: the second place of those that are in two; else the first.
    share_of_term: which share of a public cotangent a term's product gets.
    of_state: for each public feature, its place in the products of all terms.
    share_of_state: which share of a term's cotangent a public product gets.
  """

  first_of_term: list[np.ndarray]
  second_of_term: list[np.ndarray]
  share_of_term: list[np.ndarray]
  of_state: np.ndarray
  share_of_state: np.ndarray


@functools.cache
def _places(F: int, m: int) -> _Places:
  E = (F // 2 + 1) * F
  # The public features that a product x_a x_b, a ≤ b, is in: one or two.
  public: dict[tuple[int, int], list[int]] = {}
  for r, a in itertools.product(range(F // 2 + 1), range(F)):
    product = _product(a, (a + r) % F)
    public.setdefault(product, []).append(r * F + a)
  # The terms (i, j, blocks), in their order.
  terms = [(i, i, range(SQUARE_BLOCKS)) for i in range(m)]
  halves = range(HALF_BLOCKS), range(HALF_BLOCKS, 2 * HALF_BLOCKS)
  terms += [(i, j, blocks) for i, j in pairs_of(m) for blocks in halves]
  in_terms: dict[tuple[int, int], tuple[int, float]] = {}
  number, columns = itertools.count(), []
  for i, j, blocks in terms:
    lines = []
    for r, c in itertools.product(blocks, range(PART)):
      a, b = i * PART + c, j * PART + (c + r) % PART
      product = _product(a, b)
      places = public.get(product, [E])
      times_here = 2 if i == j and r == SQUARE_BLOCKS - 1 else 1
      lines.append((places[0], places[-1], len(places) / times_here))
      place = next(number)
      in_terms.setdefault(product, (place, times_here / len(places)))
    columns.append([np.array(x) for x in zip(*lines, strict=True)])
  of_state: list[tuple[int, float]] = [(0, 0.0)] * E
  for product, places in public.items():
    for place in places:
      of_state[place] = in_terms[product]
  first, second, shares = (list(x) for x in zip(*columns, strict=True))
  return _Places(
    first,
    second,
    shares,
    np.array([place for place, _ in of_state]),
    np.array([share for _, share in of_state]),
  )


def _product(a: int, b: int) -> tuple[int, int]:
  """Name the product x_a x_b, whichever comes first."""
  return min(a, b), max(a, b)


# KK.


def _kk_to_terms(kk, launch: Launch, F: int, cotangent: bool) -> Array:
  """Take KK of each term, to (B, walks, TILE, PART)."""
  m, padding = launch.parts, launch.parts * PART - F
  square = (kk[:, :, :F, :F] + kk[:, :, :F, :F].mT) / 2
  square = jnp.pad(square, ((0, 0), (0, 0), (0, padding), (0, padding)))
  square = square.reshape(*kk.shape[:2], m, PART, m, PART)
  indices = [(i, i) for i in range(m)]
  if launch.pairs:
    indices = [pair for pair in pairs_of(m) for _ in range(2)]
  lines = [jnp.stack([square[:, :, i, :, j] for i, j in indices], axis=2)]
  if not launch.pairs and kk.shape[-1] > F:
    line = kk[:, :, F:, :F] + kk[:, :, :F, F:].mT
    line = jnp.pad(line, ((0, 0), (0, 0), (0, 0), (0, padding)))
    line = line.reshape(*kk.shape[:2], m, 1, PART)
    lines += [line] if cotangent else [line / 2, line / 2]
  kk = jnp.concatenate(lines, axis=3)
  kk = jnp.pad(kk, (*[(0, 0)] * 3, (0, TILE - kk.shape[3]), (0, 0)))
  kk = kk[:, :, None]  # (B, H, value tile, terms, TILE, PART)
  if cotangent:
    others = (0, launch.value_tiles - 1)
    kk = jnp.pad(kk, ((0, 0), (0, 0), others, *[(0, 0)] * 3))
  else:
    kk = jnp.repeat(kk, launch.value_tiles, axis=2)
  return kk.reshape(launch.B, launch.walks, TILE, PART)


def _kk_from_terms(kks: list, count_BH, plan: Plan, cotangent: bool) -> Array:
  """Put KK of the terms together, to (B, H, G, G)."""
  F, m, squares = plan.F, plan.whole.parts, plan.launches[0]
  blocks = {(i, i): kks[0][:, :, i, :PART] for i in range(m)}
  for n, (i, j) in enumerate(pairs_of(m)):
    blocks[i, j] = kks[1][:, :, 2 * n, :PART]  # both halves have the same
    blocks[j, i] = blocks[i, j].mT
  lines = [
    jnp.concatenate([blocks[i, j] for j in range(m)], axis=3) for i in range(m)
  ]
  square = jnp.concatenate(lines, axis=2)[:, :, :F, :F]
  if not squares.affine:
    return square
  line = kks[0][:, :, :, PART] / (2 if cotangent else 1)
  line = line.reshape(*line.shape[:2], 1, -1)[..., :F]
  top = jnp.concatenate([square, line.mT], axis=3)
  bottom = jnp.concatenate([line, count_BH[:, :, None, None]], axis=3)
  return jnp.concatenate([top, bottom], axis=2)
