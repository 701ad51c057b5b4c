"""Packed documents: how segment ids are read.

A row of a batch may hold several documents. `segment_ids` (B, T) gives every
token an integer; a document is a run of equal ids. An id that returns after
another one starts a new document.
"""

import jax
from jax import Array
import jax.numpy as jnp


def document_runs(segment_ids_BT: Array) -> Array:
  """Return each token's document number in its row: int32 (B, T), from 0.

  Args:
    segment_ids_BT: integers (B, T); a document is a run of one id.
  """
  changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  runs_BT = jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32)
  return jnp.pad(runs_BT, ((0, 0), (1, 0)))


def document_starts(runs_BT: Array) -> Array:
  """Return the position of the first token of each token's document.

  Args:
    runs_BT: document numbers from `document_runs`, or other ids, (B, T).

  Returns:
    int32 (B, T), counted from the start of the row.
  """
  t_1T = jnp.arange(runs_BT.shape[1], dtype=jnp.int32)[None]
  changes_BT = jnp.pad(runs_BT[:, 1:] != runs_BT[:, :-1], ((0, 0), (1, 0)))
  return jax.lax.cummax(jnp.where(changes_BT, t_1T, 0), axis=1)
