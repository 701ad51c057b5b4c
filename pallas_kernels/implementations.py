"""Which implementation computes a call, and checks of one with kernels."""

from collections.abc import Callable
from typing import Any, Literal
import warnings

import jax
from jax.sharding import AxisType

from pallas_kernels import devices
from pallas_kernels.plain_derivatives import are_plain
from pallas_kernels.sharding import ShardAxes, axes_of, unsplit_axes

#: What computes `selective_scan` and `wkv`.
Recurrence = Literal["xla", "gpu"]
RECURRENCES: tuple[Recurrence, ...] = ("xla", "gpu")


def chooses_kernels(
  operator: str,
  implementation: str | None,
  arrays: Any,
  why_not: Callable[[], str | None],
) -> bool:
  """Return whether the Hopper kernels compute a call of a recurrence.

  Without a name they do where the process has Hopper GPUs and they can do the
  call. `by_platform` then runs XLA's program where the call is lowered for
  another platform.

  Args:
    operator: the operator's name, for a warning.
    implementation: the name that the caller gave, or None.
    arrays: a tree of the operator's arrays.
    why_not: returns what the kernels cannot do of this call, or None. It is
      called only if this jax and the devices have the kernels.

  Raises:
    ValueError: there is no implementation of that name.
    NotImplementedError: the kernels were named, but this jax or these devices
      do not have them, each device of a mesh would run the whole of them, or
      `why_not` has a reason.
  """
  if implementation not in (None, *RECURRENCES):
    raise ValueError(
      f"implementation={implementation!r}: expected None or one of "
      f"{RECURRENCES}"
    )
  if implementation == "xla" or (implementation is None and are_plain()):
    return False
  if implementation is None and not devices.is_hopper():
    _warn_of_xla(operator, "the kernels need a Hopper GPU and jax ≥ 0.11")
    return False
  try:
    devices.check_named("gpu")
    check_split("gpu", None)
    outside_checked_shard_map("gpu", arrays)
    reason = why_not()
    if reason is not None:
      raise NotImplementedError(
        f"implementation='gpu' does not do {reason}; 'xla' does"
      )
  except NotImplementedError as error:
    if implementation is not None:
      raise
    _warn_of_xla(operator, error)
    return False
  return True


def _warn_of_xla(operator: str, reason: object) -> None:
  """Warn that "xla" runs where calls are expected to run on a GPU."""
  if devices.platform() == "gpu":
    warnings.warn(f"{operator} runs 'xla': {reason}", stacklevel=5)


def check_split(name: str, axes: ShardAxes | None) -> None:
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
      "run the whole batch on each device: pass axes=ShardAxes(...) or "
      "implementation='xla', or make the mesh with Explicit axes, which are "
      "jax's default"
    )


def outside_checked_shard_map(implementation: str, arrays: Any) -> None:
  """Check that no `jax.shard_map` around the call checks what arrays vary over.

  jax does not know over which mesh axes a kernel's results vary, so that their
  gradients would be wrong there.

  Args:
    implementation: the name of the kernels, for the message.
    arrays: a tree of the operator's arrays.

  Raises:
    NotImplementedError: the call is inside such a `jax.shard_map`.
  """
  if varies := axes_of(arrays):
    raise NotImplementedError(
      f"implementation={implementation!r} inside a jax.shard_map over "
      f"{sorted(varies)} that checks what arrays vary over: expected "
      "check_vma=False there, implementation='xla', or axes=ShardAxes(...) "
      "instead of the shard_map"
    )
