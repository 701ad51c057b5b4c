"""Arrays that are split over several processes: gather them, fail together.

Arrays are gathered one by one, by all processes in the same order. So an error
of one process must end the work of all: the others would wait for its part of
the next array for ever. Arrays of one process need none of this.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np


class OtherProcessFailed(RuntimeError):
  """Another process could not do its part; its own error says why."""


def is_split(arrays: Iterable[Any]) -> bool:
  """Whether some of the arrays lie on devices of other processes too."""
  return any(
    isinstance(x, jax.Array) and not x.is_fully_addressable for x in arrays
  )


def gather(x: jax.Array) -> jax.Array:
  """Return an array, whole on each device if it was split over processes.

  Raises:
    ValueError: such an array has no NamedSharding.
  """
  if not is_split([x]):
    return x
  mesh = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
  if mesh is None:
    raise ValueError(
      f"an array over several processes has the sharding {x.sharding}: "
      "expected a NamedSharding"
    )
  whole = NamedSharding(mesh, PartitionSpec())
  return _whole_on_each_device(whole)(x)


@functools.lru_cache(maxsize=8)
def _whole_on_each_device(sharding: NamedSharding) -> Callable[[Any], Any]:
  """Return one function a mesh, so that jax compiles once for each shape."""
  return jax.jit(lambda x: x, out_shardings=sharding)


@contextlib.contextmanager
def failing_together(together: bool) -> Iterator[None]:
  """Raise an error in every process if the context fails in one of them.

  Args:
    together: whether all processes run the context. Otherwise nothing is
      exchanged.

  Raises:
    OtherProcessFailed: the context failed in another process.
  """
  if not together:
    yield
    return
  error = None
  try:
    yield
  except Exception as found:  # noqa: BLE001 - raised below, after the exchange
    error = found
  # Imported when needed: the module takes long to import.
  from jax.experimental import multihost_utils

  failed = multihost_utils.process_allgather(np.array(error is not None))
  if error is not None:
    raise error
  if failed.any():
    raise OtherProcessFailed(
      f"process {np.flatnonzero(failed)[0]} of {jax.process_count()} failed: "
      "its own output says why"
    )
