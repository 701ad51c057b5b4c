"""Check the fields of configs; each error names the class, field and value.

Configs are plain Python. jax is imported only for a value that needs it, so
that the command answers a wrong option at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import numbers
import typing

# A config takes what jax takes, and keeps its name: the command and stored
# configs know strings alone.
if typing.TYPE_CHECKING:
  import jax
  import jax.numpy as jnp

  DType = jax.typing.DTypeLike
  Precision = jax.lax.Precision | str
else:
  DType = str
  Precision = typing.Literal["default", "high", "highest"]

#: Dtypes that a model or a mixer can compute in, and keep parameters in.
DTYPES = ("float32", "bfloat16", "float16", "float64")
#: Precisions of float32 products, as `pallas_kernels.numerics` has them.
PRECISIONS = ("default", "high", "highest")

_LARGEST = 2**31 - 1  # size of an axis


def make_scalars_plain(config: object) -> None:
  """Replace NumPy and jax scalars in a config's fields by Python numbers.

  Options are part of compiled programs' keys and of stored configs. A jax
  scalar has no hash, and JSON knows neither.

  Args:
    config: a frozen dataclass that is being made.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if hasattr(value, "ndim"):  # of NumPy or jax
      from pallas_kernels.arguments import plain_scalar

      object.__setattr__(config, field.name, plain_scalar(value))


def keep_dtype_name(config: object, name: str) -> None:
  """Replace the dtype in a config's field by its name, and check it.

  Args:
    config: a frozen dataclass that is being made.
    name: the field; its value is a name, a type such as jnp.bfloat16, or the
      dtype of an array.

  Raises:
    ValueError: the field has another value.
  """
  value = dtype_name(getattr(config, name))
  object.__setattr__(config, name, value)
  check_one_of(config, name, *DTYPES)


def keep_precision_name(config: object, name: str) -> None:
  """Replace a jax.lax.Precision in a config's field by its name, and check it.

  Args:
    config: a frozen dataclass that is being made.
    name: the field; its value is a name, a jax.lax.Precision, or None.

  Raises:
    ValueError: the field has another value.
  """
  value = getattr(config, name)
  if isinstance(value, enum.Enum):
    object.__setattr__(config, name, value.name.lower())
  check_one_of(config, name, None, *PRECISIONS)


def check_positive(config: object, *names: str) -> None:
  """Check that each named field is an integer from 1 to 2³¹ − 1, or None.

  jax cannot describe an array with an axis of 2⁶³ or more.

  Raises:
    ValueError: a field has another value.
  """
  for name in names:
    value = getattr(config, name)
    if value is None:
      continue
    field = f"{type(config).__name__}.{name}={value!r}"
    if not is_positive_integer(value):
      raise ValueError(f"{field}: expected an integer ≥ 1")
    if value > _LARGEST:
      raise ValueError(f"{field}: expected at most {_LARGEST}")


def check_one_of(config: object, name: str, *allowed: str | None) -> None:
  """Check that a named field has one of the allowed values.

  Raises:
    ValueError: the field has another value.
  """
  value = getattr(config, name)
  if value not in allowed:
    known = tuple(x for x in allowed if x is not None)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    unset = "None or " if None in allowed else ""
    raise ValueError(
      f"{type(config).__name__}.{name}={value!r}: expected {unset}one of "
      f"{known}{hint}"
    )


def is_positive_integer(value: object) -> bool:
  """Whether a value is an integer ≥ 1. True and False are not integers here."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    return False
  return int(value) >= 1


def dtype_name(dtype: DType) -> str:
  """Return the name of a dtype, such as "bfloat16".

  Args:
    dtype: a name, a type such as jnp.bfloat16, or the dtype of an array. What
      is none of these is returned as text, which no check accepts.
  """
  if isinstance(dtype, str):
    return dtype
  import numpy as np

  if dtype is None:  # NumPy takes it for float64
    return "None"
  try:
    return np.dtype(dtype).name
  except TypeError:
    return repr(dtype)


def compute_dtype(dtype: DType, field: str = "dtype") -> jnp.dtype:
  """Return the dtype of a computation.

  Args:
    dtype: a name, a type such as jnp.bfloat16, or the dtype of an array.
    field: what messages call it.

  Raises:
    ValueError: it is not one of `DTYPES`, or it is float64 and
      `jax_enable_x64` is not set.
  """
  name = dtype_name(dtype)
  if name not in DTYPES:
    near = difflib.get_close_matches(name, DTYPES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{field}={name!r}: expected one of {DTYPES}{hint}")
  import jax
  import jax.numpy as jnp

  if name == "float64" and not jax.config.jax_enable_x64:
    raise ValueError(f"{field}='float64': expected jax_enable_x64 to be set")
  return jnp.dtype(name)
