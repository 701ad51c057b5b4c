"""Between the states of `spec.py` and those of the parts of wide features.

A part's state is that of `gpu_states.py`, of its own features: KVᵀ (V, E) and
KK (V, 16), the sums of k_i k_jᵀ and, in a part (i, i), of k_i twice.

A product x_a x_b is one feature in a state of `spec.py`, or two where
b = a + F/2; in the parts it is one, or two where b = a + 8 within a part. Two
that are alike share a cotangent. The constant feature's sum is in all parts
(i, i), its cotangent in the first.
"""

import functools
import itertools
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial import state as state_lib
from pallas_kernels.polynomial.gpu.launch import (
  CYCLIC,
  PAIR,
  Call,
  F,
  V,
  pairs_of,
)
from pallas_kernels.polynomial.gpu.tiles import times
from pallas_kernels.polynomial.state import State


def to_parts(
  state: State, kind: Call, width: int, *, cotangent: bool = False
) -> tuple[Array, Array]:
  """(KVᵀ, KK) of a kind of parts, (B, heads, V, ·); width is F of the state.

  A cotangent grows by `kind.grow`, and its KK is in the first tile of a head.
  """
  tables, m = _tables(width, kind.m), kind.m
  E = tables.first_E.size
  here = slice(m, None) if kind.pairs else slice(0, m)
  square = jnp.pad(state.kv_BHEP[:, :, :E], _rows(0, 1))
  a, b = (
    jnp.take(square, np.concatenate(x[here]), axis=2)
    for x in (tables.at_parts, tables.also_parts)
  )
  kv = (a + b) / 2
  if cotangent:
    share = np.concatenate(tables.share_parts[here])
    kv = kv * jnp.asarray(share, kv.dtype)[None, None, :, None]
  kv = kv.reshape(*kv.shape[:2], kind.parts, -1, kv.shape[-1])
  rows = [kv] if kind.pairs else [kv, *_lower(state, kind, width, cotangent)]
  kv = jnp.concatenate(rows, axis=3)
  kv = jnp.pad(kv, (*[(0, 0)] * 4, (0, V * kind.tiles - kv.shape[-1])))
  kv = kv.reshape(*kv.shape[:4], kind.tiles, V)
  kv = kv.transpose(0, 1, 4, 2, 5, 3).reshape(kind.B, kind.heads, V, kind.E)
  kk = _kk_parts(state.kk_BHGG, kind, width, cotangent)
  if cotangent:
    return times(kv, kind.grow), times(kk, kind.grow)
  return kv, kk


def _rows(before: int, after: int) -> tuple:
  return (0, 0), (0, 0), (before, after), (0, 0)


def _lower(state: State, kind: Call, width: int, cotangent: bool) -> list:
  """The linear and constant blocks of the parts (i, i), (B, H, m, 16, P)."""
  kv, blocks = state.kv_BHEP, []
  E = _tables(width, kind.m).first_E.size
  if kind.c1:
    linear = jnp.pad(kv[:, :, E : E + width], _rows(0, kind.m * F - width))
    blocks.append(linear.reshape(*kv.shape[:2], kind.m, F, -1))
  if kind.c0:
    one_P = np.zeros((1, 1, kind.m, F, 1), np.float32)
    if cotangent:
      one_P[:, :, 0, 0] = 1
    else:
      one_P[:, :, :, :2] = 1
    blocks.append(kv[:, :, None, -1:] * one_P)
  return blocks


def _kk_parts(kk, kind: Call, width: int, cotangent: bool) -> Array:
  m, more = kind.m, kind.m * F - width
  square = (kk[:, :, :width, :width] + kk[:, :, :width, :width].mT) / 2
  square = jnp.pad(square, ((0, 0), (0, 0), (0, more), (0, more)))
  square = square.reshape(*kk.shape[:2], m, F, m, F)
  own = [(i, i) for i in range(m)]
  at = np.repeat(pairs_of(m), 2, axis=0) if kind.pairs else own
  rows = [jnp.stack([square[:, :, i, :, j] for i, j in at], axis=2)]
  if not kind.pairs and kk.shape[-1] > width:
    line = kk[:, :, width:, :width] + kk[:, :, :width, width:].mT
    line = jnp.pad(line, ((0, 0), (0, 0), (0, 0), (0, more)))
    line = line.reshape(*kk.shape[:2], m, 1, F)
    rows += [line] if cotangent else [line / 2, line / 2]
  kk = jnp.concatenate(rows, axis=3)
  kk = jnp.pad(kk, (*[(0, 0)] * 3, (0, V - kk.shape[3]), (0, 0)))[:, :, None]
  if cotangent:
    pad = ((0, 0), (0, 0), (0, kind.tiles - 1), *[(0, 0)] * 3)
    kk = jnp.pad(kk, pad)
  else:
    kk = jnp.repeat(kk, kind.tiles, axis=2)
  return kk.reshape(kind.B, kind.heads, V, F)


def from_parts(
  found: list, kinds: list[Call], width: int, P: int, count_BH, *, cotangent
) -> State:
  """The inverse of `to_parts` of all kinds; the count is KK's corner."""
  tables, own = _tables(width, kinds[0].m), kinds[0]
  features, kks = [], []
  for (kv, kk), kind in zip(found, kinds, strict=True):
    if cotangent:
      kv, kk = times(kv, 1 / kind.grow), times(kk, 1 / kind.grow)
    kv = kv.reshape(kind.B, kind.H, kind.tiles, kind.parts, V, kind.E)
    kv = kv.transpose(0, 1, 3, 5, 2, 4)
    features.append(kv.reshape(*kv.shape[:4], -1)[..., :P])
    kk = kk.reshape(kind.B, kind.H, kind.tiles, kind.parts, V, F)
    kks.append(kk[:, :, 0])
  squares = [
    x[:, :, :, : (CYCLIC if n == 0 else PAIR) * F]
    for n, x in enumerate(features)
  ]
  squares = [x.reshape(*x.shape[:2], -1, P) for x in squares]
  kv = jnp.take(jnp.concatenate(squares, axis=2), tables.first_E, axis=2)
  if cotangent:
    kv = kv * jnp.asarray(tables.share_E, kv.dtype)[None, None, :, None]
  rows, at = [kv], CYCLIC * F
  if own.c1:
    linear = features[0][:, :, :, at : at + F]
    rows.append(linear.reshape(*kv.shape[:2], -1, P)[:, :, :width])
    at += F
  if own.c0 and cotangent:
    rows.append(features[0][:, :, :, at : at + 2].sum(axis=(2, 3))[:, :, None])
  elif own.c0:
    rows.append(features[0][:, :, 0, at : at + 1])
  kv = jnp.concatenate(rows, axis=2)
  return State(kv, _kk(kks, own, width, count_BH, cotangent))


def _kk(kks: list, own: Call, width: int, count_BH, cotangent: bool) -> Array:
  m = own.m
  blocks = {(i, i): kks[0][:, :, i, :F] for i in range(m)}
  for n, (i, j) in enumerate(pairs_of(m)):
    blocks[i, j] = kks[1][:, :, 2 * n, :F]
    blocks[j, i] = blocks[i, j].mT
  lines = [
    jnp.concatenate([blocks[i, j] for j in range(m)], axis=3) for i in range(m)
  ]
  square = jnp.concatenate(lines, axis=2)[:, :, :width, :width]
  if not own.affine:
    return square
  line = kks[0][:, :, :, F] / (2 if cotangent else 1)
  line = line.reshape(*line.shape[:2], 1, -1)[..., :width]
  top = jnp.concatenate([square, line.mT], axis=3)
  bottom = jnp.concatenate([line, count_BH[:, :, None, None]], axis=3)
  return jnp.concatenate([top, bottom], axis=2)


def with_skew(
  state: State, outer: State | None, joined_B: Array | None, width: int
) -> State:
  """`restore_antisymmetric_part`, also of the features that are one in parts."""
  if outer is None:
    return state
  state = state_lib.restore_antisymmetric_part(state, outer, joined_B)
  if width % 2:
    return state
  block = slice(width // 2 * width, (width // 2 + 1) * width)
  last = outer.kv_BHEP[:, :, block]
  skew = (last - jnp.roll(last, width // 2, axis=2)) / 2
  if joined_B is not None:
    skew = jnp.where(joined_B[:, None, None, None], skew, 0)
  return state._replace(kv_BHEP=state.kv_BHEP.at[:, :, block].add(skew))


class _Tables(NamedTuple):
  """Where the products of one layout are in the other, and their shares."""

  at_parts: list  # a part's features in the state; E where it has none
  also_parts: list  # the other of two, or the same
  share_parts: list  # of the state's cotangent
  first_E: np.ndarray  # the state's features in those of all parts
  share_E: np.ndarray  # of the parts' cotangent


@functools.cache
def _tables(width: int, m: int) -> _Tables:
  E = (width // 2 + 1) * width
  places: dict = {}  # of a product, in the state
  for r, a in itertools.product(range(width // 2 + 1), range(width)):
    key = tuple(sorted((a, (a + r) % width)))
    places.setdefault(key, []).append(r * width + a)
  parts = [(i, i, range(CYCLIC)) for i in range(m)]
  halves = range(PAIR), range(PAIR, F)
  parts += [(i, j, half) for i, j in pairs_of(m) for half in halves]
  found, columns = {}, []
  numbers = itertools.count()
  for i, j, blocks in parts:
    rows = []
    for r, c in itertools.product(blocks, range(F)):
      key = tuple(sorted((i * F + c, j * F + (c + r) % F)))
      place = places.get(key, [E])
      twice = 2 if i == j and r == CYCLIC - 1 else 1
      rows.append((place[0], place[-1], len(place) / twice))
      number = next(numbers)
      found.setdefault(key, (number, twice / len(place)))
    columns.append([np.array(x) for x in zip(*rows, strict=True)])
  by_place = {e: found[key] for key, place in places.items() for e in place}
  first_E, share_E = zip(*(by_place[e] for e in range(E)), strict=True)
  parts = (list(x) for x in zip(*columns, strict=True))
  return _Tables(*parts, np.array(first_E), np.array(share_E))
