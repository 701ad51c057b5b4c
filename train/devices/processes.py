"""Several processes that train one run together (`--distributed`).

    off             one process
    auto            jax finds the others: SLURM, Cloud TPU, Kubernetes, Open MPI
    HOST:PORT,N,I   process I of N; process 0 listens at HOST:PORT

Each process has one host of a TPU slice, or the GPUs that it sees.
"""

import re

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np


def start(how: str) -> None:
  """Join the other processes; call it before any other use of jax.

  Args:
    how: "off", "auto" or "HOST:PORT,N,I".

  Raises:
    ValueError: `how` is none of these, or the other processes were not found.
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
  """Return whether `ok` is True in every process; all must call it."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.bool_(ok))))


def from_first(text: str) -> str:
  """Return the text that the first process gives; all must call it.

  Args:
    text: at most 1,024 bytes in UTF-8. Only that of the first process counts.
  """
  if jax.process_count() == 1:
    return text
  padded = np.zeros(1024, np.uint8)
  data = np.frombuffer(text.encode(), np.uint8)
  padded[: len(data)] = data
  found = np.asarray(multihost_utils.broadcast_one_to_all(padded))
  return found.tobytes().rstrip(b"\0").decode()


class Vote:
  """Agree on the largest number that any process names.

  Args:
    mesh: the mesh of all processes.
  """

  def __init__(self, mesh: Mesh):
    self._size = mesh.size
    self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._most = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def cast(self, number: int) -> jax.Array:
    """Return the largest number, as an array that is computed later.

    Every process calls it, in the same order.
    """

    def mine(index: object) -> np.ndarray:
      return np.full(1, number, np.int32)

    return self._most(
      jax.make_array_from_callback((self._size,), self._each, mine)
    )
