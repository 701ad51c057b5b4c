"""Checks of a call that names an implementation with kernels."""

from collections.abc import Callable
from typing import Literal

import jax
from jax import Array
from jax.sharding import AxisType

from pallas_kernels import devices
from pallas_kernels.sharding import ShardAxes, axes_of, unsplit_axes

#: What computes `selective_scan` and `wkv`.
Recurrence = Literal["xla", "gpu"]
RECURRENCES: tuple[Recurrence, ...] = ("xla", "gpu")


def check_kernels(
  implementation: str | None, x: Array, why_not: Callable[[], str | None]
) -> bool:
  """Return whether the Hopper kernels were named; check that they can run.

  Args:
    implementation: the name that the caller gave; None stands for "xla".
    x: the operator's first array.
    why_not: returns what the kernels cannot do of this call, or None.

  Raises:
    ValueError: there is no implementation of that name.
    NotImplementedError: this jax or these devices do not have the kernels, each
      device of a mesh would run the whole of them, or `why_not` has a reason.
  """
  if implementation not in (None, *RECURRENCES):
    raise ValueError(
      f"implementation={implementation!r}: expected None or one of "
      f"{RECURRENCES}"
    )
  if implementation != "gpu":
    return False
  devices.check_named("gpu")
  is_split("gpu", None)
  outside_checked_shard_map("gpu", x)
  reason = why_not()
  if reason is not None:
    raise NotImplementedError(
      f"implementation='gpu' does not do {reason}; 'xla' does"
    )
  return True


def is_split(name: str, axes: ShardAxes | None) -> None:
  """Check that a kernel does not run whole on every device of a mesh.

  On GPUs XLA splits it, if all axes of the mesh are Auto.

  Raises:
    NotImplementedError: the ambient mesh has several devices, and nothing says
      what they split.
  """
  names = () if axes is not None else unsplit_axes()
  is_partly_manual = (
    AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
  )
  if names and (name == "tpu" or is_partly_manual):
    raise NotImplementedError(
      f"implementation={name!r} under a mesh whose axes {names} are Auto would "
      "run the whole batch on each device: pass axes=ShardAxes(...), or make "
      "the mesh with Explicit axes, which are jax's default"
    )


def outside_checked_shard_map(implementation: str, q: Array) -> None:
  """Check that no `jax.shard_map` around the call checks what arrays vary over.

  jax does not know over which mesh axes a kernel's results vary, so that their
  gradients would be wrong there.

  Raises:
    NotImplementedError: the call is inside such a `jax.shard_map`.
  """
  if varies := axes_of(q):
    raise NotImplementedError(
      f"implementation={implementation!r} inside a jax.shard_map over "
      f"{sorted(varies)} that checks what arrays vary over: expected "
      "check_vma=False there, or axes=ShardAxes(...) instead of the shard_map"
    )
