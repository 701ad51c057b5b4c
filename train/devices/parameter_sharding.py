"""The mesh axes that each parameter is split over.

The path of a parameter alone decides, by RULES. The path of an optimiser moment
ends with its parameter's path, so it has the same sharding.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The first pattern found in a path gives the mesh axes of the array's last
# dimensions. The dimension of stacked pairs, the first one, is not split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"token_embedding$", ("tensor", "fsdp")),  # V, D
  (r"position_embedding$", (None, "fsdp")),  # P, D
  (r"mlp/up/kernel$", ("fsdp", "tensor")),  # D, hidden
  (r"mlp/up/bias$", ("tensor",)),  # hidden
  (r"mlp/down/kernel$", ("tensor", "fsdp")),  # hidden, D
  (r"gate/kernel$", ("fsdp", "tensor")),  # D, D: of the short convolution
  (r"gate/bias$", ("tensor",)),  # D
  (r"project/[qkv]/kernel$", ("fsdp", "tensor")),  # D, heads
  (r"project/o/kernel$", ("tensor", "fsdp")),  # heads, D
  (r"_affine/(gamma|beta)$", ("tensor",)),  # heads
  (r"mixer/(qkv|[kvr])/kernel$", ("fsdp", "tensor")),  # D, heads or channels
  (r"mixer/qkv/bias$", ("tensor",)),  # heads
  (r"mixer/o/kernel$", ("tensor", "fsdp")),  # channels, D: of RWKV
  (r"mixer/(decay|first)$", ("tensor",)),  # channels
  (r"(in|gate)_proj/kernel$", ("fsdp", "tensor")),  # D, channels
  (r"in_proj/bias$", ("tensor",)),  # channels
  (r"out_proj/kernel$", ("tensor", "fsdp")),  # heads or channels, D
  (r"mixer/conv/kernel$", (None, "tensor")),  # K, channels
  (r"mixer/conv/bias$", ("tensor",)),  # channels
  (r"x_proj/kernel$", ("tensor", None)),  # channels, R + 2N: of Mamba
  (r"dt_proj/kernel$", (None, "tensor")),  # R, channels
  (r"(dt_proj/bias|mixer/D)$", ("tensor",)),  # channels
  (r"A_log$", ("tensor", None)),  # channels, N
  (r"", ()),  # norms, other biases, taps and counters: on every device
)


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
  rule = next(axes for pattern, axes in RULES if re.search(pattern, path))
  rule = rule[-len(shape) :] if shape else ()
  spec: list[str | None] = [None] * (len(shape) - len(rule))
  dropped = []
  for axis, size in zip(rule, shape[len(spec) :], strict=True):
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
