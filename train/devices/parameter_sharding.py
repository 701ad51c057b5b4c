"""The mesh axes that each parameter is split over.

The path of a parameter alone decides, by the names of its axes
(`rebased_jax.parameter_axes`). The path of an optimiser moment ends with its
parameter's path, so it has the same sharding.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rebased_jax.parameter_axes import axis_names

# The mesh axis that splits a parameter's axis of this name.
MESH_AXES = {
  "vocab": "tensor",
  "mlp": "tensor",
  "heads": "tensor",
  "embed": "fsdp",
}


@dataclasses.dataclass(frozen=True)
class Placement:
  """The split of one array over the mesh."""

  #: The parameter's path, with slashes.
  path: str
  #: The shape of the whole array.
  shape: tuple[int, ...]
  spec: PartitionSpec
  #: Why an axis of the rule is not used, one line each: it does not divide.
  dropped: tuple[str, ...]

  def share(self, sizes: Mapping[str, int]) -> int:
    """Return how many of the array's numbers each device holds."""
    names = [name for name in self.spec if name is not None]
    return math.prod(self.shape) // math.prod(sizes[name] for name in names)


def place(
  path: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> Placement:
  """Return how an array is split.

  Args:
    path: the parameter's path, with slashes.
    shape: the shape of the whole array.
    sizes: the devices along each mesh axis. An axis of size 1 splits nothing.
  """
  spec: list[str | None] = []
  dropped = []
  for name, size in zip(axis_names(path, len(shape)), shape, strict=True):
    axis = None if name is None else MESH_AXES.get(name)
    parts = 1 if axis is None else sizes[axis]
    if size % parts:
      dropped.append(f"{axis}: {size} is not a multiple of {parts}")
    spec.append(axis if parts > 1 and size % parts == 0 else None)
  while spec and spec[-1] is None:
    spec.pop()
  return Placement(path, shape, PartitionSpec(*spec), tuple(dropped))


def place_all(tree: Any, sizes: Mapping[str, int]) -> list[Placement]:
  """Return how every array of a tree is split; `sizes` as in `place`."""
  return [
    place(_name(path), leaf.shape, sizes)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def named_shardings(tree: Any, mesh: Mesh) -> Any:
  """Return a tree with the NamedSharding of every array of `tree`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(
      mesh, place(_name(path), x.shape, mesh.shape).spec
    ),
    tree,
  )


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
