"""Hopper kernels of the forward: o, and the state after a slice of time."""

import functools

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial import gpu_common as common
from pallas_kernels.polynomial.gpu_common import LAYOUT, C, F, V, bf16, f32

_CYCLIC_E = common.CYCLIC * F


def forward(q, k, v, kv, kk, count, call: common.Call, *, state: bool):
  """o (B, T, H, P) and, where asked for, (KVᵀ, KK) behind each slice.

  Args:
    q, k: (B, T, H, 16) bf16; v: (B, T, H, P) bf16.
    kv, kk, count: the states before the slices, (slices, B, H, …); or None.
    call: the launch.
    state: whether to write the states behind the slices.
  """
  shape = (call.slices, call.B, call.H, V)
  out = [jax.ShapeDtypeStruct((call.B, call.rows, call.H, call.P), bf16)]
  if state:
    out += [
      jax.ShapeDtypeStruct((*shape, call.E), f32),
      jax.ShapeDtypeStruct((*shape, F), f32),
    ]
  inputs = [q, k, v, jnp.asarray(common.rolls(), bf16)]
  if kv is not None:
    inputs += [kv, kk, count]
  body = functools.partial(
    _forward_kernel, call=call, before=kv is not None, after=state
  )
  return plgpu.kernel(
    body,
    out_type=out,
    compiler_params=common.compiler_params(),
    kernel_name="polynomial_forward",
    **call.grid,
  )(*inputs)


def _forward_kernel(*refs, call: common.Call, before: bool, after: bool):
  """One slice of one head, in order; grid (slices, H, B)."""
  q_ref, k_ref, v_ref, rolls_ref, *rest = refs
  before_refs, rest = (rest[:3], rest[3:]) if before else (None, rest)
  o_ref, *after_refs = rest
  s, h, b = (lax.axis_index(name) for name in ("s", "h", "b"))
  first = s * call.chunks
  chunks = jnp.minimum(call.chunks, call.total - first)

  def body(
    q_b, k_b, v_b, wide_s, phi_s, kv_s, kk_s, o_s, rolls_s, barriers, once
  ):
    fetch = lambda i, slot: common.prefetch(
      (q_ref, k_ref, v_ref), (q_b, k_b, v_b), barriers, first + i, slot
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
      q_s, k_s, v_s = q_b.at[slot], k_b.at[slot], v_b.at[slot]
      past = count + (i * C).astype(f32)
      o = _attend(q_s, k_s, v_s, kv_s, kk_s, rolls_s, past, call)
      plgpu.wait_smem_to_gmem(0)
      o_s[...] = o[:, : call.P].astype(bf16)
      common.store_keys(k_s, rolls_s, phi_s, wide_s, first + i, call)
      plgpu.commit_smem()
      rows = pl.ds((first + i) * C, C)
      plgpu.copy_smem_to_gmem(o_s, o_ref.at[b, rows, h])
      kv, kk = common.update(carry, wide_s, k_s, v_s, phi_s)
      kv_s[...] = kv.astype(bf16)
      common.store_split(kk_s, kk)
      plgpu.commit_smem()
      pl.when(i + call.stages < chunks)(lambda: fetch(i + call.stages, slot))
      return kv, kk

    kv, kk = lax.fori_loop(0, chunks, step, (kv, kk))
    plgpu.wait_smem_to_gmem(0)
    if after:
      after_refs[0][s, b, h] = kv
      after_refs[1][s, b, h] = kk

  wide = common.SWIZZLE_128 if call.P == 64 else common.SWIZZLE_32
  pl.run_scoped(
    body,
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, F),
    common.smem(call.stages, C, V),
    common.smem(C, V),
    common.smem(C, call.E),
    common.smem(V, call.E),
    common.smem(2, V, F),
    common.smem(C, call.P, swizzle=wide),
    common.smem(F, _CYCLIC_E),
    plgpu.Barrier(num_arrivals=3, num_barriers=call.stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=1),
  )


def key_states(k, v, call: common.Call):
  """(KVᵀ, KK) of each slice's own keys: (slices, B, H, V, E), (…, V, F)."""
  shape = (call.slices, call.B, call.H, V)
  return plgpu.kernel(
    functools.partial(_key_state_kernel, call=call),
    out_type=[
      jax.ShapeDtypeStruct((*shape, call.E), f32),
      jax.ShapeDtypeStruct((*shape, F), f32),
    ],
    compiler_params=common.compiler_params(),
    kernel_name="polynomial_key_state",
    **call.grid,
  )(k, v, jnp.asarray(common.rolls(), bf16))


def _key_state_kernel(k_ref, v_ref, rolls_ref, kv_ref, kk_ref, *, call):
  """One slice of one head; grid (slices, H, B)."""
  s, h, b = (lax.axis_index(name) for name in ("s", "h", "b"))
  first = s * call.chunks
  chunks = jnp.minimum(call.chunks, call.total - first)

  def body(k_b, v_b, wide_s, phi_s, rolls_s, barriers, once):
    fetch = lambda i, slot: common.prefetch(
      (k_ref, v_ref), (k_b, v_b), barriers, first + i, slot
    )
    plgpu.copy_gmem_to_smem(rolls_ref, rolls_s, once.at[0])
    wide_s[...] = common.zeros((C, V), bf16)
    for i in range(call.stages):
      pl.when(i < chunks)(functools.partial(fetch, i, i))
    plgpu.commit_smem()
    plgpu.barrier_wait(once.at[0])

    def step(i, carry):
      slot = lax.rem(i, call.stages)
      plgpu.barrier_wait(barriers.at[slot])
      k_s, v_s = k_b.at[slot], v_b.at[slot]
      common.store_keys(k_s, rolls_s, phi_s, wide_s, first + i, call)
      plgpu.commit_smem()
      carry = common.update(carry, wide_s, k_s, v_s, phi_s)
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
    common.smem(C, V),
    common.smem(C, call.E),
    common.smem(F, _CYCLIC_E),
    plgpu.Barrier(num_arrivals=2, num_barriers=call.stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=1),
  )


def _attend(q_s, k_s, v_s, kv_s, kk_s, rolls_s, past, call: common.Call):
  """o of the chunk's queries, (C, V) float32."""

  def scores(a, rolled):
    plgpu.wgmma(a, q_s, k_s.transpose((1, 0)))
    plgpu.wgmma(rolled, q_s, rolls_s)
    return a[...], rolled[...]

  a, rolled = pl.run_scoped(
    scores, plgpu.ACC((C, C), f32), plgpu.ACC((C, _CYCLIC_E), f32)
  )
  x = plgpu.load(q_s, layout=LAYOUT)
  phi = common.query_features(x, rolled, call)
  seen = common.iota((C, C), 0) >= common.iota((C, C), 1)
  sim = jnp.where(seen, common.polynomial(a, call), 0.0)
  z = sim.sum(axis=1)
  sim = sim.astype(bf16)
  quadratic, linear = common.denominator(q_s, kk_s, call)
  if linear is not None:
    quadratic = quadratic + linear
  z = z + (quadratic * x.astype(f32)).sum(axis=1) + call.c0 * past
  terms = [
    (phi[r], kv_s.at[:, pl.ds(r * F, F)].transpose((1, 0)))
    for r in range(call.blocks)
  ]
  num = common.mma((sim, v_s), *terms, shape=(C, V))
  return num / common.columns(z + call.eps, V)
