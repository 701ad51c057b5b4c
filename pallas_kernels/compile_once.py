"""Compiling an operator once, also where it is called outside `jax.jit`.

A scan, a kernel or a `shard_map` whose body is a new function at each call is
compiled at each such call, and jax keeps every program.
"""

from collections.abc import Callable, Hashable
import functools
from typing import Any

import jax

from pallas_kernels import devices


def compile_once(
  function: Callable[..., Any], static: tuple[Hashable, ...], *arrays: Any
) -> Any:
  """Return function(*static, *arrays), compiled at the first such call.

  Inside `jax.jit` it is the plain call.

  Args:
    function: of a module, so that it is the same object at each call.
    static: its first arguments, which the program depends on.
    arrays: its other arguments, trees of arrays.
  """
  return _call(function, static, devices.program_key(), *arrays)


def compiled_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
  """Return the backward rule of a `custom_vjp`, made to compile once.

  Args:
    backward: takes the static arguments, what the forward kept, and the
      cotangents.
  """

  def rule(*arguments):
    *static, kept, cotangents = arguments
    return compile_once(backward, tuple(static), kept, cotangents)

  return rule


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _call(function, static, key, *arrays):
  del key  # it only tells programs apart
  return function(*static, *arrays)
