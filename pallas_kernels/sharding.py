"""Which mesh axes split an operator's arrays, and how its parts run on them."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from pallas_kernels import devices

Axis = str | tuple[str, ...] | None


def _names(axis: Axis) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else axis or ()


@dataclasses.dataclass(frozen=True)
class ShardAxes:
  """Which axes of the ambient mesh split the batch, the heads and the time.

  The mesh is the one of `jax.set_mesh`; None splits nothing.
  """

  batch: Axis = None
  heads: Axis = None
  time: Axis = None

  def check(self, batch: int, heads: int | None, time: int) -> None:
    """Raises ValueError where the ambient mesh does not fit the sizes.

    Args:
      batch: rows.
      heads: None of what has no heads.
      time: tokens of a row.
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
    """How many devices of the ambient mesh one of the three splits over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _names(axis))

  def are_alone(self, *axes: Axis) -> bool:
    """Whether only these of the three split anything on the ambient mesh."""
    names = {name for axis in axes for name in _names(axis)}
    sizes = jax.sharding.get_abstract_mesh().shape
    return all(size == 1 for name, size in sizes.items() if name not in names)

  def bt_names(self) -> tuple[str, ...]:
    """The mesh's axes that split batch or time."""
    return *_names(self.batch), *_names(self.time)

  def btx(self) -> PartitionSpec:
    """Of (B, T, H, ·) arrays."""
    return PartitionSpec(self.batch, self.time, self.heads)

  def bt(self) -> PartitionSpec:
    """Of (B, T) arrays."""
    return PartitionSpec(self.batch, self.time)

  def state(self) -> PartitionSpec:
    """Of a state's (B, H, ·, ·) arrays."""
    return PartitionSpec(self.batch, self.heads)

  def before(self) -> PartitionSpec:
    """Of what an implementation keeps of the tokens before a device's."""
    return PartitionSpec(self.time, self.batch, self.heads)


def axes_of(*trees: Any) -> frozenset[str]:
  """The axes that any of the arrays varies over; outside none."""
  leaves = jax.tree.leaves(trees)
  return frozenset().union(*map(devices.varying_axes, leaves))


def vary_alike(*trees: Any) -> tuple[Any, ...]:
  """The same values, each varying over all that any of them varies over."""
  names = axes_of(*trees)

  def vary(x: Array) -> Array:
    missing = tuple(sorted(names - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, trees)


def map_over_mesh(
  run: Callable[..., Any], axes: ShardAxes | None, *, inputs: Any, outputs: Any
) -> Callable[..., Any]:
  """`run` of each device's part of arrays over the ambient mesh.

  Args:
    run: works on the part of one device, and may use `sum_over_tokens`.
    axes: the mesh axes that split the arrays; None: `run` takes them whole.
    inputs: a letter for each array, "r": of tokens, (B, T, ·); "c": likewise,
      of channels that the axes of heads split; "p": the parameter (channels,)
      of a "c"; "w": whole on every device.
    outputs: likewise.

  The first array is of tokens. ValueError where the mesh does not fit it.
  """
  if axes is None:
    return run
  specs = {
    "r": axes.bt(),
    "c": axes.btx(),
    "p": jax.P(axes.heads),
    "w": jax.P(),
  }
  in_specs, out_specs = jax.tree.map(specs.__getitem__, (inputs, outputs))
  split = jax.shard_map(
    run, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )

  def checked(*arrays):
    rows, time, *_ = jax.tree.leaves(arrays)[0].shape
    axes.check(rows, None, time)
    return split(*arrays)

  return checked


def flatten_tokens(x_BTD: Array) -> Array:
  """(R, D), R = B T."""
  return x_BTD.reshape(-1, x_BTD.shape[-1])


def sum_over_tokens(sums: Any, axes: ShardAxes | None) -> Any:
  """In `run`: sums of a device's tokens, summed over all that split tokens."""
  return sums if axes is None else jax.lax.psum(sums, axes.bt_names())
