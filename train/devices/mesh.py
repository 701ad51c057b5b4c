"""The mesh of devices that a run computes on.

    data      splits the rows of the batch; every device has all parameters
    fsdp      splits rows too, and the parameters and optimiser state
    context   splits the tokens of a row
    tensor    splits heads, MLP and vocabulary

Neighbouring devices are along the last axes, which exchange the most.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rebased_jax import ShardAxes
from rebased_jax.config_checks import make_scalars_plain
from rebased_jax.field_types import fits
from train.data.checks import require
from train.devices import backend

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Into how many parts the devices cut a run's arrays.

  The product of the four numbers is the number of devices. A resumed run may
  use another mesh.
  """

  #: Parts of the batch. None: all devices that the other axes leave.
  data: int | None = None
  #: Parts of the batch, the parameters and the optimiser state.
  fsdp: int = 1
  #: Parts of the heads, the MLP and the vocabulary.
  tensor: int = 1
  #: Parts of a row's tokens.
  context: int = 1

  def __post_init__(self):
    make_scalars_plain(self)
    for name in AXES:
      value = getattr(self, name)
      optional = value is None and name == "data"
      whole = fits(value, int)
      require(
        optional or (whole and value >= 1),
        f"mesh.{name}",
        value,
        "an integer ≥ 1",
      )

  def sizes(self, devices: int) -> dict[str, int]:
    """Return the number of devices along each axis.

    Args:
      devices: the number of all devices.

    Raises:
      ValueError: the product of the axes is not `devices`.
    """
    known = self.fsdp * self.context * self.tensor
    data = devices // known if self.data is None else self.data
    shown = " × ".join(
      f"{name} {getattr(self, name)}"
      for name in AXES
      if getattr(self, name) is not None
    )
    verb = "divides" if self.data is None else "is"
    there = (
      f"the {devices} devices" if devices > 1 else "1, as there is 1 device"
    )
    require(
      data * known == devices, "mesh", shown, f"a product that {verb} {there}"
    )
    return dict(
      data=data, fsdp=self.fsdp, context=self.context, tensor=self.tensor
    )


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
    f"a multiple of {devices} devices × accumulate={accumulate}",
  )
  context = mesh.shape["context"]
  require(
    length % context == 0,
    "data.length",
    length,
    f"a multiple of mesh.context={context}",
  )
