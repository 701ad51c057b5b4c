"""Compiling an operator once, also where it is called outside `jax.jit`.

A scan, a kernel or a `shard_map` whose body is a new function at each call is
compiled at each such call, and jax keeps every program.
"""

from collections.abc import Callable, Hashable
import functools
from typing import Any, ParamSpec, TypeVar

import jax

from pallas_kernels import devices

_P = ParamSpec("_P")
_R = TypeVar("_R")


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


def keep_programs(most: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
  """Return a decorator that keeps the last results of a function.

  The function makes compiled programs. Dropping the oldest result frees its
  programs, so that their memory is bounded.

  Args:
    most: how many results are kept. None is kept for arguments without a hash,
      such as the structure of a user's module that has a list.
  """

  def decorate(make: Callable[_P, _R]) -> Callable[_P, _R]:
    kept = functools.lru_cache(maxsize=most)(make)

    @functools.wraps(make)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
      try:
        hash((args, tuple(kwargs.items())))
      except TypeError:
        return make(*args, **kwargs)
      return kept(*args, **kwargs)

    # Those of `functools.lru_cache`, for tests and to free memory.
    call.cache_clear = kept.cache_clear
    call.cache_info = kept.cache_info
    return call

  return decorate


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _call(function, static, key, *arrays):
  del key  # it only tells programs apart
  return function(*static, *arrays)
