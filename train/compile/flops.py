"""Count the FLOPs of a function's matrix products, from its jaxpr.

    (…, m, k) · (…, k, n):  2 · … · m · n · k

A loop counts as often as it runs, and a kernel once for each step of its grid.
What a backward pass computes again counts again. Of the branches of a condition
the most expensive one counts. Of an operator's two forms the kernels count. A
`while` loop of unknown length counts once.
"""

from collections.abc import Iterator
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def of_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> int:
  """Return the FLOPs of all devices together.

  Raises:
    NotImplementedError: the function has a convolution.
  """
  total = 0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    total += _of_equation(equation)
  return total


def _of_equation(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * depth
  if name == "conv_general_dilated":
    raise NotImplementedError("FLOPs of a convolution are not counted")
  if name == "by_platform":  # not also the form for other platforms
    return of_jaxpr(params["kernel"])
  inner = [of_jaxpr(x) for x in _inside(params)]
  if name == "cond":
    return max(inner)
  return sum(inner) * _times(name, params)


def _times(name: str, params: dict[str, Any]) -> int:
  if name == "scan":
    return params["length"]
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if name == "shard_map":
    sizes = params["mesh"].shape
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  return 1


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
  for value in params.values():
    for x in jax.tree.leaves(value, is_leaf=_is_jaxpr):
      if _is_jaxpr(x):
        yield x


def _is_jaxpr(x: object) -> bool:
  return isinstance(x, Jaxpr | ClosedJaxpr)
