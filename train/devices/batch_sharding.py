"""Put batches on the mesh: which rows this process reads, and where they go."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from train.devices.mesh import shard_axes


def field_shardings(
  names: tuple[str, ...], mesh: Mesh
) -> dict[str, NamedSharding]:
  """Return the sharding of every array of a batch.

  Arrays (B, T) are split over rows and tokens. In a batch with `positions` the
  arrays (B, M) of predicted positions are split over rows only.

  Args:
    names: the names of the batch's arrays.
    mesh: as `make_mesh` returns it.
  """
  axes = shard_axes(mesh)
  whole = ("tokens", "segment_ids") if "positions" in names else names
  return {
    name: NamedSharding(
      mesh, axes.bt() if name in whole else PartitionSpec(axes.batch)
    )
    for name in names
  }


def local_rows(rows: int, mesh: Mesh) -> slice:
  """Return the rows of a global batch that this process's devices hold.

  Processes that share rows read the same ones: each has some of the heads or
  of the tokens.
  """
  spec = PartitionSpec(shard_axes(mesh).batch)
  indices = NamedSharding(mesh, spec).addressable_devices_indices_map((rows,))
  bounds = [index[0].indices(rows)[:2] for index in indices.values() if index]
  return slice(min(x for x, _ in bounds), max(x for _, x in bounds))


def put_batch(
  batch: dict[str, np.ndarray], mesh: Mesh, rows: int | None = None
) -> dict[str, jax.Array]:
  """Return this process's rows as its part of the global batch on the mesh.

  Args:
    batch: the rows that `local_rows` names.
    mesh: as `make_mesh` returns it.
    rows: rows of the global batch. None: `batch` is all of it.
  """
  shardings = field_shardings(tuple(batch), mesh)
  if rows is None or jax.process_count() == 1:
    return jax.device_put(batch, shardings)
  first = local_rows(rows, mesh).start

  def put(name: str, x: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(rows)
      return x[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(
      (rows, *x.shape[1:]), shardings[name], part
    )

  return {name: put(name, x) for name, x in batch.items()}


def put_ahead(
  batches: Iterator[Any], put: Callable[[Any], Any]
) -> Iterator[Any]:
  """Yield each batch as `put` returns it, one batch later than it is put.

  A GPU copies a batch only after the steps that were dispatched before the
  copy. So the next batch is put before the step of the current one is
  dispatched. If the next batch raises, the error comes before the current
  batch is used, so that no error is lost.
  """
  ahead = None
  for batch in batches:
    ahead, current = put(batch), ahead
    if current is not None:
      yield current
  if ahead is not None:
    yield ahead
