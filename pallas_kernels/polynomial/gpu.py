"""Polynomial attention on Hopper GPUs: the five passes, by Pallas Mosaic GPU.

Where batch × heads leave the card idle, time is cut into slices. Each slice's
own state comes first, from its keys alone; their prefix sums, a state a head,
are what the slices of the main kernel start from. The backward does the same
with the cotangents, from the end.
"""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial import gpu_backward, gpu_common, gpu_forward
from pallas_kernels.polynomial.gpu_common import Call
from pallas_kernels.polynomial.passes import Kernel
from pallas_kernels.polynomial.spec import State

PROGRAMS = 264  # two on each of an H100's 132 multiprocessors


def supports(
  q: Array, v: Array, segment_ids: Array | None, kernel: Kernel, *, states: bool
) -> None:
  """Raises NotImplementedError with the reason where "xla" must do the call."""
  F, P = q.shape[-1], v.shape[-1]
  reasons = [
    (q.dtype != jnp.bfloat16, f"dtype {q.dtype}: bfloat16 only"),
    (F > gpu_common.F, f"F={F}: 1 to {gpu_common.F}"),
    (states and F != gpu_common.F, f"states with F={F}: {gpu_common.F} only"),
    (P > gpu_common.V, f"P={P}: 1 to {gpu_common.V}"),
    (segment_ids is not None, "segment_ids"),
    (kernel.coefficients.c2 <= 0, "c2 ≤ 0"),
    (kernel.eps <= 0, "eps = 0"),
  ]
  for fails, reason in reasons:
    if fails:
      raise NotImplementedError(
        f"implementation='gpu' does not do {reason}; 'xla' does"
      )


def forward(q, k, v, runs_BT, state, kernel: Kernel, *, return_state: bool):
  """o_BTHP and the state after the last token, if asked for."""
  del runs_BT
  T, P = q.shape[1], v.shape[-1]
  call = _call(q, v, kernel)
  q, k, v = _fill(q, k, v)
  before, own = _prefix(k, v, state, call)
  alone = call.slices == 1
  o, *after = gpu_forward.forward(
    q, k, v, *before, call, state=return_state and alone
  )
  o = o[:, :T, :, :P]
  if not return_state:
    return o, None
  if not alone:
    after = [x + y for x, y in zip(before[:2], own, strict=True)]
  kv, kk = (x[-1] for x in after)
  count = jnp.full(kv.shape[:2], T, jnp.float32)
  if state is not None and kernel.coefficients.affine:
    count += state.kk_BHGG[:, :, -1, -1]
  after = gpu_common.from_kernel(kv, kk, count, P, call)
  return o, after if state is None else _skew(after, state)


def key_state(k, v, runs_BT, kernel: Kernel) -> State:
  """The state after the last token, from a zero state."""
  del runs_BT
  call = _call(k, v, kernel)
  _, filled_k, filled_v = _fill(k, k, v)
  kv, kk = (
    x.sum(axis=0) for x in gpu_forward.key_states(filled_k, filled_v, call)
  )
  count = jnp.full(kv.shape[:2], k.shape[1], jnp.float32)
  return gpu_common.from_kernel(kv, kk, count, v.shape[-1], call)


def backward_queries(q, k, v, do, runs_BT, state, kernel: Kernel):
  """dq_BTHF; and r, dz divided and multiplied by c2, (B, H, T filled up)."""
  del runs_BT
  _, T, _, F = q.shape
  call = _call(q, v, kernel)
  q, k, v, do = _fill(q, k, v, do)
  before, _ = _prefix(k, v, state, call)
  dq, r, dz = gpu_backward.backward_queries(q, k, v, do, *before, call)
  return dq[:, :T, :, :F], r, dz


def backward_keys(
  q, k, v, do, r, dz, runs_BT, dstate, kernel: Kernel, *, return_state: bool
):
  """dk_BTHF, dv_BTHP and the cotangent of the state before, if asked for."""
  del runs_BT
  _, T, _, F = q.shape
  P = v.shape[-1]
  call = _call(q, v, kernel)
  q, k, v, do = _fill(q, k, v, do)
  after, own = _suffix(q, do, r, dz, dstate, call)
  alone = call.slices == 1
  dk, dv, *before = gpu_backward.backward_keys(
    q, k, v, do, r, dz, *after, call, state=return_state and alone
  )
  dk, dv = dk[:, :T, :, :F], dv[:, :T, :, :P]
  if not return_state:
    return dk, dv, None
  if not alone:
    before = [x + y for x, y in zip(after, own, strict=True)]
  kv, kk = (x[0] for x in before)
  return dk, dv, _cotangent(kv, kk, dz, dstate, P, call)


def query_cotangent(q, do, r, dz, runs_BT, kernel: Kernel) -> State:
  """The cotangent of the state before token 0, from these queries alone."""
  del runs_BT
  call = _call(q, do, kernel)
  q, _, do = _fill(q, q, do)
  kv, kk = (
    x.sum(axis=0) for x in gpu_backward.query_cotangents(q, do, r, dz, call)
  )
  return _cotangent(kv, kk, dz, None, do.shape[-1], call)


def _call(q, v, kernel: Kernel) -> Call:
  B, T, H, _ = q.shape
  P = -(-v.shape[-1] // 16) * 16
  return gpu_common.make_call(B, T, H, P, kernel, PROGRAMS)


def _fill(q, k, v, *more):
  """Zeros up to F = 16, P a multiple of 16 and T of 8, as TMA needs them.

  Nothing is copied where the sizes fit, as the usual ones do.
  """

  def fill(x, width):
    T = x.shape[1]
    pad = ((0, 0), (0, -T % 8), (0, 0), (0, width - x.shape[-1]))
    return x if not any(after for _, after in pad) else jnp.pad(x, pad)

  P = -(-v.shape[-1] // 16) * 16
  wide = (fill(x, P) for x in (v, *more))
  return fill(q, gpu_common.F), fill(k, gpu_common.F), *wide


def _prefix(k, v, state: State | None, call: Call):
  """((KVᵀ, KK, count) before each slice, each slice's own (KVᵀ, KK)).

  Three None where all that is before is 0; None for the own of a single slice.
  """
  if state is None and call.slices == 1:
    return (None, None, None), None
  outer, count = None, jnp.zeros((call.B, call.H), jnp.float32)
  if state is not None:
    outer = gpu_common.to_kernel(state, call)
    if call.c0:
      count = state.kk_BHGG[:, :, -1, -1]
  own = gpu_forward.key_states(k, v, call) if call.slices > 1 else None
  kv, kk = _exclusive(own, outer, call)
  steps = jnp.arange(call.slices, dtype=jnp.float32) * (
    call.chunks * gpu_common.C
  )
  return (kv, kk, steps[:, None, None] + count[None]), own


def _suffix(q, do, r, dz, dstate: State | None, call: Call):
  """((KVᵀ, KK) behind each slice, each slice's own); None where all are 0."""
  outer = None
  if dstate is not None:
    outer = gpu_common.to_kernel(dstate, call, cotangent=True)
  if call.slices == 1:
    return (tuple(x[None] for x in outer) if outer else (None, None)), None
  own = gpu_backward.query_cotangents(q, do, r, dz, call)
  flip = lambda xs: tuple(x[::-1] for x in xs)
  return flip(_exclusive(flip(own), outer, call)), own


def _exclusive(own, outer, call: Call):
  """Sums over the slices before each one, on top of `outer`."""
  if own is None:
    return tuple(x[None] for x in outer)
  start = outer or tuple(jnp.zeros_like(x[0]) for x in own)
  total = lambda x, first: jnp.cumsum(
    jnp.concatenate([first[None], x[:-1]]), axis=0
  )
  return tuple(map(total, own, start))


def _cotangent(kv, kk, dz, dstate, P: int, call: Call) -> State:
  """The public form; the corner of KK is Σ c0 dz."""
  corner = call.c0 * dz.sum(axis=-1)
  if dstate is not None and (call.c0 or call.c1):
    corner += dstate.kk_BHGG[:, :, -1, -1]
  found = gpu_common.from_kernel(kv, kk, corner, P, call, cotangent=True)
  return found if dstate is None else _skew(found, dstate)


def _skew(state: State, outer: State) -> State:
  """Puts the antisymmetric part of KK back, which no sum over tokens has."""
  kk = outer.kk_BHGG
  return state._replace(kk_BHGG=state.kk_BHGG + (kk - kk.swapaxes(2, 3)) / 2)
