"""Packed documents: how segment ids are read.

A row of a batch may hold several documents. `segment_ids` (B, T) gives every
token an integer; a document is a run of equal ids. An id that returns after
another one starts a new document.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.arguments import integer_array
from pallas_kernels.explicit_mesh import on_any_mesh


@on_any_mesh("BT", "BT")
def document_runs(segment_ids_BT: Array) -> Array:
  """Return each token's document number in its row: int32 (B, T), from 0.

  Args:
    segment_ids_BT: integers (B, T); a document is a run of one id.

  Raises:
    ValueError: the argument is no array of integers (B, T).
  """
  ids_BT = integer_array("segment_ids_BT", segment_ids_BT, ("B", "T"))
  return jnp.cumsum(_changes(ids_BT), axis=1, dtype=jnp.int32)


@on_any_mesh("BT", "BT")
def document_starts(runs_BT: Array) -> Array:
  """Return the position of the first token of each token's document.

  Args:
    runs_BT: document numbers from `document_runs`, or other ids, (B, T).

  Returns:
    int32 (B, T), counted from the start of the row.

  Raises:
    ValueError: the argument is no array of integers (B, T).
  """
  runs_BT = integer_array("runs_BT", runs_BT, ("B", "T"))
  t_1T = jnp.arange(runs_BT.shape[1], dtype=jnp.int32)[None]
  return jax.lax.cummax(jnp.where(_changes(runs_BT), t_1T, 0), axis=1)


def _changes(ids_BT: Array) -> Array:
  """Return whether a token's id differs from the one before; T may be 0."""
  changes_BT = ids_BT[:, 1:] != ids_BT[:, :-1]
  return jnp.pad(changes_BT, ((0, 0), (min(1, ids_BT.shape[1]), 0)))
