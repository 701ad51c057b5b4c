"""Look tokens and positions up in the tables of the language model."""

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes


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
