"""The mesh of devices that a run computes on.

    data      splits the rows of the batch; every device has all parameters
    fsdp      splits rows too, and the parameters and optimiser state
    context   splits the tokens of a row
    tensor    splits heads, MLP and vocabulary

Neighbouring devices are along the last axes, which exchange the most.
"""

import dataclasses

from rebased_jax.config_checks import make_scalars_plain
from rebased_jax.config_help import with_help
from rebased_jax.field_types import fits
from train.data.checks import require

AXES = ("data", "fsdp", "context", "tensor")


@with_help
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
