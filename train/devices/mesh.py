"""The mesh of devices that a run computes on.

    data      rows of the batch; parameters are on every device
    fsdp      rows of the batch too; parameters and optimiser state are split
    context   tokens of a row
    tensor    heads, MLP and vocabulary

The axes are in this order, so that neighbouring devices share the last ones,
which exchange the most.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from rebased_jax import ShardAxes
from train.data import batches

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many parts the devices of a run cut its arrays into.

  The product is the number of devices. Where a run goes on, it may be another.
  """

  data: int | None = None  # of the batch; None: all devices that remain
  fsdp: int = 1  # of the batch, the parameters and the optimiser's state
  tensor: int = 1  # of heads, MLP and vocabulary
  context: int = 1  # of a row's tokens

  def __post_init__(self):
    for name in AXES:
      value = getattr(self, name)
      optional = value is None and name == "data"
      whole = isinstance(value, int) and not isinstance(value, bool)
      batches.require(
        optional or (whole and value >= 1),
        f"mesh.{name}",
        value,
        "an integer ≥ 1",
      )

  def sizes(self, devices: int) -> dict[str, int]:
    """The devices along each axis.

    Raises:
      ValueError: their product is not `devices`; it names the numbers.
    """
    known = self.fsdp * self.context * self.tensor
    data = devices // known if self.data is None else self.data
    shown = " × ".join(
      f"{name} {getattr(self, name)}"
      for name in AXES
      if getattr(self, name) is not None
    )
    batches.require(
      data * known == devices,
      "mesh",
      shown,
      f"a product that {'divides' if self.data is None else 'is'} "
      + (
        f"the {devices} devices" if devices > 1 else "1, as there is 1 device"
      ),
    )
    return dict(
      data=data, fsdp=self.fsdp, context=self.context, tensor=self.tensor
    )


def make_mesh(
  config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh over `devices`, by default those of all processes.

  Raises:
    ValueError: the config does not fit their number.
  """
  devices = jax.devices() if devices is None else devices
  sizes = (config or MeshConfig()).sizes(len(devices))
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )


def shard_axes(mesh: Mesh, heads: int | None = None) -> ShardAxes:
  """What splits batch, heads and time of activations on this mesh.

  An axis of one device splits nothing. The batch always has an axis, so that
  the operator runs on each device's rows by itself.

  Args:
    mesh: of `make_mesh`.
    heads: of the mixer, which are not split where they do not divide.
  """
  several = lambda *names: tuple(x for x in names if mesh.shape[x] > 1)
  tensor, context = several("tensor"), several("context")
  if heads is not None and heads % mesh.shape["tensor"]:
    tensor = ()
  return ShardAxes(
    batch=several("data", "fsdp") or ("data",),
    heads=tensor[0] if tensor else None,
    time=context[0] if context else None,
  )


def check_batch(rows: int, accumulate: int, length: int, mesh: Mesh) -> None:
  """Raises ValueError where the devices do not divide rows or tokens evenly."""
  devices = math.prod(mesh.shape[name] for name in ("data", "fsdp"))
  batches.require(
    rows % (devices * accumulate) == 0,
    "batch",
    rows,
    f"a multiple of {devices} devices × accumulate={accumulate}",
  )
  context = mesh.shape["context"]
  batches.require(
    length % context == 0,
    "data.length",
    length,
    f"a multiple of mesh.context={context}",
  )
