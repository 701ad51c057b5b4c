"""Calls under a mesh whose axes are Explicit, as `jax.make_mesh` makes them.

Under Explicit axes an array's layout is part of its type, and every operation
must be able to say the layout of its result. The operators say it as a whole:
they compute under Auto axes, split as their first argument is, and the result's
type has that layout.

    q: float32[8@data,1024,12@tensor,16]
    o: float32[8@data,1024,12@tensor,64]
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.arguments import check_not_cut, plain_scalar
from pallas_kernels.compile_once import keep_programs
from pallas_kernels.sharding import Axis, ShardAxes

_P = ParamSpec("_P")
_R = TypeVar("_R")

Options = tuple[tuple[str, Any], ...]  # arguments by name


class Outputs(NamedTuple):
  """The layouts of a result's arrays."""

  structure: Any  # of the result, as `jax.tree.structure` returns it
  layouts: tuple[PartitionSpec, ...]

  @classmethod
  def of(cls, tree: Any, place: Callable[[Any], PartitionSpec]) -> "Outputs":
    """Return the layouts that `place` gives the leaves of a tree."""
    leaves, structure = jax.tree.flatten(
      tree, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return cls(structure, tuple(map(place, leaves)))


def explicit_axes() -> tuple[str, ...]:
  """Return the names of the ambient mesh's Explicit axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  )


def layout(x: Array) -> tuple[Axis, ...]:
  """Return which mesh axes split each axis of x, by its type.

  Args:
    x: an array, under a mesh with Explicit axes.
  """
  spec = tuple(jax.typeof(x).sharding.spec)
  return spec + (None,) * (x.ndim - len(spec))


@keep_programs(most=256)
def under_auto_axes(
  function: Callable[..., _R], outputs: Outputs, options: Options = ()
) -> Callable[..., _R]:
  """Return a function that computes with the Explicit axes as Auto ones.

  It is compiled, because the operations between the kernels would otherwise run
  one by one. The result is kept, so that a second call compiles nothing. For
  options without a hash it is not kept.

  Args:
    function: a function of arrays by name. It must not close over arrays.
    outputs: the structure and the layouts of its result.
    options: further arguments, which are not arrays: pairs of name and value.

  Returns:
    A function of a dict of arrays, or of trees of arrays, by name.
  """

  def run(arrays: dict[str, Any]) -> _R:
    return function(**arrays, **dict(options))

  specs = jax.tree.unflatten(outputs.structure, outputs.layouts)
  return jax.jit(jax.sharding.auto_axes(run, out_sharding=specs))


def on_any_mesh(
  letters: str, outputs: Any, *, of: str | None = None
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
  """Return a decorator that lets an operator run under Explicit axes.

  An argument `axes` that is None is read off the type of the leading array: its
  first three axes are batch, time and heads (or channels).

  Args:
    letters: of the leading array's axes, as "BTHF". "…": it has any shape.
    outputs: a tree of the result's structure with the letters of each array's
      axes. A letter is split as it is in the leading array; others are whole.
      "…": split as the leading array. Or a function of all arguments, by name,
      that returns such a tree.
    of: the name of the leading array. None: the first argument.
  """

  def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
    signature = inspect.signature(function)
    takes_axes = "axes" in signature.parameters

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
      if not explicit_axes():
        return function(*args, **kwargs)
      given = signature.bind(*args, **kwargs).arguments
      for name, x in given.items():
        check_not_cut(name, x)  # jax.jit cuts 64 bits before the call looks
      arrays = {name: x for name, x in given.items() if _has_arrays(x)}
      options = {
        # An array of one number is an option, such as eps.
        name: plain_scalar(x)
        for name, x in given.items()
        if name not in arrays
      }
      x = given.get(next(iter(given), "") if of is None else of)
      if not isinstance(x, Array) or (
        letters != "…" and x.ndim != len(letters)
      ):
        return function(*args, **kwargs)  # which says what is wrong
      spec = layout(x)
      if takes_axes:
        if options.get("axes") is None:
          options["axes"] = _axes_of(spec)
        axes = options["axes"]
        spec = (axes.batch, axes.time, axes.heads)[: x.ndim] + spec[3:]
      split = dict(zip(letters, spec, strict=False))

      def place(text: str) -> PartitionSpec:
        if text == "…":
          return PartitionSpec(*spec)
        return PartitionSpec(*(split.get(letter) for letter in text))

      tree = outputs(given) if callable(outputs) else outputs
      results = Outputs.of(tree, place)
      run = under_auto_axes(function, results, tuple(options.items()))
      return run(arrays)

    return call

  return decorate


def _has_arrays(x: Any) -> bool:
  """Whether x has arrays, which have axes; single numbers are none."""
  return any(getattr(leaf, "ndim", 0) for leaf in jax.tree.leaves(x))


def _axes_of(spec: tuple[Axis, ...]) -> ShardAxes:
  """Return the axes of a (B, T, H, ·) or (B, T, D) array's layout."""
  batch, time, heads, *_ = (*spec, None, None, None)
  return ShardAxes(batch=batch, time=time, heads=heads)
