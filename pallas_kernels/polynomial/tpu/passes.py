"""Polynomial attention on TPUs: the five passes, by Pallas Mosaic TPU.

The kernels take (B, H·X, T) arrays, tokens on lanes. The arrays of the public
call are (B, T, H, X); XLA turns them by giving what made them, or uses them,
the other layout, as it does for a projection.
"""

import dataclasses

from jax import Array
import jax.numpy as jnp

from pallas_kernels.documents import document_starts
from pallas_kernels.polynomial.operator import (
  Kernel,
  add_slice_axis,
  drop_slice_axis,
  raise_if_unsupported,
)
from pallas_kernels.polynomial.state import State, restore_antisymmetric_part
from pallas_kernels.polynomial.tpu import (
  backward as backward_kernels,
  chunks,
  forward as forward_kernels,
  sizes,
)
from pallas_kernels.polynomial.tpu.chunks import Call

WIDTHS = (8, 16, 32, 64)
VALUES = 128
_VMEM = 12 << 20  # of the 16 MiB that a kernel gets; spills take some, too


def supports(
  q: Array, v: Array, kernel: Kernel, *, states: bool
) -> None:
  """Raises NotImplementedError with the reason where "xla" must do the call."""
  del states
  F, P = q.shape[-1], v.shape[-1]
  reasons = [
    (
      q.dtype not in (jnp.bfloat16, jnp.float32),
      f"dtype {q.dtype}: bfloat16 and float32 only",
    ),
    (F not in WIDTHS, f"F={F}: {', '.join(map(str, WIDTHS))} only"),
    (P > VALUES, f"P={P}: 1 to {VALUES}"),
    (kernel.coefficients.c2 <= 0, "c2 ≤ 0"),
  ]
  raise_if_unsupported("tpu", reasons)


def forward(q, k, v, runs_BT, state, kernel: Kernel, *, return_state: bool):
  """o_BTHP, the state after the last token, if asked for, and that before."""
  call = _call("forward", q, v, runs_BT, kernel)
  o, after = forward_kernels.forward(
    _turn(q),
    _turn(k),
    _turn(v, call.P),
    _starts(runs_BT, call),
    _to_kernel(state, kernel, call, by_feature=False),
    call,
    return_state=return_state,
  )
  if not return_state:
    return _back(o, v), None, add_slice_axis(state)
  after = _from_kernel(after, v, kernel, call, by_feature=False)
  after = restore_antisymmetric_part(after, state, _joined(runs_BT))
  return _back(o, v), after, add_slice_axis(state)


def key_state(k, v, runs_BT, kernel: Kernel) -> State:
  """The state after the last token, from a zero state."""
  call = _call("forward", k, v, runs_BT, kernel)
  _, after = forward_kernels.forward(
    None,
    _turn(k),
    _turn(v, call.P),
    _starts(runs_BT, call),
    None,
    call,
    return_state=True,
  )
  return _from_kernel(after, v, kernel, call, by_feature=False)


def backward_queries(q, k, v, do, runs_BT, before, kernel: Kernel):
  """dq_BTHF; and r and dz, c2 times those of `spec.py`, (B, H, 1, T)."""
  call = _call("backward_queries", q, v, runs_BT, kernel)
  dq, r, dz = backward_kernels.backward_queries(
    _turn(q),
    _turn(k),
    _turn(v, call.P),
    _turn(do, call.P),
    _starts(runs_BT, call),
    _to_kernel(drop_slice_axis(before), kernel, call, by_feature=True),
    call,
  )
  return _back(dq, q), r, dz


def backward_keys(
  q, k, v, do, r, dz, runs_BT, dstate, kernel: Kernel, *, return_state: bool
):
  """dk_BTHF, dv_BTHP and the cotangent of the state before, if asked for."""
  call = _call("backward_keys", q, v, runs_BT, kernel)
  dk, dv, before = backward_kernels.backward_keys(
    _turn(q),
    _turn(k),
    _turn(v, call.P),
    _turn(do, call.P),
    r,
    dz,
    _starts(runs_BT, call),
    _to_kernel(dstate, kernel, call, by_feature=True),
    call,
    return_state=return_state,
  )
  if not return_state:
    return _back(dk, k), _back(dv, v), None
  before = _from_kernel(before, v, kernel, call, by_feature=True)
  return _back(dk, k), _back(dv, v), restore_antisymmetric_part(before, dstate, _joined(runs_BT))


def query_cotangent(q, do, r, dz, runs_BT, kernel: Kernel) -> State:
  """The cotangent of the state before token 0, from these queries alone."""
  call = _call("backward_keys", q, do, runs_BT, kernel)
  _, _, before = backward_kernels.backward_keys(
    _turn(q),
    None,
    None,
    _turn(do, call.P),
    r,
    dz,
    _starts(runs_BT, call),
    None,
    call,
    return_state=True,
  )
  return _from_kernel(before, do, kernel, call, by_feature=True)


def _call(name: str, q, v, runs_BT, kernel: Kernel) -> Call:
  """The heads of a step are the fewest whose values are whole tiles.

  Where VMEM does not hold so many, each head is filled up to whole tiles.
  """
  B, T, H, F = q.shape
  P, c = v.shape[-1], kernel.coefficients
  chunk, span, block = sizes.sizes(name, F, T)
  call = Call(
    B,
    T,
    H,
    F,
    P,
    str(q.dtype),
    c.c1 / c.c2,
    c.c0 / c.c2,
    kernel.eps / c.c2,
    c.affine,
    runs_BT is not None,
    _heads(H, P),
    chunk,
    span,
    block,
  )
  found = _fitted(call)
  if found.vmem_bytes > _VMEM:
    found = _fitted(dataclasses.replace(call, P=call.V, heads=1))
  return found


def _heads(H: int, P: int) -> int:
  """The fewest heads whose values are rows of whole tiles of 8, or all."""
  fits = (n for n in range(1, H) if H % n == 0 and n * P % 8 == 0)
  return next(fits, H)


def _fitted(call: Call) -> Call:
  """With a span and a block as large as fit."""
  span, block = call.span, call.block
  # The program grows with heads and span.
  while span * call.heads > call.span and span % (2 * call.chunk) == 0:
    span //= 2
  call = dataclasses.replace(call, span=span)
  while call.vmem_bytes > _VMEM and block > span:
    block = -(-block // (2 * span)) * span
    call = dataclasses.replace(call, block=block)
  return call


def _turn(x_BTHX: Array, rows: int | None = None) -> Array:
  """(B, H·X, T), which is how a projection's output lies if turned.

  With `rows`, each head is filled up to that many.
  """
  B, T, H, X = x_BTHX.shape
  if rows not in (None, X):
    x_BTHX = jnp.pad(x_BTHX, ((0, 0),) * 3 + ((0, rows - X),))
  return x_BTHX.reshape(B, T, -1).swapaxes(1, 2)


def _back(x_BRT: Array, like_BTHX: Array) -> Array:
  """(B, T, H, X), as the other is."""
  B, T, H, X = like_BTHX.shape
  return x_BRT.swapaxes(1, 2).reshape(B, T, H, -1)[..., :X]


def _starts(runs_BT: Array | None, call: Call) -> Array | None:
  """The place of the first token of each token's document."""
  if runs_BT is None:
    return None
  start_BT = document_starts(runs_BT)
  filled = call.steps * call.block - call.T
  return jnp.pad(start_BT, ((0, 0), (0, filled)), mode="edge")[:, None]


# The states: the public form has rows where a coefficient is not 0.


def _to_kernel(state: State | None, kernel: Kernel, call: Call, *, by_feature):
  if state is None:
    return None
  kv, kk = state
  kk = (kk + kk.swapaxes(2, 3)) / 2
  kv = jnp.pad(kv, ((0, 0), (0, 0), (0, 0), (0, call.V - kv.shape[-1])))
  if call.affine:
    c = kernel.coefficients
    zeros = lambda rows: jnp.zeros((*kv.shape[:2], rows, call.V), kv.dtype)
    at = call.squares
    x = kv[:, :, at : at + call.F] if c.c1 != 0 else zeros(call.F)
    one = kv[:, :, -1:] if c.c0 != 0 else zeros(1)
    rest = zeros(chunks.ONES - 1)
    kv = jnp.concatenate([kv[:, :, :at], x, one, rest], axis=2)
    more = call.G - kk.shape[-1]
    kk = jnp.pad(kk, ((0, 0), (0, 0), (0, more), (0, more)))
  return kv if by_feature else kv.swapaxes(2, 3), kk


def _from_kernel(
  state, v_BTHP: Array, kernel: Kernel, call: Call, *, by_feature
) -> State:
  kv, kk = state
  kv = (kv if by_feature else kv.swapaxes(2, 3))[..., : v_BTHP.shape[-1]]
  if call.affine:
    c = kernel.coefficients
    at = call.squares
    parts = [kv[:, :, :at]]
    if c.c1 != 0:
      parts.append(kv[:, :, at : at + call.F])
    if c.c0 != 0:
      parts.append(kv[:, :, at + call.F : at + call.F + 1])
    kv = jnp.concatenate(parts, axis=2)
    G = call.F + 1
    kk = kk[:, :, :G, :G]
  return State(kv, kk)


def _joined(runs_BT: Array | None) -> Array | None:
  """Which rows are one document."""
  return None if runs_BT is None else runs_BT[:, 0] == runs_BT[:, -1]
