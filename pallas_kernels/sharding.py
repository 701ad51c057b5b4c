"""Which mesh axes split an operator's arrays, and how parts run on devices."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import devices

# A mesh axis, or several that split one array axis together; None: no axis.
Axis = str | tuple[str, ...] | None

# How `map_over_mesh` splits an array over the devices:
#   "tokens"          (B, T, ·) by rows and time
#   "token_channels"  (B, T, D) by rows, time and channels
#   "channels"        (D,) by channels, as a "token_channels" array's last axis
#   "whole"           not at all: every device has the whole array
Placement = Literal["tokens", "token_channels", "channels", "whole"]


@dataclasses.dataclass(frozen=True)
class ShardAxes:
  """The axes of the ambient mesh that split an operator's arrays.

  The ambient mesh is that of `jax.set_mesh`. An axis of size 1, or None, splits
  nothing.
  """

  #: Mesh axes that split the batch.
  batch: Axis = None
  #: Mesh axes that split the heads, and channels where there are no heads.
  heads: Axis = None
  #: Mesh axes that split the time: each device holds a slice of every row.
  time: Axis = None

  def __post_init__(self) -> None:
    for field in ("batch", "heads", "time"):
      axis = getattr(self, field)
      if not all(isinstance(name, str) for name in _names(axis)):
        raise ValueError(
          f"ShardAxes.{field}={axis!r}: expected the name of a mesh axis, a "
          "tuple of names, or None"
        )

  def check(
    self, batch: int | None, heads: int | None, time: int | None
  ) -> None:
    """Raise ValueError if the ambient mesh does not fit these sizes.

    Args:
      batch: number of rows; None where any number will do.
      heads: number of heads; None likewise.
      time: tokens of a row; None likewise.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
      raise ValueError(f"axes={self}: there is no mesh; use jax.set_mesh(mesh)")
    used: set[str] = set()
    for field, size in (("batch", batch), ("heads", heads), ("time", time)):
      axis = getattr(self, field)
      for name in _names(axis):
        if name not in mesh.shape:
          raise ValueError(
            f"axes.{field}={axis!r}: the mesh has the axes "
            f"{tuple(mesh.shape)}, not {name!r}"
          )
        if name in used:
          raise ValueError(f"axes={self} uses the mesh axis {name!r} twice")
        used.add(name)
      devices = self.devices(axis)
      if size is not None and size % devices:
        raise ValueError(
          f"axes.{field}={axis!r} splits {size} over {devices} devices: "
          f"expected a multiple of {devices}"
        )

  def devices(self, axis: Axis) -> int:
    """Return how many devices of the ambient mesh these axes split over.

    Args:
      axis: one of this record's three fields.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _names(axis))

  def are_alone(self, *axes: Axis) -> bool:
    """Whether the ambient mesh splits nothing but by these axes."""
    names = {name for axis in axes for name in _names(axis)}
    sizes = jax.sharding.get_abstract_mesh().shape
    return all(size == 1 for name, size in sizes.items() if name not in names)

  def bt_names(self) -> tuple[str, ...]:
    """Return the names of the mesh axes that split batch or time."""
    return *_names(self.batch), *_names(self.time)

  def btx(self) -> PartitionSpec:
    """Return the layout of (B, T, H, ·) arrays."""
    return PartitionSpec(self.batch, self.time, self.heads)

  def bt(self) -> PartitionSpec:
    """Return the layout of (B, T) arrays, and of (B, T, ·) with whole rows."""
    return PartitionSpec(self.batch, self.time)

  def state(self) -> PartitionSpec:
    """Return the layout of a recurrent state's (B, H, ·, ·) arrays."""
    return PartitionSpec(self.batch, self.heads)

  def before(self) -> PartitionSpec:
    """Return the layout of (N, B, H, ·) arrays, N time slices or chunks.

    An implementation keeps in them what the tokens before each slice sum to.
    """
    return PartitionSpec(self.time, self.batch, self.heads)


def check_axes(
  axes: ShardAxes | None,
  batch: int | None = None,
  heads: int | None = None,
  time: int | None = None,
) -> None:
  """Check an operator's argument `axes`; the sizes are as in `ShardAxes.check`.

  Raises:
    ValueError: it is neither None nor a ShardAxes, or the ambient mesh lacks an
      axis or does not fit the sizes.
  """
  if axes is None:
    return
  if not isinstance(axes, ShardAxes):
    raise ValueError(f"axes={axes!r}: expected None or a ShardAxes")
  axes.check(batch, heads, time)


def unsplit_axes() -> tuple[str, ...]:
  """Return the Auto axes of the ambient mesh that several devices are on.

  Nobody has said what they split. A kernel is one operation to XLA, which would
  run the whole of it on each of these devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto and mesh.shape[name] > 1
  )


def axes_of(*trees: Any) -> frozenset[str]:
  """Return the mesh axes that any of the arrays varies over.

  They are axes of a `jax.shard_map` around the call; outside one there are
  none.
  """
  leaves = jax.tree.leaves(trees)
  return frozenset().union(*map(devices.varying_axes, leaves))


def vary_alike(*trees: Any) -> tuple[Any, ...]:
  """Return the same values, all cast to vary over the same mesh axes.

  Inside a `jax.shard_map` that checks what varies, a derivative of our own must
  return cotangents that vary as their inputs do. With inputs that vary alike
  that is automatic, and jax inserts the sums in the cast's transpose.
  """
  names = axes_of(*trees)

  def vary(x: Array) -> Array:
    missing = tuple(sorted(names - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, trees)


def map_over_mesh(
  run: Callable[..., Any],
  axes: ShardAxes | None,
  *,
  inputs: Any,
  outputs: Any,
) -> Callable[..., Any]:
  """Return a function that runs `run` on each device's part of its arrays.

  Args:
    run: works on the part of one device, and may use `sum_over_tokens`.
    axes: the mesh axes that split the arrays; None: `run` takes them whole.
    inputs: a tree of the arguments' structure with a `Placement` an array. The
      first array has the tokens: (B, T, ·).
    outputs: a tree of the results' structure, likewise.

  Raises:
    ValueError: when called, if the mesh does not fit the batch and the time.
  """
  if axes is None:
    return run
  specs: dict[Placement, PartitionSpec] = {
    "tokens": axes.bt(),
    "token_channels": axes.btx(),
    "channels": PartitionSpec(axes.heads),
    "whole": PartitionSpec(),
  }
  in_specs, out_specs = jax.tree.map(specs.__getitem__, (inputs, outputs))
  split = jax.shard_map(
    run,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,  # jax does not know what a kernel's results vary over
  )

  def checked(*arrays):
    rows, time, *_ = jax.tree.leaves(arrays)[0].shape
    axes.check(rows, None, time)
    return split(*arrays)

  return checked


def flatten_tokens(x_BTD: Array) -> Array:
  """Return (R, D): one row a token, R = B · T."""
  return x_BTD.reshape(-1, x_BTD.shape[-1])


def sum_over_tokens(sums: Any, axes: ShardAxes | None) -> Any:
  """Return sums over the tokens of all devices, inside `map_over_mesh`'s run.

  Args:
    sums: a tree of sums over one device's tokens.
    axes: the mesh axes of the map; None: one device has all tokens.
  """
  return sums if axes is None else jax.lax.psum(sums, axes.bt_names())


def _names(axis: Axis) -> tuple[str, ...]:
  if axis is None:
    return ()
  return axis if isinstance(axis, tuple) else (axis,)
