"""Hopper kernels of the backward: a sweep to the right for dq, one to the left.

With g = r do the equations are those of `xla_chunked.py`; the features' part of
dq is, for the cyclic blocks,

    J(q)ᵀ u = Σ_r u_r ∘ (q Π_r) + Σ_r (u_r ∘ q) Π_rᵀ

whose second sum is a product on the tensor core.
"""

import functools

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial import gpu_common as common
from pallas_kernels.polynomial.gpu_common import (
  CYCLIC,
  LAYOUT,
  C,
  F,
  V,
  bf16,
  block,
  columns,
  f32,
  mma,
)

_CYCLIC_E = CYCLIC * F
_ROWS = LAYOUT.reduce(1)  # a value a row of a tile
_COLUMNS = LAYOUT.reduce(0)


def rows_shape(call: common.Call) -> jax.ShapeDtypeStruct:
  """Of r and dz: (B, H, T filled up to whole chunks), float32."""
  return jax.ShapeDtypeStruct((call.B, call.H, call.total * C), f32)


def backward_queries(q, k, v, do, kv, kk, count, call: common.Call):
  """dq (B, T, H, 16), and r, dz of `rows_shape`."""
  before = kv is not None
  inputs = [q, k, v, do, *(kv, kk, count) * before]
  inputs.append(jnp.asarray(common.rolls(), bf16))
  return plgpu.kernel(
    functools.partial(_dq_kernel, call=call, before=before),
    out_type=[
      jax.ShapeDtypeStruct((call.B, call.rows, call.H, F), bf16),
      rows_shape(call),
      rows_shape(call),
    ],
    compiler_params=common.compiler_params(),
    kernel_name="polynomial_backward_queries",
    **call.grid,
  )(*inputs)


def _dq_kernel(q_ref, k_ref, v_ref, do_ref, *refs, call, before):
  """One slice of one head, in order; grid (slices, H, B)."""
  before_refs, refs = (refs[:3], refs[3:]) if before else (None, refs)
  rolls_ref, dq_ref, r_ref, dz_ref = refs
  s, h, b = (lax.axis_index(name) for name in ("s", "h", "b"))
  first = s * call.chunks
  chunks = jnp.minimum(call.chunks, call.total - first)

  def body(
    q_b,
    k_b,
    v_b,
    do_b,
    wide_s,
    phi_s,
    kv_s,
    kk_s,
    dq_s,
    rows_s,
    rolls_s,
    barriers,
    once,
  ):
    fetch = lambda i, slot: common.prefetch(
      (q_ref, k_ref, v_ref, do_ref),
      (q_b, k_b, v_b, do_b),
      barriers,
      first + i,
      slot,
    )
    plgpu.copy_gmem_to_smem(rolls_ref, rolls_s, once.at[0])
    wide_s[...] = common.zeros((C, V), bf16)
    for i in range(call.stages):
      pl.when(i < chunks)(functools.partial(fetch, i, i))
    kv, kk, count = common.load_state(before_refs, s, b, h, call)
    kv_s[...] = kv.astype(bf16)
    common.store_split(kk_s, kk)
    plgpu.commit_smem()
    plgpu.barrier_wait(once.at[0])

    def step(i, carry):
      slot = lax.rem(i, call.stages)
      plgpu.barrier_wait(barriers.at[slot])
      q_s, k_s, v_s, do_s = (x.at[slot] for x in (q_b, k_b, v_b, do_b))
      past = count + (i * C).astype(f32)
      dq, r, dz = _dq_chunk(
        q_s, k_s, v_s, do_s, kv_s, kk_s, rolls_s, past, call
      )
      plgpu.wait_smem_to_gmem(0)
      dq_s[...] = dq.astype(bf16)
      exists = (first + i) * C + plgpu.broadcasted_iota(
        jnp.int32, (C,), 0, layout=_ROWS
      ) < call.T
      rows_s[0] = jnp.where(exists, r, 0.0)
      rows_s[1] = jnp.where(exists, dz, 0.0)
      common.store_keys(k_s, rolls_s, phi_s, wide_s, first + i, call)
      plgpu.commit_smem()
      rows = pl.ds((first + i) * C, C)
      plgpu.copy_smem_to_gmem(dq_s, dq_ref.at[b, rows, h])
      plgpu.copy_smem_to_gmem(rows_s.at[0], r_ref.at[b, h, rows])
      plgpu.copy_smem_to_gmem(rows_s.at[1], dz_ref.at[b, h, rows])
      kv, kk = common.update(carry, wide_s, k_s, v_s, phi_s)
      kv_s[...] = kv.astype(bf16)
      common.store_split(kk_s, kk)
      plgpu.commit_smem()
      pl.when(i + call.stages < chunks)(lambda: fetch(i + call.stages, slot))
      return kv, kk

    lax.fori_loop(0, chunks, step, (kv, kk))
    plgpu.wait_smem_to_gmem(0)

  pl.run_scoped(
    body,
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, V),
    common.smem(call.stages, C, V),
    common.smem(C, V),
    common.smem(C, call.E),
    common.smem(V, call.E),
    common.smem(2, V, F),
    common.smem(C, F),
    plgpu.SMEM((2, C), f32),
    common.smem(F, _CYCLIC_E),
    plgpu.Barrier(num_arrivals=4, num_barriers=call.stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=1),
  )


def _dq_chunk(q_s, k_s, v_s, do_s, kv_s, kk_s, rolls_s, past, call):
  """dq (C, F), r (C,) and dz (C,) of a chunk.

  dq = r dnum + dz dden, the gradients of do·Σ sim v and of Σ sim. The sums are
  homogeneous of degree 2 in q where sim is a square, so that do·Σ sim v is
  q·dnum / 2, with the same rounding as dnum's.
  """
  a = mma((q_s, k_s.transpose((1, 0))), shape=(C, C))
  seen = common.iota((C, C), 0) >= common.iota((C, C), 1)
  sim = jnp.where(seen, common.polynomial(a, call), 0.0)
  slope = jnp.where(seen, common.derivative(a, call), 0.0)
  dsim = mma((do_s, v_s.transpose((1, 0))), shape=(C, C))
  num = None if call.square else (sim * dsim).sum(axis=1)
  z = sim.sum(axis=1)
  terms = [((slope * dsim).astype(bf16), k_s)]
  dden = mma((slope.astype(bf16), k_s), shape=(C, F))
  quadratic, linear = common.denominator(q_s, kk_s, call)
  x = plgpu.load(q_s, layout=LAYOUT)
  xf = x.astype(f32)
  form = quadratic if linear is None else quadratic + linear
  z = z + (form * xf).sum(axis=1) + call.c0 * past
  dden = dden + quadratic + form
  r = 1.0 / (z + call.eps)
  rolled = mma((q_s, rolls_s), shape=(C, _CYCLIC_E)).astype(bf16)
  u = mma((do_s, kv_s), shape=(C, call.E))
  if num is not None:
    phi = common.query_features(x, rolled, call)
    for i in range(call.blocks):
      num = num + (u[:, block(i)] * phi[i].astype(f32)).sum(axis=1)
  dnum, more = _through_cyclic(u, rolled, xf, rolls_s, weighted=True)
  if call.c1:
    dnum = dnum + u[:, block(CYCLIC)] * call.c1
  dnum = dnum + mma(*terms, *more, shape=(C, F))
  if num is None:
    num = (dnum * xf).sum(axis=1) * 0.5
  dz = -(num * r) * r
  return columns(r, F) * dnum + columns(dz, F) * dden, r, dz


def _through_cyclic(u, rolled, xf, rolls_s, *, weighted: bool):
  """J(x)ᵀ u of the cyclic features: a sum, and the terms of a product."""
  sums, terms, twice = {1.0: None, 2.0: None}, [], xf + xf
  for i in range(CYCLIC):
    w = common.weight(i) if weighted else 1.0
    part = u[:, block(i)] * rolled[:, block(i)].astype(f32)
    sums[w] = part if sums[w] is None else sums[w] + part
    back = rolls_s.at[:, pl.ds(i * F, F)].transpose((1, 0))
    scaled = twice if w == 2.0 else xf
    terms.append(((u[:, block(i)] * scaled).astype(bf16), back))
  return sums[1.0] + 2.0 * sums[2.0] if weighted else sums[1.0], terms


def backward_keys(q, k, v, do, r, dz, kv, kk, call, *, state: bool):
  """dk, dv and, where asked for, the cotangents before each slice.

  `kv` and `kk` are the cotangents behind the slices, or None.
  """
  after = kv is not None
  inputs = [q, k, v, do, r, dz, *(kv, kk) * after]
  inputs.append(jnp.asarray(common.rolls(), bf16))
  out = [
    jax.ShapeDtypeStruct((call.B, call.rows, call.H, F), bf16),
    jax.ShapeDtypeStruct((call.B, call.rows, call.H, call.P), bf16),
  ]
  return plgpu.kernel(
    functools.partial(_dkv_kernel, call=call, after=after, before=state),
    out_type=out + _cotangent_shapes(call) * state,
    compiler_params=common.compiler_params(),
    kernel_name="polynomial_backward_keys",
    **call.grid,
  )(*inputs)


def query_cotangents(q, do, r, dz, call: common.Call):
  """The cotangents before each slice, of the slice's own queries."""
  return plgpu.kernel(
    functools.partial(_cotangent_kernel, call=call),
    out_type=_cotangent_shapes(call),
    compiler_params=common.compiler_params(),
    kernel_name="polynomial_query_cotangent",
    **call.grid,
  )(q, do, r, dz, jnp.asarray(common.rolls(), bf16))


def _cotangent_shapes(call: common.Call) -> list:
  shape = (call.slices, call.B, call.H, V)
  return [
    jax.ShapeDtypeStruct((*shape, call.E), f32),
    jax.ShapeDtypeStruct((*shape, F), f32),
  ]


def _dkv_kernel(
  q_ref, k_ref, v_ref, do_ref, r_ref, dz_ref, *refs, call, after, before
):
  """One slice of one head, from its end; grid (slices, H, B)."""
  after_refs, refs = (refs[:2], refs[2:]) if after else (None, refs)
  rolls_ref, dk_ref, dv_ref, *before_refs = refs
  s, h, b = (lax.axis_index(name) for name in ("s", "h", "b"))
  first = s * call.chunks
  chunks = jnp.minimum(call.chunks, call.total - first)

  def body(
    q_b,
    k_b,
    v_b,
    do_b,
    r_b,
    dz_b,
    wide_s,
    phi_s,
    kv_s,
    kk_s,
    dk_s,
    dv_s,
    rolls_s,
    barriers,
    once,
  ):
    def fetch(i, slot):
      chunk = first + chunks - 1 - i
      common.prefetch(
        (q_ref, k_ref, v_ref, do_ref),
        (q_b, k_b, v_b, do_b),
        barriers,
        chunk,
        slot,
      )
      common.prefetch_rows((r_ref, dz_ref), (r_b, dz_b), barriers, chunk, slot)

    plgpu.copy_gmem_to_smem(rolls_ref, rolls_s, once.at[0])
    wide_s[...] = common.zeros((C, V), bf16)
    for i in range(call.stages):
      pl.when(i < chunks)(functools.partial(fetch, i, i))
    kv, kk, _ = common.load_state(after_refs, s, b, h, call)
    kv_s[...] = kv.astype(bf16)
    common.store_split(kk_s, kk)
    plgpu.commit_smem()
    plgpu.barrier_wait(once.at[0])

    def step(i, carry):
      slot = lax.rem(i, call.stages)
      plgpu.barrier_wait(barriers.at[slot])
      q_s, k_s, v_s, do_s = (x.at[slot] for x in (q_b, k_b, v_b, do_b))
      _store_queries(
        q_s, do_s, r_b.at[slot], dz_b.at[slot], rolls_s, phi_s, wide_s, call
      )
      plgpu.commit_smem()
      dk, dv = _dkv_chunk(
        q_s, k_s, v_s, do_s, dz_b.at[slot], kv_s, kk_s, rolls_s, call
      )
      plgpu.wait_smem_to_gmem(0)
      dv_s[...] = dv[:, : call.P].astype(bf16)
      dk_s[...] = dk.astype(bf16)
      plgpu.commit_smem()
      rows = pl.ds((first + chunks - 1 - i) * C, C)
      plgpu.copy_smem_to_gmem(dv_s, dv_ref.at[b, rows, h])
      plgpu.copy_smem_to_gmem(dk_s, dk_ref.at[b, rows, h])
      kv, kk = common.update(carry, wide_s, q_s, do_s, phi_s)
      kv_s[...] = kv.astype(bf16)
      common.store_split(kk_s, kk)
      plgpu.commit_smem()
      pl.when(i + call.stages < chunks)(lambda: fetch(i + call.stages, slot))
      return kv, kk

    kv, kk = lax.fori_loop(0, chunks, step, (kv, kk))
    plgpu.wait_smem_to_gmem(0)
    if before:
      before_refs[0][s, b, h] = kv
      before_refs[1][s, b, h] = kk

  wide = common.SWIZZLE_128 if call.P == V else common.SWIZZLE_32
  pl.run_scoped(
    body,
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, V),
    common.smem(call.stages, C, V),
    plgpu.SMEM((call.stages, C), f32),
    plgpu.SMEM((call.stages, C), f32),
    common.smem(C, V),
    common.smem(C, call.E),
    common.smem(V, call.E),
    common.smem(2, V, F),
    common.smem(C, F),
    common.smem(C, call.P, swizzle=wide),
    common.smem(F, _CYCLIC_E),
    plgpu.Barrier(num_arrivals=6, num_barriers=call.stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=1),
  )


def _store_queries(q_s, do_s, r_s, dz_s, rolls_s, phi_s, wide_s, call):
  """g = r do over do, the weighted features of the queries, and dz q̃."""
  r = plgpu.load(r_s, layout=_ROWS)
  dz = plgpu.load(dz_s, layout=_ROWS)
  do = plgpu.load(do_s, layout=LAYOUT).astype(f32)
  do_s[...] = (do * columns(r, V)).astype(bf16)
  rolled = mma((q_s, rolls_s), shape=(C, _CYCLIC_E))
  x = plgpu.load(q_s, layout=LAYOUT)
  common.store_blocks(phi_s, common.query_features(x, rolled, call))
  wide_s[:, pl.ds(0, F)] = (x.astype(f32) * columns(dz, F)).astype(bf16)
  if call.c1:
    line = jnp.where(common.iota((C, F), 1) == 0, columns(dz, F) * call.c1, 0.0)
    wide_s[:, pl.ds(F, F)] = line.astype(bf16)


def _dkv_chunk(q_s, k_s, v_s, g_s, dz_s, kv_s, kk_s, rolls_s, call):
  """dk (C, F) and dv (C, V) of a chunk; tiles are [key, query]."""
  a = mma((k_s, q_s.transpose((1, 0))), shape=(C, C))
  dsim = mma((v_s, g_s.transpose((1, 0))), shape=(C, C))
  seen = common.iota((C, C), 1) >= common.iota((C, C), 0)
  dz = plgpu.load(dz_s, layout=_COLUMNS)
  dsim = dsim + lax.broadcast_in_dim(dz, (C, C), [1])
  da = jnp.where(seen, dsim * common.derivative(a, call), 0.0).astype(bf16)
  sim = jnp.where(seen, common.polynomial(a, call), 0.0).astype(bf16)
  rolled = mma((k_s, rolls_s), shape=(C, _CYCLIC_E)).astype(bf16)
  x = plgpu.load(k_s, layout=LAYOUT)
  phi = common.key_features(x, rolled, call)
  terms = [
    (phi[i], kv_s.at[:, pl.ds(i * F, F)].transpose((1, 0)))
    for i in range(call.blocks)
  ]
  dv = mma((sim, g_s), *terms, shape=(C, V))
  u = mma((v_s, kv_s), shape=(C, call.E))
  kk = lambda start: [kk_s.at[i, pl.ds(start, F)] for i in (0, 1)]
  dk = 2.0 * mma(*[(k_s, half) for half in kk(0)], shape=(C, F))
  part, more = _through_cyclic(
    u, rolled, x.astype(f32), rolls_s, weighted=False
  )
  dk = dk + part
  if call.c1:
    one = common.two_columns(1.0, 0.0)
    dk = dk + mma(*[(one, half) for half in kk(F)], shape=(C, F))
    dk = dk + u[:, block(CYCLIC)]
  return dk + mma((da, q_s), *more, shape=(C, F)), dv


def _cotangent_kernel(
  q_ref, do_ref, r_ref, dz_ref, rolls_ref, kv_ref, kk_ref, *, call
):
  """One slice of one head; grid (slices, H, B)."""
  s, h, b = (lax.axis_index(name) for name in ("s", "h", "b"))
  first = s * call.chunks
  chunks = jnp.minimum(call.chunks, call.total - first)

  def body(q_b, do_b, r_b, dz_b, wide_s, phi_s, rolls_s, barriers, once):
    def fetch(i, slot):
      common.prefetch((q_ref, do_ref), (q_b, do_b), barriers, first + i, slot)
      common.prefetch_rows(
        (r_ref, dz_ref), (r_b, dz_b), barriers, first + i, slot
      )

    plgpu.copy_gmem_to_smem(rolls_ref, rolls_s, once.at[0])
    wide_s[...] = common.zeros((C, V), bf16)
    for i in range(call.stages):
      pl.when(i < chunks)(functools.partial(fetch, i, i))
    plgpu.barrier_wait(once.at[0])

    def step(i, carry):
      slot = lax.rem(i, call.stages)
      plgpu.barrier_wait(barriers.at[slot])
      q_s, do_s = q_b.at[slot], do_b.at[slot]
      _store_queries(
        q_s, do_s, r_b.at[slot], dz_b.at[slot], rolls_s, phi_s, wide_s, call
      )
      plgpu.commit_smem()
      carry = common.update(carry, wide_s, q_s, do_s, phi_s)
      pl.when(i + call.stages < chunks)(lambda: fetch(i + call.stages, slot))
      return carry

    zero = (common.zeros((V, call.E)), common.zeros((V, F)))
    kv, kk = lax.fori_loop(0, chunks, step, zero)
    kv_ref[s, b, h] = kv
    kk_ref[s, b, h] = kk

  pl.run_scoped(
    body,
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, V),
    plgpu.SMEM((call.stages, C), f32),
    plgpu.SMEM((call.stages, C), f32),
    common.smem(C, V),
    common.smem(C, call.E),
    common.smem(F, _CYCLIC_E),
    plgpu.Barrier(num_arrivals=4, num_barriers=call.stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=1),
  )
