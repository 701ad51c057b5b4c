"""Checks of public functions' arguments: ValueError that names the argument.

Each check returns the argument in the one form that the operators work with: a
jax array, or a Python number or bool. NumPy arrays become jax arrays. NumPy
scalars and jax arrays of one number become Python numbers.

Shapes are tuples of sizes that are known and of letters that are free:
("B", "T", 48). A first entry "…" stands for any number of axes.
"""

import math
import numbers
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

Shape = tuple[int | str, ...]

_AN_ARRAY = "an array of jax or NumPy"


def float_array(
  name: str,
  x: Any,
  shape: Shape,
  *,
  like: tuple[str, Array] | None = None,
  nonempty: bool = False,
) -> Array:
  """Return x as an array; raise if its shape or dtype is not as expected.

  Args:
    name: the argument's name, for the message.
    x: the argument.
    shape: what is expected.
    like: name and array of an argument whose dtype x must have; None: any
      floating-point dtype.
    nonempty: refuse axes of size 0.

  Raises:
    ValueError: x is no array, or has another shape or dtype.
  """
  x = as_array(name, x)
  _check_shape(name, x, shape, nonempty=nonempty)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"{name} has dtype {x.dtype}: expected a float dtype")
  if like is not None and x.dtype != like[1].dtype:
    raise ValueError(
      f"{name} has dtype {x.dtype}: expected that of {like[0]}, {like[1].dtype}"
    )
  return x


def integer_array(name: str, x: Any, shape: Shape) -> Array:
  """Return x as an array of integers of at least 32 bits.

  Narrower integers become int32. Otherwise a size such as T or V could lie
  outside of their range, and a comparison with it would wrap.

  Raises:
    ValueError: x is no array, or has another shape or no integer dtype, or jax
      would cut its values.
  """
  check_not_cut(name, x)
  x = as_array(name, x)
  _check_shape(name, x, shape, nonempty=False)
  check_integers(name, x)
  if jnp.iinfo(x.dtype).bits >= 32:
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    return x.update(dtype=jnp.int32)
  return x.astype(jnp.int32)


def check_integers(name: str, x: Any) -> None:
  """Check that an argument is an array of integers. Booleans are not.

  Raises:
    ValueError: x is no array, or has another dtype.
  """
  if not hasattr(x, "dtype"):
    raise ValueError(f"{name} is {name_type(x)}: expected {_AN_ARRAY}")
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} has dtype {x.dtype}: expected integers")


def check_not_cut(name: str, x: Any) -> None:
  """Check that jax keeps the values of a NumPy array of integers.

  Without `jax_enable_x64` jax keeps the low 32 bits of 64 alone, so that two
  values could become one. Anything but a NumPy array of integers passes.

  Raises:
    ValueError: a value lies outside the range of the dtype that jax makes.
  """
  if not isinstance(x, np.ndarray) or x.dtype.kind not in "iu" or not x.size:
    return
  limits = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
  if limits.bits == np.iinfo(x.dtype).bits:
    return
  for value in (int(x.min()), int(x.max())):
    if not limits.min <= value <= limits.max:
      raise ValueError(
        f"{name} holds {value}: expected values of {limits.dtype}, {limits.min}"
        f" to {limits.max}; number them anew, or set jax_enable_x64"
      )


def as_array(name: str, x: Any) -> Array:
  """Return a jax array, also of a NumPy array.

  The shape and dtype of an array, a `jax.ShapeDtypeStruct`, is returned as it
  is: calls can be checked with it alone.

  Raises:
    ValueError: x is no array, such as None, a list or a number.
  """
  if isinstance(x, Array | jax.ShapeDtypeStruct):
    return x
  if isinstance(x, np.ndarray | np.generic) or hasattr(x, "__jax_array__"):
    try:
      return jnp.asarray(x)
    except TypeError as error:  # such as an array of strings
      raise ValueError(f"{name}: expected an array of numbers") from error
  raise ValueError(f"{name} is {name_type(x)}: expected {_AN_ARRAY}")


def number(name: str, value: Any) -> float:
  """Return a finite number as a Python float.

  Raises:
    ValueError: the value is no number, not finite, or known only inside jit.
  """
  found = plain_scalar(value)
  is_number = isinstance(found, numbers.Real) and not isinstance(found, bool)
  if not is_number or not math.isfinite(found):
    raise _wrong(name, value, "a finite Python number")
  return float(found)


def number_from_0(name: str, value: Any) -> float:
  """Return a finite number ≥ 0 as a Python float; raise ValueError if not."""
  found = number(name, value)
  if found < 0:
    raise ValueError(f"{name}={found!r}: expected a number ≥ 0")
  return found


def positive_integer(name: str, value: Any) -> int:
  """Return an integer ≥ 1 as a Python int; raise ValueError if it is none."""
  found = plain_scalar(value)
  if not isinstance(found, int) or isinstance(found, bool) or found < 1:
    raise _wrong(name, value, "an integer ≥ 1")
  return found


def flag(name: str, value: Any) -> bool:
  """Return True or False as a Python bool; raise ValueError if it is none."""
  found = plain_scalar(value)
  if not isinstance(found, bool):
    raise _wrong(name, value, "True or False")
  return found


def plain_scalar(value: Any) -> Any:
  """Return a NumPy or jax scalar as a Python number, anything else as it is."""
  is_array = isinstance(value, Array | np.ndarray | np.generic)
  if not is_array or isinstance(value, jax.core.Tracer) or value.ndim:
    return value
  return jax.device_get(value).item()


def name_type(x: object) -> str:
  """Return what an argument is, for messages: "None", or "a list"."""
  return "None" if x is None else f"a {type(x).__name__}"


def _wrong(name: str, value: Any, expected: str) -> ValueError:
  if isinstance(value, jax.core.Tracer):
    return ValueError(
      f"{name} is known only when the compiled program runs: expected "
      f"{expected}. Name it in jax.jit's static_argnames, or close over it"
    )
  return ValueError(f"{name}={value!r}: expected {expected}")


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
