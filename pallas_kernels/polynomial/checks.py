"""Checks of the public functions' arguments.

Every ValueError names the argument, its shape or value, and what was expected.
"""

import math
import numbers

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.spec import Coefficients
from pallas_kernels.polynomial.state import State, zero_state
from pallas_kernels.sharding import axes_of

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
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  for name, value in (("scale", scale), ("eps", eps)):
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
      raise ValueError(f"{name}={value!r}: expected a finite Python number")
  if eps < 0:
    raise ValueError(f"eps={eps}: expected a number ≥ 0")
  return Kernel(coefficients.scaled(float(scale)), float(eps))


def arrays(
  q: Array,
  k: Array,
  v: Array,
  qk_form: str,
  v_form: str,
  rank: int,
  names: str = "qkv",
) -> None:
  """Check the shapes and dtypes of queries, keys and values.

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


def sequences(
  q: Array, k: Array, v: Array, segment_ids: Array | None, names: str = "qkv"
) -> None:
  """Check (B, T, H, ·) queries, keys and values, and their segment ids.

  Raises:
    ValueError: an array does not fit; the message names it.
  """
  arrays(q, k, v, "(B, T, H, F)", "(B, T, H, P)", 4, names)
  if segment_ids is None:
    return
  if segment_ids.shape != q.shape[:2]:
    raise ValueError(
      f"segment_ids has shape {segment_ids.shape}: expected (B, T) = "
      f"{q.shape[:2]}"
    )
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(f"segment_ids is {segment_ids.dtype}: expected integers")


def state(
  argument: str,
  state: State,
  B: int,
  H: int,
  F: int,
  P: int,
  coefficients: Coefficients,
  dtype: jax.typing.DTypeLike,
) -> None:
  """Check a recurrent state against the sizes of q and v.

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
  expected = jax.eval_shape(
    lambda: zero_state(B, H, F, P, coefficients=coefficients, dtype=dtype)
  )
  for field, x, want in zip(State._fields, state, expected, strict=True):
    if (x.shape, x.dtype) != (want.shape, want.dtype):
      raise ValueError(
        f"{argument}.{field} is {x.dtype}{x.shape}: expected "
        f"{want.dtype}{want.shape} for B={B}, H={H}, F={F}, P={P}, "
        f"{coefficients}"
      )


def query_positions(q: Array, k: Array, positions: Array) -> None:
  """Check the (B, M) positions of M queries among T keys.

  Raises:
    ValueError: an array does not fit; the message names it.
  """
  B, _, H, F = k.shape
  if q.ndim != 4 or (q.shape[0], *q.shape[2:]) != (B, H, F):
    raise ValueError(f"q has shape {q.shape}: expected {(B, 'M', H, F)}")
  if q.dtype != k.dtype:
    raise ValueError(f"q is {q.dtype}: expected k's dtype, {k.dtype}")
  if positions.shape != q.shape[:2]:
    raise ValueError(
      f"positions has shape {positions.shape}: expected (B, M) = {q.shape[:2]}"
    )
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise ValueError(f"positions is {positions.dtype}: expected integers")


def outside_checked_shard_map(implementation: str, q: Array) -> None:
  """Check that no `jax.shard_map` around the call checks what arrays vary over.

  jax does not know over which mesh axes a kernel's results vary, so that their
  gradients would be wrong there.

  Raises:
    NotImplementedError: the call is inside such a `jax.shard_map`.
  """
  if varies := axes_of(q):
    raise NotImplementedError(
      f"implementation={implementation!r} inside a jax.shard_map over "
      f"{sorted(varies)} that checks what arrays vary over: expected "
      "check_vma=False there, or axes=ShardAxes(...) instead of the shard_map"
    )
