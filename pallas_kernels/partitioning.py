"""Split kernels over a mesh whose Auto axes nobody assigned.

A kernel is one operation to XLA, which would run the whole of it on each
device. A rule tells XLA that rows and heads are independent, so each device
runs its own rows and heads, split as XLA has split the arrays.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

_ROWS, _HEADS = "B", "H"


def over_rows_and_heads(
  run: Callable[..., Any], patterns: Callable[[Any], list[str]]
) -> Callable[..., Any]:
  """Return `run`, which XLA splits over rows and heads.

  Args:
    run: a function of trees of arrays, whose results are trees of arrays. Each
      row and head of the results depends on that of the arguments alone.
    patterns: takes a tree of arrays. It returns one text for each array, with
      one character for each axis: "B" rows, "H" heads, another character an
      axis that is not split. The first array has both, and all have rows first.
  """

  def call(*trees):
    arrays, structure = jax.tree.flatten(trees)

    def flat(*arrays):
      return run(*jax.tree.unflatten(structure, arrays))

    shapes = jax.eval_shape(flat, *arrays)
    split = _split(
      lambda *arrays: tuple(jax.tree.leaves(flat(*arrays))),
      patterns(trees),
      patterns(shapes),
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), split(*arrays))

  return call


def run_by_name(
  run: Callable[[dict[str, Array]], dict[str, Array]],
  arrays: dict[str, Array],
  patterns: dict[str, str],
  *,
  by_xla: bool,
) -> dict[str, Array]:
  """Return run(arrays), which XLA splits over rows and heads if `by_xla`.

  Args:
    run: a function of arrays by name, as `over_rows_and_heads` takes it.
    arrays: its argument.
    patterns: the axes of each array of arguments and results, likewise.
    by_xla: whether XLA may split the arrays. If not, this is the plain call.
  """
  if not by_xla:
    return run(arrays)

  def of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [patterns[path[-1].key] for path, _ in leaves]

  return over_rows_and_heads(run, of)(arrays)


def _split(
  run: Callable[..., tuple[Array, ...]], inputs: list[str], outputs: list[str]
) -> Callable[..., tuple[Array, ...]]:
  """Return `run` on arrays that XLA splits as these patterns say."""

  def shardings(mesh, patterns, arguments):
    first = arguments[0]
    axes = dict(zip(inputs[0], first.sharding.spec, strict=False))
    sizes = dict(zip(inputs[0], first.shape, strict=True))
    # An axis that the devices do not divide stays whole.
    axes = {
      letter: axis if sizes[letter] % _devices(mesh, axis) == 0 else None
      for letter, axis in axes.items()
      if letter in (_ROWS, _HEADS)
    }
    return tuple(
      NamedSharding(mesh, PartitionSpec(*map(axes.get, pattern)))
      for pattern in patterns
    )

  def partition(mesh, arguments, results):
    del results
    found = (shardings(mesh, each, arguments) for each in (outputs, inputs))
    return mesh, run, *found

  def infer(mesh, arguments, results):
    del results
    return shardings(mesh, outputs, arguments)

  rule, whole = _rule(inputs, outputs)
  # Inside `jax.jit`, because the rule's function may have no constants.
  split = custom_partitioning(jax.jit(lambda *arrays: run(*arrays)))
  split.def_partition(
    partition,
    infer_sharding_from_operands=infer,
    sharding_rule=rule,
    need_replication_factors=whole,
  )
  split = custom_vmap(split)

  @split.def_vmap
  def map_rows(size, is_mapped, *arrays):
    """Join the mapped axis with the rows."""

    def join(x, mapped):
      if not mapped:
        x = jax.numpy.broadcast_to(x, (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    results = split(*map(join, arrays, is_mapped))
    results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
    return results, (True,) * len(results)

  return split


def _rule(inputs: list[str], outputs: list[str]) -> tuple[str, tuple[str, ...]]:
  """Return Shardy's text for the patterns, and the names of whole axes."""
  whole = []

  def names(pattern):
    for letter in pattern:
      if letter in (_ROWS, _HEADS):
        yield letter.lower()
      else:
        whole.append(f"x{len(whole)}")
        yield whole[-1]

  sides = (
    ", ".join(" ".join(names(pattern)) for pattern in patterns)
    for patterns in (inputs, outputs)
  )
  return " -> ".join(sides), tuple(whole)


def _devices(mesh: jax.sharding.Mesh, axis: Any) -> int:
  """Return how many devices an entry of a `PartitionSpec` splits over."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in names)
