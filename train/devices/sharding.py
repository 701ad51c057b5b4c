"""Where parameters, optimiser state and batches lie on the mesh.

A parameter's place follows from its path alone, by `RULES`; the optimiser's
moments have their parameter's path behind their own, and so its place.
"""

from collections.abc import Callable, Iterator, Mapping
import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from train.devices.mesh import shard_axes

# The first pattern that is found in a path places the array: the axes of its
# last dimensions, which stand behind. Pairs, stacked in front, are not split.
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


class Place(NamedTuple):
  """What one array got."""

  path: str
  shape: tuple[int, ...]
  spec: PartitionSpec
  dropped: tuple[str, ...]  # of the rule, because they do not divide

  def share(self, sizes: Mapping[str, int]) -> int:
    """Numbers of it on each device."""
    names = [name for name in self.spec if name is not None]
    return math.prod(self.shape) // math.prod(sizes[name] for name in names)


def place(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Place:
  """The place of an array.

  Args:
    path: of the parameter, with slashes.
    shape: of the whole array.
    sizes: of the mesh's axes. One of size 1 splits nothing.
  """
  rule = next(axes for pattern, axes in RULES if re.search(pattern, path))
  rule = rule[-len(shape) :] if shape else ()
  spec: list[str | None] = [None] * (len(shape) - len(rule))
  dropped = []
  for axis, size in zip(rule, shape[len(spec) :], strict=True):
    parts = 1 if axis is None else sizes[axis]
    if size % parts:
      dropped.append(f"{axis}: {size} is no multiple of {parts}")
    spec.append(axis if parts > 1 and size % parts == 0 else None)
  while spec and spec[-1] is None:
    spec.pop()
  return Place(path, shape, PartitionSpec(*spec), tuple(dropped))


def places(tree: Any, sizes: Mapping[str, int]) -> list[Place]:
  """The place of every array of a tree."""
  return [
    place(_name(path), leaf.shape, sizes)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def of_tree(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every array of a tree, by its path."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(
      mesh, place(_name(path), x.shape, mesh.shape).spec
    ),
    tree,
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def of_batch(names: tuple[str, ...], mesh: Mesh) -> dict[str, NamedSharding]:
  """The place of every array of a batch: (B, T), or (B, M) of positions."""
  axes = shard_axes(mesh)
  whole = ("tokens", "segment_ids") if "positions" in names else names
  return {
    name: NamedSharding(
      mesh, axes.bt() if name in whole else PartitionSpec(axes.batch)
    )
    for name in names
  }


def local_rows(rows: int, mesh: Mesh) -> slice:
  """The rows of a global batch that this process's devices hold.

  Processes that share rows, each with some of the heads or tokens, read the
  same ones.
  """
  spec = PartitionSpec(shard_axes(mesh).batch)
  indices = NamedSharding(mesh, spec).addressable_devices_indices_map((rows,))
  bounds = [index[0].indices(rows)[:2] for index in indices.values()]
  return slice(min(x for x, _ in bounds), max(x for _, x in bounds))


def put_batch(
  batch: dict[str, np.ndarray], mesh: Mesh, rows: int | None = None
) -> dict[str, jax.Array]:
  """This process's rows, as part of the global batch on the mesh.

  Args:
    batch: the rows of `local_rows`.
    mesh: of `make_mesh`.
    rows: of the global batch; None: `batch` is all of it.
  """
  shardings = of_batch(tuple(batch), mesh)
  if rows is None or jax.process_count() == 1:
    return jax.device_put(batch, shardings)
  first = local_rows(rows, mesh).start

  def put(name: str, x: np.ndarray) -> jax.Array:
    def part(index):
      start, stop, _ = index[0].indices(rows)
      return x[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(
      (rows, *x.shape[1:]), shardings[name], part
    )

  return {name: put(name, x) for name, x in batch.items()}


def put_ahead(
  batches: Iterator[Any], put: Callable[[Any], Any]
) -> Iterator[Any]:
  """Each batch as `put` returns it, put before the one ahead of it is used.

  A GPU copies a batch when the steps are done that were dispatched before the
  copy: a step waits for a batch that is put just before it. What a batch raises
  comes in place of the one before it, so that no error is left behind.
  """
  ahead = None
  for batch in batches:
    ahead, current = put(batch), ahead
    if current is not None:
      yield current
  if ahead is not None:
    yield ahead
