"""Matrix products of the TPU kernels, with float32 sums.

Operands have the call's dtype. Where one of them is float32 by nature, as KK
is, it is split into three bfloat16 numbers, so that the product stays exact.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu.call import Call

_BFLOAT16_BITS = 0xFFFF0000  # the bits of a float32 that bfloat16 keeps


def dot(a: Array, b: Array, over: tuple[int, int], call: Call) -> Array:
  """Multiply two matrices, summed over one axis of each, in float32."""
  is_float32 = call.dtype == "float32"
  return jax.lax.dot_general(
    a.astype(call.dtype),
    b.astype(call.dtype),
    (((over[0],), (over[1],)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=(
      jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT
    ),
  )


def dot_exact_left(a: Array, b: Array, call: Call) -> Array:
  """Multiply a (M, K), kept in float32, by b (K, C) in the call's dtype."""
  if call.dtype == "float32":
    return dot(a, b, (1, 0), call)
  b = b.astype(call.dtype)
  return dot(
    jnp.concatenate(_split(a), 1), jnp.concatenate([b] * 3), (1, 0), call
  )


def dot_exact_right(a: Array, b: Array, call: Call) -> Array:
  """Sum a (M, C), kept in float32, times b (K, C) over C; returns (M, K)."""
  if call.dtype == "float32":
    return dot(a, b, (1, 1), call)
  M = a.shape[0]
  y = dot(jnp.concatenate(_split(a)), b, (1, 1), call)
  return y[:M] + y[M : 2 * M] + y[2 * M :]


def _split(x: Array) -> list[Array]:
  """Split float32 into three bfloat16 arrays whose sum it is."""
  pieces = []
  for _ in range(3):
    # Cut the bits off. A cast would round, and the compiler may remove a cast
    # to bfloat16 and back.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(
      _BFLOAT16_BITS
    )
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    pieces.append(high.astype(jnp.bfloat16))
    x = x - high
  return pieces
