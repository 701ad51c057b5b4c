"""Several processes, one run.

    off             one process
    auto            jax finds the others: SLURM, Cloud TPU, Kubernetes, Open MPI
    HOST:PORT,N,I   process I of N; process 0 listens at HOST:PORT

Each process is one host of a slice of TPUs, or has the GPUs that it sees.
"""

import re

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np


def start(how: str) -> None:
  """Joins the other processes; before anything else that jax does.

  Raises:
    ValueError: `how` is none of the three, or the others were not found.
  """
  if how == "off":
    return
  if how == "auto":
    try:
      jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
      line = str(error).splitlines()[0]
      raise ValueError(
        f"distributed='auto': jax found no other processes ({line}): expected "
        "SLURM, Cloud TPU, Kubernetes or Open MPI, or --distributed "
        "HOST:PORT,N,I"
      ) from error
    return
  found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", how)
  if found is None or not int(found[3]) < int(found[2]):
    raise ValueError(
      f"distributed={how!r}: expected off, auto, or HOST:PORT,N,I with I < N"
    )
  try:
    jax.distributed.initialize(found[1], int(found[2]), int(found[3]))
  except RuntimeError as error:
    line = str(error).splitlines()[0]
    raise ValueError(f"distributed={how!r}: {line}") from error


def all_processes(ok: bool) -> bool:
  """Whether `ok` holds in every process."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.bool_(ok))))


class Vote:
  """The largest number that a process has named, the same in all of them."""

  def __init__(self, mesh: Mesh):
    self._size = mesh.size
    self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._most = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def cast(self, number: int) -> jax.Array:
    """Starts to count; every process calls it, in the same order."""
    mine = lambda index: np.full(1, number, np.int32)
    return self._most(
      jax.make_array_from_callback((self._size,), self._each, mine)
    )
