"""Look tokens and positions up in the tables of the language model."""

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes, document_runs, document_starts


def look_up(
  table_VD: Array, index_BT: Array, axes: ShardAxes | None = None
) -> Array:
  """Return rows (B, T, D) of a table; an index outside it has NaN.

  Args:
    table_VD: the table.
    index_BT: int32.
    axes: the mesh axes. None: no mesh.
  """
  if axes is not None:
    # A lookup needs D on one device.
    table_VD = jax.lax.with_sharding_constraint(
      table_VD, PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
    )
  is_inside_BT = (index_BT >= 0) & (index_BT < table_VD.shape[0])
  rows_BTD = jnp.take(table_VD, index_BT, axis=0, mode="clip")
  return jnp.where(is_inside_BT[..., None], rows_BTD, jnp.nan)


def token_positions(
  length: int, start_B: Array | None = None, segment_ids: Array | None = None
) -> Array:
  """Return the position of each token, int32 (B, T), or (1, T) for all rows.

  Args:
    length: T.
    start_B: int32, the position of each row's first token. None: 0.
    segment_ids: integers (B, T); positions start from 0 at each later document
      of a row. None: they run through the row.
  """
  position_BT = jnp.arange(length, dtype=jnp.int32)[None]
  before_B1 = 0 if start_B is None else start_B[:, None]
  if segment_ids is None:
    return position_BT + before_B1
  runs_BT = document_runs(segment_ids)
  # The first document continues that of the tokens before.
  before_BT = jnp.where(runs_BT == 0, before_B1, 0)
  return position_BT - document_starts(runs_BT) + before_BT
