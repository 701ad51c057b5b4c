"""Derivatives of any kind and order, such as forward mode and Hessians.

Most operators have a hand-written derivative, which keeps less memory than
jax's, or is a kernel. jax takes it in reverse mode only, and often once only.
Inside `plain_derivatives` the operators run as plain jax instead:

    with plain_derivatives():
      y, dy = jax.jvp(model, (tokens,), …)
"""

from collections.abc import Callable
import contextlib
from typing import Any

import jax

# jax compiles again where this changes.
_are_plain = jax.make_user_context(False)


def plain_derivatives() -> contextlib.AbstractContextManager[None]:
  """Return a context in which every operator is differentiated by jax itself.

  Operators then have derivatives of any kind and order. They run no kernel, and
  take more memory: polynomial attention that names no implementation runs
  "reference", which is quadratic in the length of a row. Values differ from
  those outside by rounding.

  Enter it around the call of `jax.jit` and of the derivative. What is compiled
  outside of it stays as it is.
  """
  return _are_plain(True)


def are_plain() -> bool:
  """Whether the call is inside `plain_derivatives`."""
  return _are_plain.value


class OwnDerivative:
  """A function with a hand-written derivative; `plain_derivatives` ignores it.

  Args:
    function: the function, of positional arguments.
    static: the places of its arguments that are no arrays.
    plain: takes the same arguments, and runs inside `plain_derivatives`. None:
      `function` itself, where jax can differentiate it.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    static: tuple[int, ...] = (),
    plain: Callable[..., Any] | None = None,
  ):
    self._plain = plain or function
    self._with_rule = jax.custom_vjp(function, nondiff_argnums=static)

  def defvjp(
    self, forward: Callable[..., Any], backward: Callable[..., Any]
  ) -> None:
    """Set the derivative, as `jax.custom_vjp.defvjp` does."""
    self._with_rule.defvjp(forward, backward)

  def __call__(self, *args: Any) -> Any:
    """Return the function's result."""
    return (self._plain if are_plain() else self._with_rule)(*args)
