"""The five passes of the Hopper implementation, as `operator.Passes` has them.

One path serves every F. A pass plans its launches (`launch.make_plan`), pads
the arrays, finds the states at slice boundaries, runs each launch of the plan,
and brings the results into the public form. With one part (F ≤ 16) the only
launch gives the results. With more, `within_chunk.py` finishes its sums.

Two forms go from pass to pass. `before` is a list with the states before the
slices of each launch. r and dz are (B, H · value_tiles, T padded to chunks)
float32, where r is repeated for the value tiles of a head and dz is 0 except in
the first, so that sums over the tiles count it once.
"""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  backward as backward_kernels,
  documents,
  forward as forward_kernels,
  states,
  time_slices,
  within_chunk,
)
from pallas_kernels.polynomial.gpu.documents import Documents
from pallas_kernels.polynomial.gpu.launch import (
  PART,
  Launch,
  Plan,
  make_plan,
)
from pallas_kernels.polynomial.operator import Kernel, raise_if_unsupported
from pallas_kernels.polynomial.state import State

F_MAX = 64
P_MAX = 128


def supports(q: Array, v: Array, kernel: Kernel, *, states: bool) -> None:
  """Raise NotImplementedError with the reason if a call cannot run here.

  Args:
    q: queries (B, T, H, F).
    v: values (B, T, H, P).
    kernel: the static numbers of the call.
    states: whether the call takes or returns a state, or splits time.
  """
  F, P = q.shape[-1], v.shape[-1]
  reasons = [
    (
      q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32),
      f"dtype {q.dtype}: bfloat16, float16 and float32 only",
    ),
    (F > F_MAX, f"F={F}: 1 to {F_MAX}"),
    (
      q.dtype == jnp.float32 and F > PART,
      f"float32 with F={F}: 1 to {PART}",
    ),
    (states and F < PART, f"states with F={F}: {PART} or more"),
    (P > P_MAX, f"P={P}: 1 to {P_MAX}"),
    (kernel.coefficients.c2 <= 0, "c2 ≤ 0"),
    (kernel.eps <= 0, "eps = 0"),
    (jax.config.jax_enable_x64, "jax_enable_x64"),
  ]
  raise_if_unsupported("gpu", reasons)


def forward(
  q: Array,
  k: Array,
  v: Array,
  runs_BT: Array | None,
  state: State | None,
  kernel: Kernel,
  *,
  return_state: bool,
) -> tuple[Array, State | None, list[tuple]]:
  """Return o_BTHP, the state after the last token or None, and `before`."""
  plan = make_plan(q, v, runs_BT, kernel)
  T = plan.whole.T
  q, k, v = plan.pad_features(q), plan.pad_features(k), plan.pad_values(v)
  masks = documents.describe(runs_BT, plan)
  before = [
    time_slices.states_before(
      k, v, masks, states.to_kernel(state, launch, plan), state, launch
    )
    for launch in plan.launches
  ]
  sums, after = [], []
  for launch, states_before in zip(plan.launches, before, strict=True):
    one_slice = launch.slices == 1
    outputs, states_after = forward_kernels.forward(
      q,
      k,
      v,
      documents.kernel_inputs(masks, launch, past=True),
      states_before,
      launch,
      write_states=return_state and one_slice,
    )
    sums.append(outputs)
    after.append(states_after if one_slice else states_before[:2])
  if plan.fused:
    ((o,),) = sums
  else:
    per_token = documents.kernel_inputs(masks, plan.whole)
    o = within_chunk.forward(q, k, v, per_token, sums, plan)
  o = o[:, :T, :, : plan.P]
  if not return_state:
    return o, None, before
  found = [[x[-1] for x in arrays] for arrays in after]
  count_BH = documents.last_document_tokens(runs_BT, plan.whole)
  count_BH = time_slices.total_count(count_BH, state, masks, plan.whole)
  final = states.from_kernel(found, count_BH, plan)
  return o, states.restore_lost(final, state, masks, plan), before


def key_state(
  k: Array, v: Array, runs_BT: Array | None, kernel: Kernel
) -> State:
  """Return the state after the last token, from a zero state."""
  plan = make_plan(k, v, runs_BT, kernel)
  k, v = plan.pad_features(k), plan.pad_values(v)
  masks = documents.describe(runs_BT, plan)
  found = [
    time_slices.key_state(k, v, masks, launch) for launch in plan.launches
  ]
  count_BH = documents.last_document_tokens(runs_BT, plan.whole)
  return states.from_kernel(found, count_BH, plan)


def backward_queries(
  q: Array,
  k: Array,
  v: Array,
  do: Array,
  runs_BT: Array | None,
  before: list[tuple],
  kernel: Kernel,
) -> tuple[Array, Array, Array]:
  """Return dq_BTHF, r and dz."""
  plan = make_plan(q, v, runs_BT, kernel)
  T = plan.whole.T
  q, k = plan.pad_features(q), plan.pad_features(k)
  v, do = plan.pad_values(v), plan.pad_values(do)
  masks = documents.describe(runs_BT, plan)
  sums = [
    backward_kernels.backward_queries(
      q,
      k,
      v,
      do,
      documents.kernel_inputs(masks, launch, past=True),
      states_before,
      launch,
    )
    for launch, states_before in zip(plan.launches, before, strict=True)
  ]
  if plan.fused:
    ((dq, r, dz),) = sums
    dq, dz = _sum_over_value_tiles(dq, dz, plan.whole)
  else:
    per_token = documents.kernel_inputs(masks, plan.whole)
    dq, r, dz = within_chunk.backward_queries(
      q, k, v, do, per_token, sums, plan
    )
    if plan.whole.value_tiles > 1:
      r = jnp.repeat(r, plan.whole.value_tiles, axis=1)
  dz = states.in_first_tile(dz, plan.whole)
  return dq[:, :T, :, : plan.F], r, dz


def backward_keys(
  q: Array,
  k: Array,
  v: Array,
  do: Array,
  r: Array,
  dz: Array,
  runs_BT: Array | None,
  dstate: State | None,
  kernel: Kernel,
  *,
  return_state: bool,
) -> tuple[Array, Array, State | None]:
  """Return dk_BTHF, dv_BTHP and the cotangent of the incoming state or None."""
  plan = make_plan(q, v, runs_BT, kernel)
  T = plan.whole.T
  q, k = plan.pad_features(q), plan.pad_features(k)
  v, do = plan.pad_values(v), plan.pad_values(do)
  masks = documents.describe(runs_BT, plan)
  sums, before = [], []
  for launch in plan.launches:
    one_slice = launch.slices == 1
    per_token = dict(r=r, dz=dz) | documents.kernel_inputs(masks, launch)
    final = states.to_kernel(dstate, launch, plan, cotangent=True)
    after = time_slices.cotangents_after(q, do, per_token, masks, final, launch)
    outputs, states_before = backward_kernels.backward_keys(
      q,
      k,
      v,
      do,
      per_token,
      after,
      launch,
      write_states=return_state and one_slice,
    )
    sums.append(outputs)
    before.append(states_before if one_slice else after)
  if plan.fused:
    ((dk, dv),) = sums
    dk = _sum_features_over_value_tiles(dk, plan.whole)
  else:
    heads = dict(r=_of_heads(r, plan.whole), dz=_of_heads(dz, plan.whole))
    per_token = heads | documents.kernel_inputs(masks, plan.whole)
    dk, dv = within_chunk.backward_keys(q, k, v, do, per_token, sums, plan)
  dk, dv = dk[:, :T, :, : plan.F], dv[:, :T, :, : plan.P]
  if not return_state:
    return dk, dv, None
  found = [[x[0] for x in arrays] for arrays in before]
  return dk, dv, _cotangent(found, dz, dstate, masks, plan)


def query_cotangent(
  q: Array,
  do: Array,
  r: Array,
  dz: Array,
  runs_BT: Array | None,
  kernel: Kernel,
) -> State:
  """Return the incoming state's cotangent, if the returned one's is 0."""
  plan = make_plan(q, do, runs_BT, kernel)
  q, do = plan.pad_features(q), plan.pad_values(do)
  masks = documents.describe(runs_BT, plan)
  found = []
  for launch in plan.launches:
    per_token = dict(r=r, dz=dz) | documents.kernel_inputs(masks, launch)
    found.append(time_slices.query_cotangent(q, do, per_token, masks, launch))
  return _cotangent(found, dz, None, masks, plan)


def _cotangent(
  found: list[list[Array]],
  dz: Array,
  dstate: State | None,
  masks: Documents | None,
  plan: Plan,
) -> State:
  """Bring the cotangent of the incoming state into the public form.

  The kernels have no cotangent of the count of tokens. It is Σ c0 dz over the
  queries of the first document.
  """
  whole = plan.whole
  if masks is not None:
    dz = jnp.where(masks.first_B1T, dz, 0)
  count_BH = whole.c0 * _of_heads(dz, whole).sum(axis=-1)
  count_BH = time_slices.total_count(count_BH, dstate, masks, whole)
  cotangent = states.from_kernel(found, count_BH, plan, cotangent=True)
  return states.restore_lost(cotangent, dstate, masks, plan)


def _of_heads(x: Array, whole: Launch) -> Array:
  """Take the first value tile's line of each head, (B, H, T)."""
  return x[:, :: whole.value_tiles]


def _sum_over_value_tiles(
  dq: Array, dz: Array, whole: Launch
) -> tuple[Array, Array]:
  """Sum the value tiles' shares of dq (B, T, launch, 16) and of dz."""
  if whole.value_tiles == 1:
    return dq, dz
  dq = _sum_features_over_value_tiles(dq, whole)
  dz = dz.reshape(whole.B, whole.H, whole.value_tiles, -1).sum(axis=2)
  return dq, dz


def _sum_features_over_value_tiles(x: Array, whole: Launch) -> Array:
  """Sum the value tiles' shares of dq or dk, (B, T, launch, 16), in float32."""
  if whole.value_tiles == 1:
    return x
  each = x.reshape(*x.shape[:2], whole.H, whole.value_tiles, -1)
  return each.astype(jnp.float32).sum(axis=3).astype(x.dtype)
