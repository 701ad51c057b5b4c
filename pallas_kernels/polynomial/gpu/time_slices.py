"""Slices of time of the Hopper kernels: the states between them.

Half slices are summed first, from their keys alone; the sums over those before
each slice are what the slices of a main kernel start from. The backward does
the same with the cotangents, from the end.
"""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  backward,
  feature_pairs,
  forward,
  slice_states,
)
from pallas_kernels.polynomial.gpu.documents import Documents
from pallas_kernels.polynomial.gpu.tiles import C, Call
from pallas_kernels.polynomial.state import State


def prefix(
  k,
  v,
  documents: Documents,
  outer: tuple | None,
  state: State | None,
  call: Call,
) -> tuple:
  """(KVᵀ, KK, count) before each slice; the first two behind the last, too.

  () where all that is before is 0. Of a single slice, what is behind is not
  known.

  Args:
    outer: (KVᵀ, KK) before the first slice; None: zeros.
    state: the same in the public form, which has the count.
  """
  if call.slices == 1:
    if outer is None:
      return ()
    kv, kk = (x[None] for x in outer)
  else:
    kv, kk = _keys(k, v, documents, outer, call)
  steps = jnp.arange(call.slices, dtype=jnp.float32) * (call.chunks * C)
  if documents.codes_B1T is not None:
    steps = jnp.zeros_like(steps)  # `past` knows them
  count_BH = jnp.zeros((call.B, call.H), jnp.float32)
  if state is not None and call.c0:
    count_BH = _corner(state)
  return kv, kk, steps[:, None, None] + count_BH[None]


def suffix(
  q, do, rows, documents: Documents, outer: tuple | None, call: Call
) -> tuple:
  """(KVᵀ, KK) before the first slice and behind each; () where all are 0.

  Of a single slice, only what is behind.
  """
  if call.slices == 1:
    return tuple(x[None] for x in outer or ())
  return _queries(q, do, rows, documents, outer, call)


def behind_keys(k, v, documents: Documents, call: Call) -> list[Array]:
  """(KVᵀ, KK) behind the last token, from zeros."""
  if call.slices == 1:
    sums = _of_keys(call)(k, v, documents.rows(call), call)
  else:
    sums = _keys(k, v, documents, None, call)
  return [x[-1] for x in sums]


def before_queries(q, do, rows, documents: Documents, call: Call):
  """The cotangents of (KVᵀ, KK) before the first token, from zeros."""
  if call.slices == 1:
    sums = _of_queries(call)(q, do, rows, call)
  else:
    sums = _queries(q, do, rows, documents, None, call)
  return [x[0] for x in sums]


def _keys(k, v, documents: Documents, outer, call: Call) -> tuple:
  """(KVᵀ, KK) at the slices + 1 borders."""
  halves = call.halves
  own = _of_keys(call)(k, v, documents.rows(call), halves)
  return slice_states.sums(own, outer, documents.whole(halves), call)


def _queries(q, do, rows, documents: Documents, outer, call: Call) -> tuple:
  """The cotangents of (KVᵀ, KK) at the slices + 1 borders."""
  halves = call.halves
  own = _of_queries(call)(q, do, rows, halves)
  whole = documents.whole(halves)
  return slice_states.sums(own, outer, whole, call, left=True)


def _of_keys(call: Call):
  return (feature_pairs if call.pairs else forward).key_states


def _of_queries(call: Call):
  return (feature_pairs if call.pairs else backward).query_cotangents


def corner(
  own_BH: Array, outer: State | None, documents: Documents, call: Call
) -> Array:
  """KK's corner: a row's own, and the outer's where it is one document."""
  if outer is None or not call.affine:
    return own_BH
  outer_BH = _corner(outer)
  if documents.all_B is not None:
    outer_BH = jnp.where(documents.all_B[:, None], outer_BH, 0)
  return own_BH + outer_BH


def _corner(state: State) -> Array:
  return state.kk_BHGG[:, :, -1, -1]
