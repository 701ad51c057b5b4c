"""Several processes that train one run together (`--distributed`).

    off             one process
    auto            jax finds the others: SLURM, Cloud TPU, Kubernetes, Open MPI
    HOST:PORT,N,I   process I of N; process 0 listens at HOST:PORT

Each process has one host of a TPU slice, or the GPUs that it sees.
"""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from train.devices.peers import Peers, Place
from train.timeouts import JOIN_TIMEOUT

# Packages whose versions decide what a run computes, writes and reads.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# jax's own search for dead processes aborts them; `Peers` is there before it.
_JAX_HEARTBEAT = 24 * 3600

# Of this process; jax's own state is global too.
_peers: Peers | None = None
_stopped_together = False


class PeerLost(RuntimeError):
  """Another process of the run has ended, so that this one cannot continue."""


def start(how: str, timeout: float = JOIN_TIMEOUT) -> None:
  """Join the other processes; call it before any other use of jax.

  Args:
    how: "off", "auto" or "HOST:PORT,N,I".
    timeout: seconds to wait for the other processes.

  Raises:
    ValueError: `how` is none of these, the port is taken, or the other
      processes have not come in time or have other versions.
  """
  global _peers
  if how == "off":
    return
  place, local = _find_cluster() if how == "auto" else (_parse(how), None)
  _peers = Peers(place, versions(), timeout)
  address = _peers.jax_address
  # It would drop the first SIGTERM that comes before training handles it.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      address,
      place.count,
      place.index,
      local,
      coordinator_bind_address=address,
      initialization_timeout=max(int(timeout), 1),
      heartbeat_timeout_seconds=_JAX_HEARTBEAT,
    )
  except RuntimeError as error:
    line = str(error).splitlines()[0]
    raise ValueError(f"distributed={how!r}: {line}") from error


def _parse(how: str) -> Place:
  found = re.fullmatch(r"([^,]+):(\d+),(\d+),(\d+)", how)
  if found is None or not int(found[4]) < int(found[3]):
    raise ValueError(
      f"distributed={how!r}: expected off, auto, or HOST:PORT,N,I with I < N"
    )
  port = int(found[2])
  if not 0 < port < 1 << 16:
    raise ValueError(f"distributed={how!r}: expected a port of 1 to 65535")
  return Place(found[1].strip("[]"), port, int(found[3]), int(found[4]))


def _find_cluster() -> tuple[Place, Sequence[int] | None]:
  """Return this process's place in a cluster, and its devices if it has few."""
  # jax has no public name for what `jax.distributed.initialize()` does first.
  from jax._src import clusters

  try:
    address, count, index, local = (
      clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, 60
      )
    )
  except (ValueError, RuntimeError, OSError, KeyError) as error:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(_no_cluster(line)) from error
  if address is None or count is None or index is None:
    raise ValueError(_no_cluster("no known cluster"))
  host, _, port = address.rpartition(":")
  return Place(host.strip("[]"), int(port), count, index), local


def _no_cluster(reason: str) -> str:
  return (
    f"distributed='auto': jax found no other processes ({reason}): expected "
    "SLURM, Cloud TPU, Kubernetes or Open MPI, or --distributed HOST:PORT,N,I"
  )


def versions() -> dict[str, str]:
  """Return the versions of Python and of the packages that a run uses."""
  return {"python": platform.python_version()} | {
    name: importlib.metadata.version(name) for name in _PACKAGES
  }


def are_several() -> bool:
  """Whether the run has more processes than this one."""
  return jax.process_count() > 1


def stop_together() -> None:
  """Note that all processes have come to the same end of a run."""
  global _stopped_together
  _stopped_together = True


def leave(code: int) -> None:
  """Tell the other processes that this one ends; call it last.

  If it has failed it ends here, because jax would wait for the others.

  Args:
    code: the exit code.
  """
  if _peers is None:
    return
  together = code == 0 or _stopped_together
  _peers.leave(0 if together else code)
  if not together:
    if sys.exception() is not None:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say_end(code: int) -> None:
  """Tell the other processes that this one is about to end with this code."""
  if _peers is not None:
    _peers.leave(code)


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
  """Turn the errors that follow the death of another process into its name.

  Raises:
    PeerLost: another process of the run has ended.
  """
  try:
    yield
  except Exception as error:
    # The connection to the process may close a moment after its devices'.
    loss = None if _peers is None else _peers.lost(seconds=3)
    if loss is None or (loss.code is not None and _is_own(error, loss.code)):
      raise
    raise PeerLost(f"{loss.what}; this process ends too") from error


def _is_own(error: Exception, code: int) -> bool:
  """Whether an error is no consequence of another process's exit.

  All processes refuse a run together, and all fail where a step is not finite.
  """
  module = type(error).__module__.partition(".")[0]
  return code == 2 or module == __name__.partition(".")[0]


def gather(value: Any) -> list[Any]:
  """Return the JSON value of every process, by its number; all must call it."""
  if jax.process_count() == 1:
    return [value]
  devices = collections.Counter(x.process_index for x in jax.devices())
  if len(set(devices.values())) > 1:
    raise ValueError(
      f"the processes have {list(devices.values())} devices, in their order: "
      "expected the same number each"
    )
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(data)] = data
  found = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(found, sizes, strict=True)
  ]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
  """Let a block fail in every process if it fails in one; all must enter it.

  Raises:
    ValueError: the block failed in another process, which the message names.
  """
  failure = None
  try:
    yield
  except Exception as error:  # noqa: BLE001  # raised below
    failure = error
  texts = gather(None if failure is None else str(failure))
  if failure is not None:
    raise failure
  for index, text in enumerate(texts):
    if text is not None:
      raise ValueError(f"refused by process {index}: {text}")


def check_alike(facts: dict[str, Any]) -> None:
  """Check that all processes give the same facts; all must call it.

  Args:
    facts: JSON values by name. A nested dict is compared value by value.

  Raises:
    ValueError: some differ; the message names them, and who has which.
  """
  each = [_flat(x) for x in gather(facts)]
  names = {name: None for x in each for name in x}
  different = [
    f"{name}: {_who_has(name, each)}"
    for name in names
    if any(x.get(name) != each[0].get(name) for x in each)
  ]
  if different:
    raise ValueError(
      f"the {len(each)} processes of this run differ in "
      f"{'; '.join(different)}: expected the same command, data and code in all"
    )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
  if not isinstance(value, dict):
    return {path: value}
  return {
    name: x
    for key, inner in value.items()
    for name, x in _flat(inner, f"{path}.{key}" if path else key).items()
  }


def _who_has(name: str, each: list[dict[str, Any]]) -> str:
  """Return each value of a fact with the processes that have it."""
  owners: dict[str, list[int]] = {}
  for index, facts in enumerate(each):
    shown = repr(facts[name]) if name in facts else "nothing"
    owners.setdefault(shown, []).append(index)
  return ", ".join(
    f"{shown} on process{'es' * (len(found) > 1)} "
    f"{', '.join(map(str, found[:8]))}{', …' * (len(found) > 8)}"
    for shown, found in owners.items()
  )


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
