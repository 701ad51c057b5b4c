"""Polynomial attention on Hopper GPUs with more than 16 features, up to 64.

q and k are filled up to m parts of 16 features, x = (x_1, …, x_m):

    (q·k)² = Σ_i (q_i·k_i)² + 2 Σ_{i<j} (q_i·k_i)(q_j·k_j)

so that the features are those of m parts (i, i) and m (m − 1) halves of pairs,
and each is walked by itself, with a state that fits the registers
(`feature_parts.py`). What a walk gives passes through its state, of the tokens
outside the chunk. A kernel without a state adds these sums up, and to them the
tokens of the chunk (`within_chunk.py`).

The sums are float32 in HBM, written and read once. Bytes a token and head, of
values in ⌈P / 64⌉ tiles that are W wide, P filled up to 16:

    forward    4 tiles m² (W + 1)
    queries    4 tiles m (66 m − 32)
    keys       4 tiles m (m (W + 32) − 16)

F = 32 and P = 64 take 1,040, 800 and 1,408 bytes; F = 64 and P = 48 take 3,136,
3,712 and 4,864.
"""

import functools

from jax import Array, lax
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  documents as gpu_documents,
  feature_parts,
  launch,
  states,
  tiles,
  time_slices,
  wide_states,
  within_chunk,
)
from pallas_kernels.polynomial.gpu.documents import Documents
from pallas_kernels.polynomial.gpu.tiles import Call, F
from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.state import State

F_MAX = 64


def forward(q, k, v, runs_BT, state, kernel: Kernel, *, return_state: bool):
  """o_BTHP, the state after the last token, if asked for, and what is kept."""
  _, T, _, width = q.shape
  P = v.shape[-1]
  call, kinds = calls(q, v, runs_BT, kernel)
  q, k, v = _fill(call, (q, k), (v,))
  documents = gpu_documents.of_rows(runs_BT, call)
  sums, z_BHT, found = [], jnp.float32(0), []
  befores = [_prefix(k, v, documents, state, width, kind) for kind in kinds]
  for kind, before in zip(kinds, befores, strict=True):
    rows, alone = documents.rows(kind, past=True), kind.slices == 1
    num, z, *after = feature_parts.forward(
      q, k, v, rows, before, kind, state=return_state and alone
    )
    sums.append(num)
    z_BHT += _add(_once(z, kind), 2)
    if return_state:
      found.append([x[-1] for x in (after if alone else before[:2])])
  rows = dict(z=z_BHT) | documents.rows(call)
  (o,) = within_chunk.forward(q, k, v, rows, sums, kinds[0].m, call)
  o = o[:, :T, :, :P]
  if not return_state:
    return o, None, befores
  count_BH = gpu_documents.count(runs_BT, call)
  count_BH = time_slices.corner(count_BH, state, documents, call)
  after = wide_states.from_parts(
    found, kinds, width, P, count_BH, cotangent=False
  )
  after = wide_states.with_skew(after, state, documents.all_B, width)
  return o, after, befores


def key_state(k, v, runs_BT, kernel: Kernel) -> State:
  """The state after the last token, from a zero state."""
  width, P = k.shape[-1], v.shape[-1]
  call, kinds = calls(k, v, runs_BT, kernel)
  k, v = _fill(call, (k,), (v,))
  documents = gpu_documents.of_rows(runs_BT, call)
  found = [time_slices.behind_keys(k, v, documents, kind) for kind in kinds]
  count_BH = gpu_documents.count(runs_BT, call)
  return wide_states.from_parts(
    found, kinds, width, P, count_BH, cotangent=False
  )


def backward_queries(q, k, v, do, runs_BT, befores, kernel: Kernel):
  """dq_BTHF; and r, dz, (B, H, T filled up) float32."""
  _, T, _, width = q.shape
  call, kinds = calls(q, v, runs_BT, kernel)
  q, k, v, do = _fill(call, (q, k), (v, do))
  documents = gpu_documents.of_rows(runs_BT, call)
  sums, num_BHT, z_BHT = [], jnp.float32(0), jnp.float32(0)
  for kind, before in zip(kinds, befores, strict=True):
    rows = documents.rows(kind, past=True)
    *wide, z, num = feature_parts.backward_queries(
      q, k, v, do, rows, before, kind
    )
    sums += wide
    num_BHT += _add(_add(_split(num, kind), 3), 2)
    z_BHT += _add(_once(z, kind), 2)
  rows = dict(z=z_BHT, num=num_BHT) | documents.rows(call)
  dq, r, dz = within_chunk.backward_queries(
    q, k, v, do, rows, sums, kinds[0].m, call
  )
  return dq[:, :T, :, :width], r, dz


def backward_keys(
  q, k, v, do, r, dz, runs_BT, dstate, kernel: Kernel, *, return_state: bool
):
  """dk_BTHF, dv_BTHP and the cotangent of the state before, if asked for."""
  _, T, _, width = q.shape
  P = v.shape[-1]
  call, kinds = calls(q, v, runs_BT, kernel)
  q, k, v, do = _fill(call, (q, k), (v, do))
  documents = gpu_documents.of_rows(runs_BT, call)
  sums, found = [], []
  for kind in kinds:
    rows, alone = _across(r, dz, call) | documents.rows(kind), kind.slices == 1
    outer = None
    if dstate is not None:
      outer = wide_states.to_parts(dstate, kind, width, cotangent=True)
    after = time_slices.suffix(q, do, rows, documents, outer, kind)
    outs = feature_parts.backward_keys(
      q, k, v, do, rows, after, kind, state=return_state and alone
    )
    sums += outs[: 2 + kind.pairs]
    if return_state:
      found.append([x[0] for x in (outs[2 + kind.pairs :] if alone else after)])
  dbefore = None
  if return_state:
    dbefore = _cotangent(found, kinds, dz, dstate, documents, width, P, call)
  rows = dict(r=r, dz=dz) | documents.rows(call)
  dk, dv = within_chunk.backward_keys(q, k, v, do, rows, sums, kinds[0].m, call)
  return dk[:, :T, :, :width], dv[:, :T, :, :P], dbefore


def query_cotangent(q, do, r, dz, runs_BT, kernel: Kernel) -> State:
  """The cotangent of the state before token 0, from these queries alone."""
  width, P = q.shape[-1], do.shape[-1]
  call, kinds = calls(q, do, runs_BT, kernel)
  q, do = _fill(call, (q,), (do,))
  documents = gpu_documents.of_rows(runs_BT, call)
  found = []
  for kind in kinds:
    rows = _across(r, dz, call) | documents.rows(kind)
    found.append(time_slices.before_queries(q, do, rows, documents, kind))
  return _cotangent(found, kinds, dz, None, documents, width, P, call)


def calls(q, v, runs_BT, kernel: Kernel) -> tuple[Call, list[Call]]:
  """The call as a whole, and those of the two kinds of parts."""
  B, T, H, width = q.shape
  P = -(-v.shape[-1] // 16) * 16
  m = -(-width // F)
  call = launch.make_call(
    B, T, H, P, kernel, q.dtype, 1, segments=runs_BT is not None
  )
  kinds = []
  for pairs in (False, True):
    kind = launch.of_parts(call, m, pairs=pairs)
    kinds.append(launch.cut(kind, launch.PROGRAMS))
  return call, kinds


def _fill(call: Call, features, values) -> list[Array]:
  """Zeros up to m parts of features, P a multiple of 16 and T of 8."""
  m = -(-features[0].shape[-1] // F)
  widths = [m * F] * len(features) + [call.P] * len(values)
  return [
    tiles.fill(x, 8, width)
    for x, width in zip((*features, *values), widths, strict=True)
  ]


def _prefix(k, v, documents: Documents, state, width: int, kind: Call):
  """`time_slices.prefix`; () where all that is before is 0."""
  outer = None
  if state is not None:
    outer = wide_states.to_parts(state, kind, width)
  return time_slices.prefix(k, v, documents, outer, state, kind)


def _across(r, dz, call: Call) -> dict:
  """The rows of all tiles; dz in the first one of a head."""
  return dict(
    r=jnp.repeat(r, call.tiles, axis=1), dz=states.in_first_tile(dz, call)
  )


def _cotangent(
  found, kinds, dz, dstate, documents: Documents, width: int, P: int, call: Call
) -> State:
  """The public form; the corner of KK is Σ c0 dz."""
  if documents.first_B1T is not None:
    dz = jnp.where(documents.first_B1T, dz, 0)
  corner_BH = call.c0 * dz.sum(axis=-1)
  corner_BH = time_slices.corner(corner_BH, dstate, documents, call)
  dbefore = wide_states.from_parts(
    found, kinds, width, P, corner_BH, cotangent=True
  )
  return wide_states.with_skew(dbefore, dstate, documents.all_B, width)


# The sums of the parts.


def _split(x: Array, kind: Call) -> Array:
  """(B, heads, …) → (B, H, tiles, parts, …)."""
  return x.reshape(kind.B, kind.H, kind.tiles, kind.parts, *x.shape[2:])


def _add(x: Array, axis: int) -> Array:
  """The sum over a short axis, which XLA fuses with what follows."""
  each = (
    lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])
  )
  return functools.reduce(jnp.add, each)


def _once(x: Array, kind: Call) -> Array:
  """(B, H, parts, …) of what all tiles of the values have alike."""
  return _split(x, kind)[:, :, 0]
