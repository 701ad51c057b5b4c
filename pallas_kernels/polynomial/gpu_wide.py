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
import itertools

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial import (
  gpu_common,
  gpu_documents,
  gpu_parts,
  gpu_slices,
  gpu_states,
  tuned,
)
from pallas_kernels.polynomial.gpu_common import C, Call, F, times
from pallas_kernels.polynomial.gpu_documents import Documents
from pallas_kernels.polynomial.passes import Kernel

F_MAX = 64
f32 = jnp.float32


def forward(q, k, v, runs_BT, kernel: Kernel) -> Array:
  """o_BTHP."""
  T, P = q.shape[1], v.shape[-1]
  call, kinds = _calls(q, v, runs_BT, kernel)
  q, k, v = _fill(call, (q, k), (v,))
  documents = gpu_documents.of_rows(runs_BT, call)
  num_BHTP, z_BHT = jnp.float32(0), jnp.float32(0)
  for kind in kinds:
    before = _prefix(k, v, documents, kind)
    rows = documents.rows(kind, past=True)
    num, z = gpu_parts.forward(q, k, v, rows, before, kind)
    num_BHTP += _values(num, kind)
    z_BHT += _once(z, kind).sum(axis=2)
  q, k, v = map(_chunks, (q, k, v))
  a = _scores(q, k)
  sim = jnp.where(_seen(runs_BT, call), gpu_common.polynomial(a, call), 0)
  z_BHT += _rows(sim.sum(axis=-1))
  num_BHTP += _rows(_sums(sim, v))
  o = num_BHTP / (z_BHT + call.eps)[..., None]
  return _public(o, T, P, call)


def backward_queries(q, k, v, do, runs_BT, kernel: Kernel):
  """dq_BTHF; and r, dz, (B, H, T filled up) float32."""
  _, T, _, width = q.shape
  call, kinds = _calls(q, v, runs_BT, kernel)
  q, k, v, do = _fill(call, (q, k), (v, do))
  documents = gpu_documents.of_rows(runs_BT, call)
  dnums, ddens, num_BHT, z_BHT = [], [], jnp.float32(0), jnp.float32(0)
  for kind in kinds:
    before = _prefix(k, v, documents, kind)
    rows = documents.rows(kind, past=True)
    *wide, z, num = gpu_parts.backward_queries(q, k, v, do, rows, before, kind)
    n = len(wide) // 2
    dnums += [_split(x, kind).sum(axis=2) for x in wide[:n]]
    ddens += [_once(x, kind) for x in wide[n:]]
    num_BHT += _split(num, kind).sum(axis=(2, 3))
    z_BHT += _once(z, kind).sum(axis=2)
  q, k, v, do = map(_chunks, (q, k, v, do))
  a, dsim, seen = _scores(q, k), _scores(do, v), _seen(runs_BT, call)
  sim = jnp.where(seen, gpu_common.polynomial(a, call), 0)
  z_BHT += _rows(sim.sum(axis=-1))
  num_BHT += _rows((sim * dsim).sum(axis=-1))
  # Known before the scores' gradients are rounded, as in `gpu_backward.py`.
  exists_T = jnp.arange(call.total * C) < T
  r = jnp.where(exists_T, 1 / (z_BHT + call.eps), 0)
  dz = -(num_BHT * r) * r
  da = _d_scores(a, dsim, r, dz, seen, call)
  dq = r[..., None] * _join(dnums) + dz[..., None] * _join(ddens)
  dq += _rows(_sums(da, k))
  return _public(dq, T, width, call), r, dz


def backward_keys(q, k, v, do, r, dz, runs_BT, kernel: Kernel):
  """dk_BTHF and dv_BTHP."""
  _, T, _, width = q.shape
  P = v.shape[-1]
  call, kinds = _calls(q, v, runs_BT, kernel)
  q, k, v, do = _fill(call, (q, k), (v, do))
  documents = gpu_documents.of_rows(runs_BT, call)
  across = dict(
    r=jnp.repeat(r, call.tiles, axis=1), dz=gpu_states.in_first_tile(dz, call)
  )
  dks, dv_BHTP = [], jnp.float32(0)
  for kind in kinds:
    rows = across | documents.rows(kind)
    after, _ = gpu_slices.suffix(q, do, rows, documents, None, kind)
    *dk, dv = gpu_parts.backward_keys(q, k, v, do, rows, after, kind)
    dks += [_split(x, kind).sum(axis=2) for x in dk]
    dv_BHTP += _values(dv, kind)
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
  return _public(dk, T, width, call), _public(dv, T, P, call)


def _calls(q, v, runs_BT, kernel: Kernel) -> tuple[Call, list[Call]]:
  """The call as a whole, and those of the two kinds of parts."""
  B, T, H, width = q.shape
  P = -(-v.shape[-1] // 16) * 16
  m = -(-width // F)
  call = gpu_common.make_call(
    B, T, H, P, kernel, q.dtype, 1, segments=runs_BT is not None
  )
  shape = tuned.Shape(B * H, T, m * F, P, not kernel.coefficients.affine)
  sizes = tuned.here().sizes(shape)
  kinds = []
  for pairs in (False, True):
    kind = gpu_common.of_parts(call, m, pairs=pairs)
    walks = dataclasses.replace(shape, heads=B * H * kind.parts)
    kinds.append(gpu_common.cut(kind, walks.programs(sizes)))
  return call, kinds


def _fill(call: Call, features, values) -> list[Array]:
  """Zeros up to whole chunks, m parts of features, P a multiple of 16."""
  m = -(-features[0].shape[-1] // F)
  widths = [m * F] * len(features) + [call.P] * len(values)
  return [
    gpu_common.fill(x, C, width)
    for x, width in zip((*features, *values), widths, strict=True)
  ]


def _prefix(k, v, documents: Documents, kind: Call):
  """`gpu_slices.prefix`; () for a single slice."""
  if kind.slices == 1:
    return ()
  count_BH = jnp.zeros((kind.B, kind.H), f32)
  return gpu_slices.prefix(k, v, documents, None, count_BH, kind)[0]


# The sums of the parts.


def _split(x: Array, kind: Call) -> Array:
  """(B, heads, …) → (B, H, tiles, parts, …)."""
  return x.reshape(kind.B, kind.H, kind.tiles, kind.parts, *x.shape[2:])


def _once(x: Array, kind: Call) -> Array:
  """(B, H, parts, …) of what all tiles of the values have alike."""
  return _split(x, kind)[:, :, 0]


def _values(x: Array, kind: Call) -> Array:
  """(B, heads, T, width) → (B, H, T, P), over the parts."""
  x = _split(x, kind).sum(axis=3)
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
