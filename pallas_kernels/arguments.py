"""Checks of public functions' arguments: ValueError that names the argument.

Shapes are tuples of sizes that are known and of letters that are free:
("B", "T", 48). A first entry "…" stands for any number of axes.
"""

from typing import Any

from jax import Array
import jax.numpy as jnp

Shape = tuple[int | str, ...]


def check_floats(
  name: str,
  x: Array,
  shape: Shape,
  *,
  like: tuple[str, Array] | None = None,
  nonempty: bool = False,
) -> None:
  """Raise ValueError if x has another shape or no floating-point dtype.

  Args:
    name: the argument's name, for the message.
    x: the argument.
    shape: what is expected.
    like: name and array of an argument whose dtype x must have; None: any.
    nonempty: refuse axes of size 0.
  """
  _check_shape(name, x, shape, nonempty=nonempty)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"{name} has dtype {x.dtype}: expected a float dtype")
  if like is not None and x.dtype != like[1].dtype:
    raise ValueError(
      f"{name} has dtype {x.dtype}: expected that of {like[0]}, {like[1].dtype}"
    )


def check_integers(name: str, x: Array, shape: Shape) -> None:
  """Raise ValueError if x has another shape or no integer dtype."""
  _check_shape(name, x, shape, nonempty=False)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} has dtype {x.dtype}: expected integers")


def check_eps(eps: Any) -> None:
  """Raise ValueError if eps is no Python number ≥ 0."""
  if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
    raise ValueError(f"eps={eps!r}: expected a Python number ≥ 0")


def _check_shape(name: str, x: Array, shape: Shape, *, nonempty: bool) -> None:
  sizes, known = x.shape, shape
  if shape[0] == "…":
    known = shape[1:]
    sizes = sizes[len(sizes) - len(known) :] if x.ndim >= len(known) else ()
  fits = len(sizes) == len(known) and all(
    isinstance(want, str) or size == want
    for size, want in zip(sizes, known, strict=True)
  )
  if not fits or (nonempty and 0 in x.shape):
    form = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    none = ", no axis of size 0" if nonempty else ""
    raise ValueError(f"{name} has shape {x.shape}: expected {form}{none}")
