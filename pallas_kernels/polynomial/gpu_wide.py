"""Polynomial attention on Hopper GPUs with more than 16 features, up to 64.

q and k are filled up to m parts of 16 features, x = (x_1, …, x_m):

    (q·k)² = Σ_i (q_i·k_i)² + 2 Σ_{i<j} (q_i·k_i)(q_j·k_j)

so that the features are those of m parts (i, i) and m (m − 1) halves of pairs,
and each is walked by itself, with a state that fits the registers
(`gpu_parts.py`). What a walk gives passes through its state, of the tokens
outside the chunk. Here these sums are added up, and the tokens of the chunk are
added to them, as products of XLA's.

The sums are float32 in HBM, written and read once. Bytes a token and head, of
values in ⌈P / 64⌉ tiles that are W wide, P filled up to 16:

    forward    4 tiles m² (W + 1)
    queries    4 tiles m (66 m − 32)
    keys       4 tiles m (m (W + 32) − 16)

and the scores of a chunk, 64 float32 and 64 of the operands' dtype. F = 32 and
P = 64 take 1,040, 800 and 1,408 bytes; F = 64 and P = 48 take 3,136, 3,712 and
4,864.
"""

import dataclasses
import functools
import itertools

from jax import Array, lax
import jax.numpy as jnp

from pallas_kernels.polynomial import (
  gpu_call,
  gpu_common,
  gpu_documents,
  gpu_parts,
  gpu_slices,
  gpu_states,
  gpu_wide_states,
  tuned,
)
from pallas_kernels.polynomial.gpu_common import C, Call, F, times
from pallas_kernels.polynomial.gpu_documents import Documents
from pallas_kernels.polynomial.passes import Kernel
from pallas_kernels.polynomial.spec import State

F_MAX = 64
f32 = jnp.float32


def forward(q, k, v, runs_BT, state, kernel: Kernel, *, return_state: bool):
  """o_BTHP and the state after the last token, if asked for."""
  _, T, _, width = q.shape
  P = v.shape[-1]
  call, kinds = calls(q, v, runs_BT, kernel)
  q, k, v = _fill(call, (q, k), (v,))
  documents = gpu_documents.of_rows(runs_BT, call)
  num_BHTP, z_BHT, found = jnp.float32(0), jnp.float32(0), []
  for kind in kinds:
    before, own = _prefix(k, v, documents, state, width, kind)
    rows, alone = documents.rows(kind, past=True), kind.slices == 1
    num, z, *after = gpu_parts.forward(
      q, k, v, rows, before, kind, state=return_state and alone
    )
    num_BHTP += _values(num, kind)
    z_BHT += _add(_once(z, kind), 2)
    if return_state:
      found.append(
        [x[-1] for x in after]
        if alone
        else gpu_slices.behind(before[:2], own, documents.whole(kind), -1)
      )
  q, k, v = map(_chunks, (q, k, v))
  a = _scores(q, k)
  sim = jnp.where(_seen(runs_BT, call), gpu_common.polynomial(a, call), 0)
  z_BHT += _rows(sim.sum(axis=-1))
  num_BHTP += _rows(_sums(sim, v))
  o = num_BHTP / (z_BHT + call.eps)[..., None]
  o = _public(o, T, P, call)
  if not return_state:
    return o, None
  count_BH = gpu_documents.count(runs_BT, call)
  if state is not None and call.affine:
    corner_BH = state.kk_BHGG[:, :, -1, -1]
    count_BH = gpu_slices.add(count_BH, corner_BH, documents.all_B)
  after = gpu_wide_states.from_parts(
    found, kinds, width, P, count_BH, cotangent=False
  )
  return o, gpu_wide_states.with_skew(after, state, documents.all_B, width)


def key_state(k, v, runs_BT, kernel: Kernel) -> State:
  """The state after the last token, from a zero state."""
  width, P = k.shape[-1], v.shape[-1]
  call, kinds = calls(k, v, runs_BT, kernel)
  k, v = _fill(call, (k,), (v,))
  documents = gpu_documents.of_rows(runs_BT, call)
  found = []
  for kind in kinds:
    own, whole = gpu_slices.own_keys(k, v, documents, kind), documents.whole
    found.append([gpu_slices.last(x, whole(kind)) for x in own])
  count_BH = gpu_documents.count(runs_BT, call)
  return gpu_wide_states.from_parts(
    found, kinds, width, P, count_BH, cotangent=False
  )


def backward_queries(q, k, v, do, runs_BT, state, kernel: Kernel):
  """dq_BTHF; and r, dz, (B, H, T filled up) float32."""
  _, T, _, width = q.shape
  call, kinds = calls(q, v, runs_BT, kernel)
  q, k, v, do = _fill(call, (q, k), (v, do))
  documents = gpu_documents.of_rows(runs_BT, call)
  dnums, ddens, num_BHT, z_BHT = [], [], jnp.float32(0), jnp.float32(0)
  for kind in kinds:
    before, _ = _prefix(k, v, documents, state, width, kind)
    rows = documents.rows(kind, past=True)
    *wide, z, num = gpu_parts.backward_queries(q, k, v, do, rows, before, kind)
    n = len(wide) // 2
    dnums += [_add(_split(x, kind), 2) for x in wide[:n]]
    ddens += [_once(x, kind) for x in wide[n:]]
    num_BHT += _add(_add(_split(num, kind), 3), 2)
    z_BHT += _add(_once(z, kind), 2)
  q, k, v, do = map(_chunks, (q, k, v, do))
  a, dsim, seen = _scores(q, k), _scores(do, v), _seen(runs_BT, call)
  sim = jnp.where(seen, gpu_common.polynomial(a, call), 0)
  z_BHT += _rows(sim.sum(axis=-1))
  num_BHT += _rows((sim * dsim).sum(axis=-1))
  # Known before the scores' gradients are rounded, as in `gpu_backward.py`.
  exists_11T = (jnp.arange(call.total * C) < T)[None, None]
  r = jnp.where(exists_11T, 1 / (z_BHT + call.eps), 0)
  dz = -(num_BHT * r) * r
  da = _d_scores(a, dsim, r, dz, seen, call)
  dq = r[..., None] * _join(dnums) + dz[..., None] * _join(ddens)
  dq += _rows(_sums(da, k))
  return _public(dq, T, width, call), r, dz


def backward_keys(
  q, k, v, do, r, dz, runs_BT, dstate, kernel: Kernel, *, return_state: bool
):
  """dk_BTHF, dv_BTHP and the cotangent of the state before, if asked for."""
  _, T, _, width = q.shape
  P = v.shape[-1]
  call, kinds = calls(q, v, runs_BT, kernel)
  q, k, v, do = _fill(call, (q, k), (v, do))
  documents = gpu_documents.of_rows(runs_BT, call)
  dks, dv_BHTP, found = [], jnp.float32(0), []
  for kind in kinds:
    rows, alone = _across(r, dz, call) | documents.rows(kind), kind.slices == 1
    outer = None
    if dstate is not None:
      outer = gpu_wide_states.to_parts(dstate, kind, width, cotangent=True)
    after, own = gpu_slices.suffix(q, do, rows, documents, outer, kind)
    outs = gpu_parts.backward_keys(
      q, k, v, do, rows, after, kind, state=return_state and alone
    )
    *dk, dv = outs[: 2 + kind.pairs]
    dks += [_add(_split(x, kind), 2) for x in dk]
    dv_BHTP += _values(dv, kind)
    if return_state:
      found.append(
        [x[0] for x in outs[2 + kind.pairs :]]
        if alone
        else gpu_slices.behind(after, own, documents.whole(kind), 0)
      )
  dbefore = None
  if return_state:
    dbefore = _cotangent(found, kinds, dz, dstate, documents, width, P, call)
  q, k, v, do = map(_chunks, (q, k, v, do))
  a, dsim, seen = _scores(q, k), _scores(do, v), _seen(runs_BT, call)
  r, dz = times(r, call.grow), times(dz, call.grow)
  da = _d_scores(a, dsim, r, dz, seen, call)
  sim = _per_query(r) * gpu_common.polynomial(a, call)
  sim = jnp.where(seen, sim, 0)
  across = lambda w, x: times(
    _rows(_sums(w.swapaxes(-1, -2), x)), 1 / call.grow
  )
  dk, dv = _join(dks) + across(da, q), dv_BHTP + across(sim, do)
  return _public(dk, T, width, call), _public(dv, T, P, call), dbefore


def query_cotangent(q, do, r, dz, runs_BT, kernel: Kernel) -> State:
  """The cotangent of the state before token 0, from these queries alone."""
  width, P = q.shape[-1], do.shape[-1]
  call, kinds = calls(q, do, runs_BT, kernel)
  q, do = _fill(call, (q,), (do,))
  documents = gpu_documents.of_rows(runs_BT, call)
  found = []
  for kind in kinds:
    rows = _across(r, dz, call) | documents.rows(kind)
    own = gpu_slices.own_queries(q, do, rows, documents, kind)
    backwards = gpu_slices.reverse(documents.whole(kind))
    found.append(
      [gpu_slices.last(gpu_slices.reverse(x), backwards) for x in own]
    )
  return _cotangent(found, kinds, dz, None, documents, width, P, call)


def calls(q, v, runs_BT, kernel: Kernel) -> tuple[Call, list[Call]]:
  """The call as a whole, and those of the two kinds of parts."""
  B, T, H, width = q.shape
  P = -(-v.shape[-1] // 16) * 16
  m = -(-width // F)
  call = gpu_call.make_call(
    B, T, H, P, kernel, q.dtype, 1, segments=runs_BT is not None
  )
  shape = tuned.Shape(B * H, T, m * F, P, not kernel.coefficients.affine)
  sizes = tuned.here().sizes(shape)
  kinds = []
  for pairs in (False, True):
    kind = gpu_call.of_parts(call, m, pairs=pairs)
    walks = dataclasses.replace(shape, heads=B * H * kind.parts)
    kinds.append(gpu_call.cut(kind, walks.programs(sizes)))
  return call, kinds


def _fill(call: Call, features, values) -> list[Array]:
  """Zeros up to whole chunks, m parts of features, P a multiple of 16."""
  m = -(-features[0].shape[-1] // F)
  widths = [m * F] * len(features) + [call.P] * len(values)
  return [
    gpu_common.fill(x, C, width)
    for x, width in zip((*features, *values), widths, strict=True)
  ]


def _prefix(k, v, documents: Documents, state, width: int, kind: Call):
  """`gpu_slices.prefix`; () where all that is before is 0."""
  if state is None and kind.slices == 1:
    return (), None
  outer, count_BH = None, jnp.zeros((kind.B, kind.H), f32)
  if state is not None:
    outer = gpu_wide_states.to_parts(state, kind, width)
    if kind.c0:
      count_BH = state.kk_BHGG[:, :, -1, -1]
  return gpu_slices.prefix(k, v, documents, outer, count_BH, kind)


def _across(r, dz, call: Call) -> dict:
  """The rows of all tiles; dz in the first one of a head."""
  return dict(
    r=jnp.repeat(r, call.tiles, axis=1), dz=gpu_states.in_first_tile(dz, call)
  )


def _cotangent(
  found, kinds, dz, dstate, documents: Documents, width: int, P: int, call: Call
) -> State:
  """The public form; the corner of KK is Σ c0 dz."""
  if documents.first_B1T is not None:
    dz = jnp.where(documents.first_B1T, dz, 0)
  corner_BH = call.c0 * dz.sum(axis=-1)
  if dstate is not None and call.affine:
    outer_BH = dstate.kk_BHGG[:, :, -1, -1]
    corner_BH = gpu_slices.add(corner_BH, outer_BH, documents.all_B)
  dbefore = gpu_wide_states.from_parts(
    found, kinds, width, P, corner_BH, cotangent=True
  )
  return gpu_wide_states.with_skew(dbefore, dstate, documents.all_B, width)


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


def _values(x: Array, kind: Call) -> Array:
  """(B, heads, T, width) → (B, H, T, P), over the parts."""
  x = _add(_split(x, kind), 3)
  x = jnp.moveaxis(x, 2, 3)
  return x.reshape(*x.shape[:3], -1)[..., : kind.P]


def _join(sums: list[Array]) -> Array:
  """(B, H, T, m F) of the sums of (i, i), and of i and j of the pairs.

  Each is (B, H, parts, T, F), of all parts of its kind.
  """
  own, of_i, of_j = sums
  columns = [own[:, :, i] for i in range(own.shape[2])]
  for n, pair in enumerate(itertools.combinations(range(len(columns)), 2)):
    for i, x in zip(pair, (of_i, of_j), strict=True):
      columns[i] += x[:, :, 2 * n] + x[:, :, 2 * n + 1]
  return jnp.concatenate(columns, axis=-1)


# The tokens of a chunk: (B, H, N, C, ·).


def _chunks(x_BTH: Array) -> Array:
  B, T, H, X = x_BTH.shape
  return jnp.moveaxis(x_BTH.reshape(B, T // C, C, H, X), 3, 1)


def _rows(x_BHNC: Array) -> Array:
  """(B, H, N, C, …) → (B, H, T, …)."""
  return x_BHNC.reshape(*x_BHNC.shape[:2], -1, *x_BHNC.shape[4:])


def _per_query(x_BHT: Array) -> Array:
  """(B, H, N, C, 1)."""
  return x_BHT.reshape(*x_BHT.shape[:2], -1, C, 1)


def _public(x_BHT: Array, T: int, width: int, call: Call) -> Array:
  return jnp.moveaxis(x_BHT, 1, 2)[:, :T, :, :width].astype(call.dtype)


def _seen(runs_BT: Array | None, call: Call) -> Array:
  """Whether a query sees a key of its chunk, (B or 1, 1, N or 1, C, C)."""
  causal = jnp.tril(jnp.ones((1, 1, 1, C, C), bool))
  if runs_BT is None:
    return causal
  B, T = runs_BT.shape
  runs = jnp.pad(runs_BT, ((0, 0), (0, call.total * C - T)))
  runs = runs.reshape(B, 1, -1, C)
  return causal & (runs[..., :, None] == runs[..., None, :])


def _scores(x: Array, y: Array) -> Array:
  """x_t·y_s, float32."""
  return jnp.einsum("bhntf,bhnsf->bhnts", x, y, preferred_element_type=f32)


def _sums(w: Array, x: Array) -> Array:
  """Σ_s w_ts x_s, the weights rounded as operands are."""
  return jnp.einsum(
    "bhnts,bhnsp->bhntp", w.astype(x.dtype), x, preferred_element_type=f32
  )


def _d_scores(a, dsim, r_BHT, dz_BHT, seen, call: Call) -> Array:
  """The cotangent of the scores, [query, key]."""
  da = _per_query(r_BHT) * dsim + _per_query(dz_BHT)
  return jnp.where(seen, da * gpu_common.derivative(a, call), 0)
