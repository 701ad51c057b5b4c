"""Methods of modules under a mesh whose axes are Explicit.

A method computes under Auto axes, split as its leading array is, and the type
of its result has that layout. The parameters keep the layout of their types.
See `pallas_kernels.explicit_mesh`.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any, ParamSpec, TypeVar

from flax import nnx
import jax
from jax import Array
from jax.sharding import PartitionSpec
import numpy as np

from pallas_kernels import ShardAxes
from pallas_kernels.arguments import as_array, check_not_cut
from pallas_kernels.explicit_mesh import (
  Outputs,
  explicit_axes,
  layout,
  under_auto_axes,
)
from rebased_jax.argument_names import check_names

_P = ParamSpec("_P")
_R = TypeVar("_R")


def method_on_any_mesh(
  letters: str, outputs: Callable[[dict[str, Any]], Any]
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
  """Return a decorator that lets a module's method run under Explicit axes.

  An argument `axes` that is None is read off types: batch and time are split as
  those of the leading array, heads over the mesh axis that splits parameters
  but not the leading array, if there is one and it divides them. The module's
  `heads_to_split` is the number of its heads, or None.

  Args:
    letters: of the axes of the first argument after self, as "BTD".
    outputs: takes the arguments by name, and returns a tree of the result's
      structure: each array's letters, or a PartitionSpec. A letter is split as
      it is in the leading array; others are whole.
  """

  def decorate(method: Callable[_P, _R]) -> Callable[_P, _R]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
      check_names(method.__qualname__, kwargs, signature.parameters)
      if not explicit_axes():
        return method(*args, **kwargs)
      module, *given = signature.bind(*args, **kwargs).arguments.items()
      arguments = dict(given)
      for name, x in arguments.items():
        check_not_cut(name, x)  # jax.jit cuts 64 bits before the method looks
      first, x = next(iter(arguments.items()), ("", None))
      if isinstance(x, np.ndarray):
        x = arguments[first] = as_array(first, x)
      if not isinstance(x, Array) or x.ndim != len(letters):
        return method(*args, **kwargs)  # which says what is wrong
      graph, parameters = nnx.split(module[1])
      options = {"method": method, "graph": graph}
      if "axes" in signature.parameters:
        axes = arguments.pop("axes", None)
        if axes is None:
          axes = _axes(module[1].heads_to_split, parameters, layout(x))
        options["axes"] = axes
      split = dict(zip(letters, layout(x), strict=True))

      def place(text: str | PartitionSpec) -> PartitionSpec:
        if isinstance(text, PartitionSpec):
          return text
        return PartitionSpec(*(split.get(letter) for letter in text))

      results = Outputs.of(outputs(arguments), place)
      flags = {k: v for k, v in arguments.items() if isinstance(v, bool)}
      options |= {name: arguments.pop(name) for name in flags}
      run = under_auto_axes(_call_method, results, tuple(options.items()))
      return run({"parameters": parameters, "arguments": arguments})

    return call

  return decorate


def layouts(tree: Any) -> Any:
  """Return the PartitionSpec of each array of a tree, by its type."""
  return jax.tree.map(lambda x: PartitionSpec(*layout(x)), tree)


def _call_method(
  *,
  method: Callable[..., _R],
  graph: nnx.GraphDef,
  parameters: nnx.State,
  arguments: dict[str, Any],
  **options: Any,
) -> _R:
  return method(nnx.merge(graph, parameters), **arguments, **options)


def _axes(
  heads: int | None, parameters: nnx.State, spec: tuple[Any, ...]
) -> ShardAxes:
  """Return the mesh axes that split batch, heads and time, from types."""
  batch, time, *_ = (*spec, None)

  def names(axis: Any) -> set[str]:
    return {axis} if isinstance(axis, str) else set(axis or ())

  of_tokens = set().union(*map(names, spec))
  of_parameters = {
    name
    for x in jax.tree.leaves(parameters)
    for axis in layout(x)
    for name in names(axis)
  }
  others = sorted(of_parameters - of_tokens)
  sizes = jax.sharding.get_abstract_mesh().shape
  split = math.prod(sizes[name] for name in others)
  fits = len(others) == 1 and heads is not None and heads % split == 0
  return ShardAxes(batch=batch, time=time, heads=others[0] if fits else None)
