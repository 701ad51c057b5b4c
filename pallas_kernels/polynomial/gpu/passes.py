"""Polynomial attention on Hopper GPUs: the five passes, by Pallas Mosaic GPU.

Where batch × heads leave the card idle, time is cut into slices, each of which
starts from a state that `time_slices.py` has summed before. The backward keeps
these states, and makes those of the cotangents, from the end.

More than 16 features are done by `wide_passes.py`.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  backward as backward_kernels,
  documents as gpu_documents,
  forward as forward_kernels,
  launch,
  states as gpu_states,
  tiles,
  time_slices,
  wide_passes,
)
from pallas_kernels.polynomial.gpu.documents import Documents
from pallas_kernels.polynomial.gpu.tiles import Call
from pallas_kernels.polynomial.operator import Kernel, raise_if_unsupported
from pallas_kernels.polynomial.state import State, restore_antisymmetric_part

P_MAX = 128


def supports(
  q: Array, v: Array, kernel: Kernel, *, states: bool
) -> None:
  """Raises NotImplementedError with the reason where "xla" must do the call."""
  F, P = q.shape[-1], v.shape[-1]
  reasons = [
    (
      q.dtype not in (jnp.bfloat16, jnp.float16),
      f"dtype {q.dtype}: bfloat16 and float16 only",
    ),
    (F > wide_passes.F_MAX, f"F={F}: 1 to {wide_passes.F_MAX}"),
    (states and F < tiles.F, f"states with F={F}: {tiles.F} or more"),
    (P > P_MAX, f"P={P}: 1 to {P_MAX}"),
    (kernel.coefficients.c2 <= 0, "c2 ≤ 0"),
    (kernel.eps <= 0, "eps = 0"),
    (jax.config.jax_enable_x64, "jax_enable_x64"),
  ]
  raise_if_unsupported("gpu", reasons)


def forward(q, k, v, runs_BT, state, kernel: Kernel, *, return_state: bool):
  """o_BTHP, the state after the last token, if asked for, and what is kept."""
  if q.shape[-1] > tiles.F:
    return wide_passes.forward(
      q, k, v, runs_BT, state, kernel, return_state=return_state
    )
  T, P = q.shape[1], v.shape[-1]
  call = _call(q, v, runs_BT, kernel)
  q, k, v = _fill(q, k, v)
  documents = gpu_documents.of_rows(runs_BT, call)
  before = _prefix(k, v, documents, state, call)
  alone = call.slices == 1
  rows = documents.rows(call, past=True)
  o, *after = forward_kernels.forward(
    q, k, v, rows, before, call, state=return_state and alone
  )
  o = o[:, :T, :, :P]
  if not return_state:
    return o, None, before
  after = [x[-1] for x in (after if alone else before[:2])]
  count_BH = gpu_documents.count(runs_BT, call)
  count_BH = time_slices.corner(count_BH, state, documents, call)
  found = gpu_states.from_kernel(*after, count_BH, P, call)
  return o, restore_antisymmetric_part(found, state, documents.all_B), before


def key_state(k, v, runs_BT, kernel: Kernel) -> State:
  """The state after the last token, from a zero state."""
  if k.shape[-1] > tiles.F:
    return wide_passes.key_state(k, v, runs_BT, kernel)
  call = _call(k, v, runs_BT, kernel)
  _, filled_k, filled_v = _fill(k, k, v)
  documents = gpu_documents.of_rows(runs_BT, call)
  kv, kk = time_slices.behind_keys(filled_k, filled_v, documents, call)
  count_BH = gpu_documents.count(runs_BT, call)
  return gpu_states.from_kernel(kv, kk, count_BH, v.shape[-1], call)


def backward_queries(q, k, v, do, runs_BT, before, kernel: Kernel):
  """dq_BTHF; and r, dz, (B, heads, T filled up) float32."""
  if q.shape[-1] > tiles.F:
    return wide_passes.backward_queries(q, k, v, do, runs_BT, before, kernel)
  _, T, _, F = q.shape
  call = _call(q, v, runs_BT, kernel)
  q, k, v, do = _fill(q, k, v, do)
  documents = gpu_documents.of_rows(runs_BT, call)
  rows = documents.rows(call, past=True)
  dq, r, dz = backward_kernels.backward_queries(q, k, v, do, rows, before, call)
  if call.tiles > 1:
    dq = _over_tiles(dq, call)
    dz = dz.reshape(call.B, call.H, call.tiles, -1).sum(axis=2)
    dz = gpu_states.in_first_tile(dz, call)
  return dq[:, :T, :, :F], r, dz


def backward_keys(
  q, k, v, do, r, dz, runs_BT, dstate, kernel: Kernel, *, return_state: bool
):
  """dk_BTHF, dv_BTHP and the cotangent of the state before, if asked for."""
  if q.shape[-1] > tiles.F:
    return wide_passes.backward_keys(
      q, k, v, do, r, dz, runs_BT, dstate, kernel, return_state=return_state
    )
  _, T, _, F = q.shape
  P = v.shape[-1]
  call = _call(q, v, runs_BT, kernel)
  q, k, v, do = _fill(q, k, v, do)
  documents = gpu_documents.of_rows(runs_BT, call)
  rows = dict(r=r, dz=dz) | documents.rows(call)
  after = _suffix(q, do, rows, documents, dstate, call)
  alone = call.slices == 1
  dk, dv, *before = backward_kernels.backward_keys(
    q, k, v, do, rows, after, call, state=return_state and alone
  )
  if call.tiles > 1:
    dk = _over_tiles(dk, call)
  dk, dv = dk[:, :T, :, :F], dv[:, :T, :, :P]
  if not return_state:
    return dk, dv, None
  before = [x[0] for x in (before if alone else after)]
  return dk, dv, _cotangent(*before, dz, dstate, documents, P, call)


def query_cotangent(q, do, r, dz, runs_BT, kernel: Kernel) -> State:
  """The cotangent of the state before token 0, from these queries alone."""
  if q.shape[-1] > tiles.F:
    return wide_passes.query_cotangent(q, do, r, dz, runs_BT, kernel)
  call = _call(q, do, runs_BT, kernel)
  P = do.shape[-1]
  q, _, do = _fill(q, q, do)
  documents = gpu_documents.of_rows(runs_BT, call)
  rows = dict(r=r, dz=dz) | documents.rows(call)
  kv, kk = time_slices.before_queries(q, do, rows, documents, call)
  return _cotangent(kv, kk, dz, None, documents, P, call)


def _call(q, v, runs_BT, kernel: Kernel) -> Call:
  B, T, H, _ = q.shape
  P = _width(v)
  return launch.make_call(
    B, T, H, P, kernel, q.dtype, launch.PROGRAMS, segments=runs_BT is not None
  )


def _width(v: Array) -> int:
  """P of the arrays that the kernels take."""
  return -(-v.shape[-1] // 16) * 16


def _fill(q, k, v, *more):
  """Zeros up to F = 16, P a multiple of 16 and T of 8, as TMA needs them.

  Nothing is copied where the sizes fit, as the usual ones do.
  """
  P = _width(v)
  wide = (tiles.fill(x, 8, P) for x in (v, *more))
  return *(tiles.fill(x, 8, tiles.F) for x in (q, k)), *wide


def _over_tiles(x_BTHF: Array, call: Call) -> Array:
  """(B, T, heads, F) summed over the tiles of each head's values."""
  x = x_BTHF.reshape(*x_BTHF.shape[:2], call.H, call.tiles, -1)
  return x.astype(jnp.float32).sum(axis=3).astype(x.dtype)


def _prefix(k, v, documents: Documents, state: State | None, call: Call):
  """`time_slices.prefix`; () where all that is before is 0."""
  outer = None if state is None else gpu_states.to_kernel(state, call)
  return time_slices.prefix(k, v, documents, outer, state, call)


def _suffix(q, do, rows, documents: Documents, dstate, call: Call):
  """`time_slices.suffix`, of a cotangent of the state after the last token."""
  outer = None
  if dstate is not None:
    outer = gpu_states.to_kernel(dstate, call, cotangent=True)
  return time_slices.suffix(q, do, rows, documents, outer, call)


def _cotangent(kv, kk, dz, dstate, documents: Documents, P: int, call: Call):
  """The public form; the corner of KK is Σ c0 dz."""
  if documents.first_B1T is not None:
    dz = jnp.where(documents.first_B1T, dz, 0)
  corner_BH = call.c0 * dz[:, :: call.tiles].sum(axis=-1)
  corner_BH = time_slices.corner(corner_BH, dstate, documents, call)
  found = gpu_states.from_kernel(kv, kk, corner_BH, P, call, cotangent=True)
  return restore_antisymmetric_part(found, dstate, documents.all_B)
