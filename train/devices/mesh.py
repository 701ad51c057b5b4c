"""Make the mesh of devices that a `MeshConfig` asks for; name its axes."""

from collections.abc import Sequence
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rebased_jax import ShardAxes
from train.data.checks import require
from train.devices import backend
from train.devices.mesh_config import MeshConfig as MeshConfig


def make_mesh(
  config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Return the mesh of a run.

  Args:
    config: the sizes of the axes. None: all devices along `data`.
    devices: None takes the devices of all processes.

  Raises:
    ValueError: the config does not fit the number of devices, or there are
      none.
  """
  devices = backend.devices() if devices is None else devices
  sizes = (config or MeshConfig()).sizes(len(devices))
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )


def shard_axes(mesh: Mesh, heads: int | None = None) -> ShardAxes:
  """Return the mesh axes that split batch, heads and time of activations.

  An axis of one device splits nothing. The batch always has an axis, so that
  the operators run on each device's own rows.

  Args:
    mesh: as `make_mesh` returns it.
    heads: the mixer's heads. They are not split if `tensor` does not divide
      them. None: the mixer has no heads, or they do not matter.
  """

  def used(*names: str) -> tuple[str, ...]:
    return tuple(name for name in names if mesh.shape[name] > 1)

  tensor, context = used("tensor"), used("context")
  if heads is not None and heads % mesh.shape["tensor"]:
    tensor = ()
  return ShardAxes(
    batch=used("data", "fsdp") or ("data",),
    heads=tensor[0] if tensor else None,
    time=context[0] if context else None,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding that puts a whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def _what_fits(rows: int, accumulate: int, devices: int) -> str:
  """Return options that are near the given ones, and that the devices take."""
  unit = devices * accumulate
  fewer, more = rows // unit * unit, -(-rows // unit) * unit
  options = [f"--batch {n}" for n in (fewer, more) if n]
  if rows % devices == 0:
    counts = [n for n in range(1, rows + 1) if rows % (devices * n) == 0]
    nearest = min(counts, key=lambda n: (abs(n - accumulate), -n))
    options = [f"--accumulate {nearest}", *options]
  return f"{' or '.join(options)} would fit"


def check_batch(rows: int, accumulate: int, length: int, mesh: Mesh) -> None:
  """Check that the devices divide rows and tokens evenly.

  Args:
    rows: rows of the global batch.
    accumulate: micro-batches of a batch.
    length: tokens of a row.
    mesh: as `make_mesh` returns it.

  Raises:
    ValueError: they do not.
  """
  devices = math.prod(mesh.shape[name] for name in ("data", "fsdp"))
  require(
    rows % (devices * accumulate) == 0,
    "batch",
    rows,
    f"a multiple of {devices} devices × accumulate={accumulate}; "
    + _what_fits(rows, accumulate, devices),
  )
  context = mesh.shape["context"]
  require(
    length % context == 0,
    "data.length",
    length,
    f"a multiple of mesh.context={context}",
  )
