"""Between the states of `spec.py` and those of the Hopper kernels.

    KVᵀ (B, heads, V, E)    KK (B, heads, V, F): 16 rows of k̃ k̃ᵀ, then Σ k twice

A state has the constant feature and Σ k twice, for the high and the low half
of a weight; a cotangent once, and its KK in the first tile of a head alone.
"""

import jax.numpy as jnp

from pallas_kernels.polynomial.gpu.tiles import CYCLIC, Call, F, V, times
from pallas_kernels.polynomial.state import State


def to_kernel(state: State, call: Call, *, cotangent: bool = False):
  """KVᵀ and KK of a state, or of a cotangent, which grows by `call.grow`."""
  kv, kk, E = state.kv_BHEP, state.kk_BHGG, CYCLIC * F
  parts = [kv[:, :, :E]]
  if call.c1:
    parts.append(kv[:, :, E : E + F])
    E += F
  if call.c0:
    constant = [kv[:, :, E:]] * (1 if cotangent else 2)
    parts += constant
  kv = jnp.concatenate(parts, axis=2).swapaxes(2, 3)
  kv = _grow(kv, V * call.tiles, call.E)
  kv = kv.reshape(call.B, call.heads, V, call.E)
  rows = [(kk[:, :, :F, :F] + kk[:, :, :F, :F].swapaxes(2, 3)) / 2]
  if kk.shape[-1] > F:
    line = kk[:, :, F:, :F] + kk[:, :, :F, F:].swapaxes(2, 3)
    rows += [line] if cotangent else [line / 2, line / 2]
  kk = _grow(jnp.concatenate(rows, axis=2), V, F)
  if cotangent:
    kk = in_first_tile(kk, call)
    return times(kv, call.grow), times(kk, call.grow)
  return kv, jnp.repeat(kk, call.tiles, axis=1)


def in_first_tile(x_BH, call: Call):
  """(B, H, ·) → (B, heads, ·), zeros in the other tiles of a head."""
  if call.tiles == 1:
    return x_BH
  first = jnp.arange(call.heads) % call.tiles == 0
  x = jnp.repeat(x_BH, call.tiles, axis=1)
  return jnp.where(first.reshape(-1, *[1] * (x.ndim - 2)), x, 0)


def from_kernel(
  kv, kk, count_BH, P: int, call: Call, *, cotangent: bool = False
) -> State:
  """The inverse of `to_kernel`; the count is KK's corner."""
  E = (CYCLIC + bool(call.c1)) * F
  kv = kv.reshape(call.B, call.H, call.tiles * V, -1)
  kk = kk[:, :: call.tiles]
  if cotangent:
    kv, kk = times(kv, 1 / call.grow), times(kk, 1 / call.grow)
  kv = kv[:, :, :P].swapaxes(2, 3)
  parts, square = [kv[:, :, :E]], kk[:, :, :F]
  if call.c0:
    constant = kv[:, :, E : E + 1]
    if cotangent:
      constant += kv[:, :, E + 1 : E + 2]
    parts.append(constant)
  kv = jnp.concatenate(parts, axis=2)
  if not call.affine:
    return State(kv, square)
  line = kk[:, :, F : F + 1] / (2 if cotangent else 1)
  top = jnp.concatenate([square, line.swapaxes(2, 3)], axis=3)
  bottom = jnp.concatenate([line, count_BH[:, :, None, None]], axis=3)
  return State(kv, jnp.concatenate([top, bottom], axis=2))


def _grow(x, rows: int, cols: int):
  pad = ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, cols - x.shape[3]))
  return jnp.pad(x, pad)
