"""The mesh, and where parameters and batches lie on it.

One axis, `data`, splits the rows of a batch; parameters are on every device.
"""

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from rebased_jax import ShardAxes
from train.data import batches

AXES = ShardAxes(batch="data")

# The first pattern that is found in a parameter's path places it.
RULES: tuple[tuple[str, PartitionSpec], ...] = ((r"", PartitionSpec()),)


def make_mesh() -> Mesh:
  """All devices of all processes, in one axis."""
  return jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
  )


def check_batch(rows: int, accumulate: int, mesh: Mesh) -> None:
  """Raises ValueError where the devices do not divide the rows evenly."""
  devices = mesh.shape["data"]
  batches.require(
    rows % (devices * accumulate) == 0,
    "batch",
    rows,
    f"a multiple of {devices} devices × accumulate={accumulate}",
  )


def of_tree(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every array of a tree, by its path."""

  def place(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next(spec for rule, spec in RULES if re.search(rule, name))
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(rows: int) -> slice:
  """The rows of a global batch that this process reads."""
  each = rows // jax.process_count()
  return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows, as part of the global batch on the mesh."""
  sharding = of_batch(mesh)
  put = lambda x: jax.make_array_from_process_local_data(sharding, x)
  return {name: put(x) for name, x in batch.items()}
