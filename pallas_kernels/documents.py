"""Packed documents: how segment ids are read."""

import jax
from jax import Array
import jax.numpy as jnp


def document_runs(segment_ids_BT: Array) -> Array:
  """Numbers the documents of each row 0, 1, …: a document is a run of one id.

  An id that comes again after another one is a new document.
  """
  border_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  runs_BT = jnp.cumsum(border_BT, axis=1, dtype=jnp.int32)
  return jnp.pad(runs_BT, ((0, 0), (1, 0)))


def document_starts(runs_BT: Array) -> Array:
  """The place in the row of the first token of each token's document."""
  t_1T = jnp.arange(runs_BT.shape[1], dtype=jnp.int32)[None]
  border_BT = jnp.pad(runs_BT[:, 1:] != runs_BT[:, :-1], ((0, 0), (1, 0)))
  return jax.lax.cummax(jnp.where(border_BT, t_1T, 0), axis=1)
