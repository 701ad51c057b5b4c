"""Checks of the public functions' arguments.

As in `pallas_kernels.arguments`, each check returns what it checked, as jax
arrays and Python numbers. Every ValueError names the argument, its shape or
value, and what was expected.
"""

import jax
from jax import Array

from pallas_kernels.arguments import (
  as_array,
  float_array,
  integer_array,
  number,
  number_from_0,
)
from pallas_kernels.polynomial.coefficients import Coefficients
from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.state import State, zero_state

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def kernel(
  q: Array, coefficients: Coefficients, scale: float | None, eps: float
) -> Kernel:
  """Check the static numbers of a call, and fold in the scale.

  Args:
    q: queries, of which the last axis is F.
    coefficients: of sim as a polynomial in scale · q·k.
    scale: None for F^(−1/2).
    eps: added to the denominator.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  if not isinstance(coefficients, Coefficients):
    raise ValueError(f"coefficients={coefficients!r}: expected Coefficients")
  scale = q.shape[-1] ** -0.5 if scale is None else number("scale", scale)
  return Kernel(coefficients.scaled(scale), number_from_0("eps", eps))


def arrays(
  q: Array,
  k: Array,
  v: Array,
  qk_form: str,
  v_form: str,
  rank: int,
  names: str = "qkv",
) -> tuple[Array, Array, Array]:
  """Check the shapes and dtypes of queries, keys and values; return all three.

  Args:
    q: queries.
    k: keys.
    v: values.
    qk_form: the expected shape of q and k, for messages.
    v_form: the expected shape of v, for messages.
    rank: the number of axes of each.
    names: one letter for each of the three, for messages.

  Raises:
    ValueError: an array does not fit; the message names it.
  """
  q, k, v = map(as_array, names, (q, k, v))
  forms = (qk_form, qk_form, v_form)
  for name, x, form in zip(names, (q, k, v), forms, strict=True):
    if x.ndim != rank or 0 in x.shape:
      raise ValueError(
        f"{name} has shape {x.shape}: expected {form}, and no axis of length 0"
      )
    if x.dtype not in _DTYPES or x.dtype != q.dtype:
      raise ValueError(
        f"{name} has dtype {x.dtype}, {names[0]} {q.dtype}: expected one "
        f"dtype of {', '.join(_DTYPES)}"
      )
  if k.shape != q.shape:
    raise ValueError(f"k has shape {k.shape}: expected q's, {q.shape}")
  if v.shape[:-1] != q.shape[:-1]:
    expected = (*q.shape[:-1], "P")
    raise ValueError(f"v has shape {v.shape}: expected {expected}")
  return q, k, v


def sequences(
  q: Array, k: Array, v: Array, segment_ids: Array | None, names: str = "qkv"
) -> tuple[Array, Array, Array, Array | None]:
  """Check (B, T, H, ·) queries, keys and values, and their segment ids.

  Returns:
    All four, as arrays.

  Raises:
    ValueError: an array does not fit; the message names it.
  """
  q, k, v = arrays(q, k, v, "(B, T, H, F)", "(B, T, H, P)", 4, names)
  if segment_ids is not None:
    segment_ids = integer_array("segment_ids", segment_ids, q.shape[:2])
  return q, k, v, segment_ids


def state(
  argument: str,
  state: State,
  B: int,
  H: int,
  F: int,
  P: int,
  coefficients: Coefficients,
  dtype: jax.typing.DTypeLike,
) -> State:
  """Check a recurrent state against the sizes of q and v; return its arrays.

  Args:
    argument: the name of the state's argument, for messages.
    state: what to check.
    B: rows.
    H: heads.
    F: the width of queries and keys.
    P: the width of values.
    coefficients: of sim; they decide which features there are.
    dtype: of q, k and v.

  Raises:
    ValueError: the state does not fit; the message names the field.
  """
  if not isinstance(state, State):
    raise ValueError(
      f"{argument} is a {type(state).__name__}: expected a State"
    )
  names = [f"{argument}.{field}" for field in State._fields]
  found = State(*map(as_array, names, state))
  expected = jax.eval_shape(
    lambda: zero_state(B, H, F, P, coefficients=coefficients, dtype=dtype)
  )
  for name, x, want in zip(names, found, expected, strict=True):
    if (x.shape, x.dtype) != (want.shape, want.dtype):
      raise ValueError(
        f"{name} is {x.dtype}{x.shape}: expected "
        f"{want.dtype}{want.shape} for B={B}, H={H}, F={F}, P={P}, "
        f"{coefficients}"
      )
  return found


def query_positions(
  q: Array, k: Array, positions: Array
) -> tuple[Array, Array]:
  """Check M queries and their (B, M) positions among T keys; return both.

  Raises:
    ValueError: an array does not fit; the message names it.
  """
  B, _, H, F = k.shape
  q = float_array("q", q, (B, "M", H, F), like=("k", k))
  return q, integer_array("positions", positions, q.shape[:2])
