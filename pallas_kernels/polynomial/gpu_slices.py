"""Slices of time of the Hopper kernels: the states between them.

Each slice's own state comes first, from its keys alone; their prefix sums are
what the slices of a main kernel start from. The backward does the same with the
cotangents, from the end.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial import gpu_backward, gpu_forward, gpu_pairs
from pallas_kernels.polynomial.gpu_common import C, Call
from pallas_kernels.polynomial.gpu_documents import Documents


def prefix(
  k, v, documents: Documents, outer: tuple | None, count_BH, call: Call
):
  """((KVᵀ, KK, count) before each slice, each slice's own (KVᵀ, KK)).

  Args:
    outer: (KVᵀ, KK) before the first slice; None: zeros.
    count_BH: its tokens.
  """
  own = None
  if call.slices > 1:
    own = own_keys(k, v, documents, call)
  kv, kk = _exclusive(own, outer, documents.whole(call))
  steps = jnp.arange(call.slices, dtype=jnp.float32) * (call.chunks * C)
  if documents.codes_B1T is not None:
    steps = jnp.zeros_like(steps)  # `past` knows them
  return (kv, kk, steps[:, None, None] + count_BH[None]), own


def suffix(q, do, rows, documents: Documents, outer: tuple | None, call: Call):
  """((KVᵀ, KK) behind each slice, each slice's own); () where all are 0."""
  if call.slices == 1:
    return (tuple(x[None] for x in outer) if outer else ()), None
  own = own_queries(q, do, rows, documents, call)
  backwards = reverse(documents.whole(call))
  later = _exclusive(tuple(map(reverse, own)), outer, backwards)
  return tuple(map(reverse, later)), own


def own_keys(k, v, documents: Documents, call: Call) -> tuple:
  """(KVᵀ, KK) behind each slice, of its own keys."""
  rows = documents.rows(call)
  sums = (gpu_pairs if call.pairs else gpu_forward).key_states
  if call.slices == 1:
    return tuple(sums(k, v, rows, call))
  halves = sums(k, v, rows, call.halves)
  pairs = (_pairs(x, documents, call) for x in halves)
  return tuple(add(late, early, whole) for early, late, _, whole in pairs)


def own_queries(q, do, rows, documents: Documents, call: Call) -> tuple:
  """The cotangents of (KVᵀ, KK) before each slice, of its own queries."""
  sums = (gpu_pairs if call.pairs else gpu_backward).query_cotangents
  if call.slices == 1:
    return tuple(sums(q, do, rows, call))
  halves = sums(q, do, rows, call.halves)
  pairs = (_pairs(x, documents, call) for x in halves)
  return tuple(add(early, late, whole) for early, late, whole, _ in pairs)


def _pairs(x_SB: Array, documents: Documents, call: Call):
  """The halves of each slice and whether they are whole; a missing one is 0."""
  missing = 2 * call.slices - x_SB.shape[0]
  fill = lambda x, value: jnp.pad(
    x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=value
  )
  x_SB, whole_SB = fill(x_SB, 0), documents.whole(call.halves)
  if whole_SB is None:
    return x_SB[::2], x_SB[1::2], None, None
  whole_SB = fill(whole_SB, True)
  return x_SB[::2], x_SB[1::2], whole_SB[::2], whole_SB[1::2]


def _exclusive(own, outer, whole_SB):
  """Sums over the slices before each one, on top of `outer`."""
  if own is None:
    return tuple(x[None] for x in outer)
  start = outer or tuple(jnp.zeros_like(x[0]) for x in own)
  found = []
  for x, first in zip(own, start, strict=True):
    steps = jnp.concatenate([first[None], x[:-1]])
    found.append(_cumulate(steps, whole_SB))
  return found


def behind(start, own, whole_SB: Array | None, i: int) -> list[Array]:
  """The sums behind slice i: its own, on top of what it starts from."""
  joined_B = None if whole_SB is None else whole_SB[i]
  return [add(y[i], x[i], joined_B) for x, y in zip(start, own, strict=True)]


def reverse(x_SB: Array | None) -> Array | None:
  return None if x_SB is None else x_SB[::-1]


def _cumulate(x_SB: Array, whole_SB: Array | None) -> Array:
  """y_s = x_s + y_{s−1}; without y_{s−1} where slice s−1 is not whole."""
  if whole_SB is None:
    return jnp.cumsum(x_SB, axis=0)
  keep_SB = jnp.concatenate([jnp.ones_like(whole_SB[:1]), whole_SB[:-1]])

  def join(left, right):
    keep = left[0] & right[0]
    return keep, add(right[1], left[1], right[0])

  return jax.lax.associative_scan(join, (keep_SB, x_SB))[1]


def last(own_SB: Array, whole_SB: Array | None) -> Array:
  """The sum over the slices of the last one's document."""
  if whole_SB is None:
    return own_SB.sum(axis=0)
  total = own_SB[0]
  for x, whole_B in zip(own_SB[1:], whole_SB[1:], strict=True):
    total = add(x, total, whole_B)
  return total


def add(x, y, joined) -> Array:
  """x + y, or x alone where it is not joined; None: everywhere is."""
  if joined is None:
    return x + y
  joined = joined.reshape(*joined.shape, *[1] * (x.ndim - joined.ndim))
  return x + jnp.where(joined, y, 0)
