"""Choose kernels where a program is lowered, not where Python traces it.

When Python traces a call, nobody knows where the program will run: its arrays
may lie on another device than the default one, and `jax.export` lowers one
program for several platforms. `by_platform` therefore traces both forms of a
call. Lowering keeps the form of its platform, so the compiled program has no
branch. `jax.lax.platform_dependent` cannot do it: where one program is lowered
for several platforms, it lowers every branch for all of them.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple
import warnings

import jax
from jax import Array
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp


class Kernels(NamedTuple):
  """The platforms that the kernels of an implementation run on.

  Attributes:
    name: the implementation's name, for messages.
    platforms: the platforms that its kernels lower for, by jax's names, such
      as ("cuda",).
    needs: the device that its kernels need, for messages.
  """

  name: str
  platforms: tuple[str, ...]
  needs: str


def by_platform(
  kernels: Kernels,
  kernel: Callable[..., Any],
  elsewhere: Callable[..., Any] | None,
  *arrays: Any,
  is_split: bool = False,
) -> Any:
  """Return kernel(*arrays) on the kernels' platforms, else elsewhere(*arrays).

  The result has no derivative; call it inside the rules of a `custom_vjp`.

  Args:
    kernels: where `kernel` runs.
    kernel: a function of the arrays.
    elsewhere: a function of the arrays with results of the same structure,
      shapes and dtypes. None: lowering for another platform raises
      NotImplementedError.
    arrays: trees of arrays.
    is_split: whether `kernel` itself splits its work over the devices of a
      mesh. If not, it runs where a program or a `jax.shard_map` has one device:
      XLA would run the whole kernel on each of several devices.

  Raises:
    TypeError: the results of the two functions differ in form.
  """
  flat, structure = jax.tree.flatten(arrays)

  def trace(function):
    def run(*flat):
      return function(*jax.tree.unflatten(structure, flat))

    return jax.make_jaxpr(run, return_shape=True)(*flat)

  kernel_jaxpr, shapes = trace(kernel)
  other_jaxpr = None
  if elsewhere is not None:
    other_jaxpr, other_shapes = trace(elsewhere)
    if _form(shapes) != _form(other_shapes):
      raise TypeError(
        f"the kernels of {kernels.name!r} return {shapes}, XLA's program "
        f"{other_shapes}: expected equal forms"
      )
  results = _by_platform_p.bind(
    *flat,
    kernels=kernels,
    kernel=kernel_jaxpr,
    elsewhere=other_jaxpr,
    is_split=is_split,
  )
  return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _form(tree: Any) -> tuple[Any, list[Any]]:
  """Return the structure of a tree, and shape and dtype of each array."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, [(x.shape, x.dtype) for x in leaves]


def forward_by_platform(
  kernels: Kernels,
  kernel: Callable[..., tuple[Any, Any]],
  elsewhere: Callable[..., Any] | None,
  *arrays: Any,
  is_split: bool = False,
) -> tuple[Any, Any]:
  """Return (results, kept), like `by_platform`, where only `kernel` keeps.

  Only the kernels know the form of what they keep for their backward pass. On
  other platforms it is NaN, and the backward pass must not read it.

  Args:
    kernels: where `kernel` runs.
    kernel: returns (results, kept).
    elsewhere: returns results. None: as in `by_platform`.
    arrays: trees of arrays.
    is_split: as in `by_platform`.
  """
  if elsewhere is None:
    return by_platform(kernels, kernel, None, *arrays, is_split=is_split)
  kept_types = []

  def kernel_noting_types(*arrays):
    results, kept = kernel(*arrays)
    kept_types.append(jax.tree.map(jax.typeof, kept))
    return results, kept

  def elsewhere_with_nans(*arrays):
    return elsewhere(*arrays), jax.tree.map(_unreadable, kept_types[0])

  return by_platform(
    kernels,
    kernel_noting_types,
    elsewhere_with_nans,
    *arrays,
    is_split=is_split,
  )


def backward_by_platform(
  kernels: Kernels,
  kernel: Callable[..., tuple[Any, ...]],
  elsewhere: Callable[..., Any] | None,
  arrays: tuple[Any, ...],
  kept: Any,
  cotangents: Any,
  *,
  is_split: bool = False,
) -> tuple[Any, ...]:
  """Return the gradients that belong to `forward_by_platform`.

  On other platforms the forward pass is computed again, by `elsewhere`, because
  it has kept nothing.

  Args:
    kernels: where `kernel` runs.
    kernel: returns the gradients of all arrays but the last, from
      (arrays, kept, cotangents).
    elsewhere: returns the results of the forward pass. None: as in
      `by_platform`.
    arrays: the arguments of the forward pass. The last one has no gradient.
    kept: what the forward pass kept.
    cotangents: of its results.
    is_split: as in `by_platform`.
  """

  def afresh(arrays, kept, cotangents):
    del kept
    *floats, last = arrays
    run = lambda *floats: elsewhere(*floats, last)
    return jax.vjp(run, *floats)[1](cotangents)

  return by_platform(
    kernels,
    kernel,
    None if elsewhere is None else afresh,
    arrays,
    kept,
    cotangents,
    is_split=is_split,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable_by_platform(
  kernels: Kernels,
  kernel: Callable[..., Any],
  elsewhere: Callable[..., Any] | None,
  *arrays: Any,
) -> Any:
  """Return `by_platform` of two functions that jax differentiates.

  On other platforms than the kernels' the backward pass runs the forward of
  `elsewhere` again.

  Args:
    kernels: where `kernel` runs.
    kernel: a function of the arrays, of a module, so that it is the same object
      at each call. It splits its work over devices itself.
    elsewhere: likewise; None: as in `by_platform`.
    arrays: trees of floating arrays.
  """
  return by_platform(kernels, kernel, elsewhere, *arrays, is_split=True)


def _forward_and_pull(kernels, kernel, elsewhere, *arrays):
  result, pull = forward_by_platform(
    kernels,
    lambda *arrays: jax.vjp(kernel, *arrays),
    elsewhere,
    *arrays,
    is_split=True,
  )
  return result, (pull, arrays)


def _pull(kernels, kernel, elsewhere, kept, cotangents):
  del kernel

  def pull_afresh(pull, arrays, cotangents):
    del pull
    return jax.vjp(elsewhere, *arrays)[1](cotangents)

  return by_platform(
    kernels,
    lambda pull, arrays, cotangents: pull(cotangents),
    None if elsewhere is None else pull_afresh,
    *kept,
    cotangents,
    is_split=True,
  )


differentiable_by_platform.defvjp(_forward_and_pull, _pull)


def _unreadable(like: Any) -> Array:
  """Return NaN, or zeros of an integer dtype, of an array's shape and dtype."""
  is_float = jnp.issubdtype(like.dtype, jnp.inexact)
  return jnp.full(like.shape, jnp.nan if is_float else 0, like.dtype)


_by_platform_p = core.Primitive("by_platform")
_by_platform_p.multiple_results = True


@_by_platform_p.def_effectful_abstract_eval
def _abstract(*avals, kernels, kernel, elsewhere, is_split):
  del avals, kernels, is_split
  effects = kernel.effects
  if elsewhere is not None:
    effects = effects | elsewhere.effects
  return list(kernel.out_avals), effects


@_by_platform_p.def_impl
def _run(*arrays, kernels, kernel, elsewhere, is_split):
  """Run without `jax.jit`, as under `jax.disable_jit`."""
  del is_split
  platform = next(iter(jnp.asarray(arrays[0]).devices())).platform
  platform = "cuda" if platform == "gpu" else platform
  chosen = _chosen(platform, kernels, kernel, elsewhere)
  return core.jaxpr_as_fun(chosen)(*arrays)


def _chosen(platform, kernels, kernel, elsewhere):
  if platform in kernels.platforms:
    return kernel
  if elsewhere is None:
    raise NotImplementedError(
      f"implementation={kernels.name!r} needs {kernels.needs}; this program is "
      f"lowered for {platform}: pass implementation=None or 'xla', or lower it "
      f"for {' or '.join(map(repr, kernels.platforms))}"
    )
  return elsewhere


def _lowering(platform: str) -> Callable[..., Any]:
  """Return the rule that lowers the primitive for one platform."""

  def lower(ctx, *arrays, kernels, kernel, elsewhere, is_split):
    chosen = _chosen(platform, kernels, kernel, elsewhere)
    count = 1 if is_split or chosen is not kernel else _devices(ctx)
    if count > 1:
      reason = (
        f"the kernels of {kernels.name!r} in a program for {count} devices "
        "would run whole on each: compute under jax.set_mesh(mesh), or pass "
        "axes=ShardAxes(...)"
      )
      if elsewhere is None:
        raise NotImplementedError(reason)
      warnings.warn(f"XLA's program runs: {reason}", stacklevel=2)
      chosen = elsewhere
    return mlir.lower_fun(core.jaxpr_as_fun(chosen))(ctx, *arrays)

  return lower


for _platform in ("cpu", "cuda", "rocm", "tpu"):
  mlir.register_lowering(
    _by_platform_p, _lowering(_platform), platform=_platform
  )
mlir.register_lowering(_by_platform_p, _lowering("another platform"))


def _devices(ctx) -> int:
  """Return how many devices would each run the whole of an operation."""
  context = ctx.module_context.axis_context
  # Elsewhere, as inside a `jax.shard_map`, an operation is on one device.
  is_whole = isinstance(context, mlir.ShardingContext)
  return context.num_devices if is_whole else 1


def _batched(arrays, axes, *, kernels, kernel, elsewhere, is_split):
  """Map both forms by `jax.vmap`."""

  def mapped(jaxpr):
    run = jax.vmap(core.jaxpr_as_fun(jaxpr), in_axes=tuple(axes))
    return jax.make_jaxpr(run)(*arrays)

  results = _by_platform_p.bind(
    *arrays,
    kernels=kernels,
    kernel=mapped(kernel),
    elsewhere=None if elsewhere is None else mapped(elsewhere),
    is_split=is_split,
  )
  return results, (0,) * len(results)


batching.primitive_batchers[_by_platform_p] = _batched


def _no_tangents(primals, tangents, *, kernels, **_):
  del primals, tangents
  raise NotImplementedError(
    f"forward mode, or a second derivative, through kernels of {kernels.name!r}"
    ": expected a first derivative in reverse mode; for others enter "
    "plain_derivatives() around the derivative"
  )


ad.primitive_jvps[_by_platform_p] = _no_tangents
