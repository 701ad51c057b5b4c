"""Checks of the public functions' arguments: ValueError that names them."""

import math
import numbers

import jax
import jax.numpy as jnp

from pallas_kernels.polynomial import spec
from pallas_kernels.polynomial.passes import Kernel
from pallas_kernels.polynomial.spec import Coefficients, State
from pallas_kernels.sharding import axes_of

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def kernel(q, coefficients, scale, eps) -> Kernel:
  """The static part of a call."""
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
  q, k, v, qk_form: str, v_form: str, rank: int, names: str = "qkv"
) -> None:
  forms = (qk_form, qk_form, v_form)
  for name, x, form in zip(names, (q, k, v), forms, strict=True):
    if x.ndim != rank or 0 in x.shape:
      raise ValueError(f"{name} has shape {x.shape}: expected {form}, none 0")
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


def sequences(q, k, v, segment_ids, names: str = "qkv") -> None:
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


def state(argument, state, B, H, F, P, coefficients, dtype) -> None:
  if not isinstance(state, State):
    raise ValueError(
      f"{argument} is a {type(state).__name__}: expected a State"
    )
  expected = jax.eval_shape(
    lambda: spec.zero_state(B, H, F, P, coefficients=coefficients, dtype=dtype)
  )
  for field, x, want in zip(State._fields, state, expected, strict=True):
    if (x.shape, x.dtype) != (want.shape, want.dtype):
      raise ValueError(
        f"{argument}.{field} is {x.dtype}{x.shape}: expected "
        f"{want.dtype}{want.shape} for B={B}, H={H}, F={F}, P={P}, "
        f"{coefficients}"
      )


def unchecked(implementation: str, q) -> None:
  """NotImplementedError in a `jax.shard_map` that checks what q varies over.

  Of a kernel's results jax does not know it, and gradients would be wrong.
  """
  if varies := axes_of(q):
    raise NotImplementedError(
      f"implementation={implementation!r} inside a jax.shard_map over "
      f"{sorted(varies)} that checks what varies: expected check_vma=False "
      "there, or axes=ShardAxes(...) in place of it"
    )
