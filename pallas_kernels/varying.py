"""What arrays vary over, in a `jax.shard_map` that checks it (`check_vma`).

There jax sums a gradient over the devices that a value is whole on, where the
value is made to vary. What defines a derivative of its own, and the carry of a
scan, have to be told so.
"""

from typing import Any

import jax
from jax import Array

from pallas_kernels import _compat


def axes_of(*trees: Any) -> frozenset[str]:
  """The axes that any of the arrays varies over; outside none."""
  leaves = jax.tree.leaves(trees)
  return frozenset().union(*map(_compat.varying_axes, leaves))


def alike(*trees: Any) -> tuple[Any, ...]:
  """The same values, each varying over all that any of them varies over."""
  names = axes_of(*trees)

  def vary(x: Array) -> Array:
    missing = tuple(sorted(names - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, trees)
