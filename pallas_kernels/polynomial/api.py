"""The public functions: check the arguments, choose an implementation."""

import dataclasses
from typing import Literal
import warnings

from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices, documents as documents_lib, numerics
from pallas_kernels.polynomial import (
  checks,
  decode,
  operator as sharded,
  spec,
  xla,
)
from pallas_kernels.polynomial.spec import REBASED, Coefficients, State
from pallas_kernels.sharding import ShardAxes, vary_alike

Implementation = Literal["gpu", "gpu_shared", "tpu", "xla", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = (
  "gpu",
  "gpu_shared",
  "tpu",
  "xla",
  "reference",
)


def polynomial_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  coefficients: Coefficients = REBASED,
  scale: float | None = None,
  eps: float = 1e-6,
  segment_ids: Array | None = None,
  initial_state: State | None = None,
  return_state: bool = False,
  axes: ShardAxes | None = None,
  implementation: Implementation | None = None,
) -> Array | tuple[Array, State]:
  """Causal, normalised attention with sim = c0 + c1·s + c2·s², s = scale·q·k.

  Differentiable in q, k, v and the initial state; time and memory are linear
  in T, and so are those of the gradient.

  Args:
    q: (B, T, H, F), float32, bfloat16, float16 or float64.
    k: (B, T, H, F), of q's dtype.
    v: (B, T, H, P), of q's dtype.
    coefficients: of sim; `REBASED` (the default) or `BASED`, or your own.
    scale: of q·k; None is F^(−1/2).
    eps: added to the denominator Σ sim; 0 leaves 0/0 where all scores are 0.
    segment_ids: integers (B, T). A document is a run of one id; a token sees
      its own document alone. An Inf or NaN in one stays in it; without ids it
      may reach any token of its row.
    initial_state: belongs to the document of token 0; a caller whose token 0
      starts a document passes None or zeros.
    return_state: return (o, state) with the state after the last token, of
      the last token's document.
    axes: the axes of the ambient mesh that split batch, heads and time.
    implementation: "gpu" (Hopper kernels; operands of q's dtype, sums float32),
      "gpu_shared" (the same, with no operand of the tensor core in registers:
      slower, to tell a compiler's fault from ours), "tpu" (TPU kernels; the
      same), "xla" (chunked, linear; everywhere), "reference" (quadratic; also
      for forward mode and higher derivatives) or None: the device's kernels, or
      "xla" with a warning where they cannot.

  Returns:
    o (B, T, H, P) in v's dtype, or (o, state).

  Raises:
    ValueError: an argument does not fit; it names the argument.
    NotImplementedError: the named implementation cannot do this call.
  """
  checks.sequences(q, k, v, segment_ids)
  kernel = checks.kernel(q, coefficients, scale, eps)
  B, T, H, F = q.shape
  P = v.shape[-1]
  if initial_state is not None:
    checks.state(
      "initial_state", initial_state, B, H, F, P, coefficients, q.dtype
    )
  if axes is not None:
    axes.check(B, H, T)
  states = initial_state is not None or return_state
  arrays = vary_alike(q, k, v, segment_ids, initial_state)
  q, k, v, segment_ids, initial_state = arrays
  name = _choose(implementation, q, v, kernel, segment_ids, states, axes)
  if name == "reference":
    return _reference(q, k, v, kernel, segment_ids, initial_state, return_state)
  kernel = dataclasses.replace(kernel, by_shared=name == "gpu_shared")
  call = sharded.Call(_passes(name), kernel, axes, return_state)
  o, state = sharded.attend(call, *arrays)
  return (o, state) if return_state else o


def polynomial_attention_step(
  state: State,
  q: Array,
  k: Array,
  v: Array,
  *,
  coefficients: Coefficients = REBASED,
  scale: float | None = None,
  eps: float = 1e-6,
) -> tuple[Array, State]:
  """One token: `polynomial_attention` at T = 1 from a state, at any position.

  Args:
    state: of the tokens before, from `polynomial_attention(return_state=True)`,
      from an earlier step, or `zero_state`.
    q: (B, H, F); k: (B, H, F); v: (B, H, P).
    coefficients: as in `polynomial_attention`; so are `scale` and `eps`.

  Returns:
    (o, state): o is (B, H, P), in v's dtype.

  Raises:
    ValueError: an argument does not fit; it names the argument.
  """
  checks.arrays(q, k, v, "(B, H, F)", "(B, H, P)", 3)
  kernel = checks.kernel(q, coefficients, scale, eps)
  B, H, F = q.shape
  checks.state("state", state, B, H, F, v.shape[-1], coefficients, q.dtype)
  return decode.step(state, q, k, v, kernel)


def polynomial_attention_at(
  q: Array,
  k: Array,
  v: Array,
  positions: Array,
  *,
  coefficients: Coefficients = REBASED,
  scale: float | None = None,
  eps: float = 1e-6,
  segment_ids: Array | None = None,
) -> Array:
  """`polynomial_attention` at chosen positions alone, for few of them.

  Time and memory are of the order M·T; gradients are jax's own.

  Args:
    q: (B, M, H, F), the queries of these positions.
    k: (B, T, H, F); v: (B, T, H, P).
    positions: integers (B, M), each in [0, T), in any order; another has NaN.
    coefficients: as in `polynomial_attention`; so are scale, eps, segment_ids.

  Returns:
    o (B, M, H, P), in v's dtype.

  Raises:
    ValueError: an argument does not fit; it names the argument.
  """
  checks.sequences(k, k, v, segment_ids, names="kkv")
  B, T, H, F = k.shape
  if q.ndim != 4 or (q.shape[0], *q.shape[2:]) != (B, H, F):
    raise ValueError(f"q has shape {q.shape}: expected {(B, 'M', H, F)}")
  if q.dtype != k.dtype:
    raise ValueError(f"q is {q.dtype}: expected k's dtype, {k.dtype}")
  if positions.shape != q.shape[:2]:
    raise ValueError(
      f"positions has shape {positions.shape}: expected (B, M) = {q.shape[:2]}"
    )
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise ValueError(f"positions is {positions.dtype}: expected integers")
  kernel = checks.kernel(q, coefficients, scale, eps)
  inside_BM = (positions >= 0) & (positions < T)
  mask_BMT = positions[:, :, None] >= jnp.arange(T)[None, None]
  if segment_ids is not None:
    runs_BT = documents_lib.document_runs(segment_ids)
    own_BM = jnp.take_along_axis(runs_BT, positions, axis=1)
    mask_BMT = mask_BMT & (own_BM[:, :, None] == runs_BT[:, None])
  o_BMHP = spec.reference(
    q, k, v, mask_BMT, coefficients=kernel.coefficients, eps=kernel.eps
  )
  return jnp.where(inside_BM[:, :, None, None], o_BMHP, jnp.nan)


def polynomial_attention_weights(
  q: Array,
  k: Array,
  *,
  coefficients: Coefficients = REBASED,
  scale: float | None = None,
  eps: float = 1e-6,
) -> Array:
  """The matrix A (B, H, T, T) with o_t = Σ_s A_ts v_s, to look at.

  Args:
    q: (B, T, H, F); k: (B, T, H, F).
    coefficients: as in `polynomial_attention`; so are scale and eps.
  """
  checks.arrays(q, k, k, "(B, T, H, F)", "(B, T, H, F)", 4)
  kernel = checks.kernel(q, coefficients, scale, eps)
  T = q.shape[1]
  mask_BTT = jnp.tril(jnp.ones((1, T, T), bool))
  sim_BHTT = spec.weights_BHTS(q, k, mask_BTT, kernel.coefficients)
  return sim_BHTT / (sim_BHTT.sum(axis=-1, keepdims=True) + kernel.eps)


def which_implementation(
  implementation: str | None = None, *, axes: ShardAxes | None = None
) -> tuple[str, str]:
  """(name, reason): what calls run on this device, unless a call is special.

  Raises:
    ValueError: there is no implementation of that name.
    NotImplementedError: the named one cannot run here.
  """
  if implementation is None:
    if devices.platform() == "tpu":
      return _on_a_tpu()
    try:
      devices.check_gpu()
    except NotImplementedError as error:
      return "xla", str(error)
    return "gpu", "a Hopper GPU; calls that its kernels cannot do run 'xla'"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r}: expected None or one of "
      f"{IMPLEMENTATIONS}"
    )
  if implementation in ("gpu", "gpu_shared"):
    devices.check_gpu()
  if implementation == "tpu":
    devices.tpu_generation()
  if implementation == "reference" and axes is not None and axes.time:
    raise NotImplementedError(
      f"implementation='reference' does not split time (axes.time="
      f"{axes.time!r}); 'xla' does"
    )
  return implementation, "it was named"


def _on_a_tpu() -> tuple[str, str]:
  try:
    generation = devices.tpu_generation()
  except NotImplementedError as error:
    return "xla", str(error)
  return (
    "tpu",
    f"a TPU {generation}; calls that its kernels cannot do run 'xla'",
  )


def _choose(
  implementation, q, v, kernel, segment_ids, states: bool, axes
) -> str:
  """The implementation of this call, which is known to be able to do it."""
  name, reason = which_implementation(implementation, axes=axes)
  if name not in ("gpu", "gpu_shared", "tpu"):
    if implementation is None and devices.platform() != "cpu":
      warnings.warn(f"polynomial_attention runs 'xla': {reason}", stacklevel=3)
    return name
  states = states or (axes is not None and axes.time is not None)
  try:
    checks.unchecked(name, q)
    _passes(name).supports(q, v, segment_ids, kernel, states=states)
  except NotImplementedError as error:
    if implementation is not None:
      raise
    warnings.warn(f"polynomial_attention runs 'xla': {error}", stacklevel=3)
    return "xla"
  return name


def _passes(name: str):
  if name == "xla":
    return xla
  # Not at the top: Pallas takes long to import, and older jax cannot import
  # what the GPU kernels are written with.
  if name == "tpu":
    from pallas_kernels.polynomial.tpu import passes

    return passes
  from pallas_kernels.polynomial.gpu import passes

  return passes


def _reference(q, k, v, kernel, segment_ids, initial_state, return_state):
  T = q.shape[1]
  mask_BTS = jnp.tril(jnp.ones((1, T, T), bool))
  first_BT = last_BT = None
  if segment_ids is not None:
    runs_BT = documents_lib.document_runs(segment_ids)
    mask_BTS = mask_BTS & (runs_BT[:, :, None] == runs_BT[:, None])
    first_BT, last_BT = runs_BT == 0, runs_BT == runs_BT[:, -1:]
  o = spec.reference(
    q,
    k,
    v,
    mask_BTS,
    coefficients=kernel.coefficients,
    eps=kernel.eps,
    initial_state=initial_state,
    first_BT=first_BT,
  )
  if not return_state:
    return o
  acc = numerics.sum_dtype(q.dtype)
  k_BHTF, v_BHTP = (jnp.moveaxis(x.astype(acc), 2, 1) for x in (k, v))
  last_B1T = None if last_BT is None else last_BT[:, None]
  state = spec.key_state(k_BHTF, v_BHTP, kernel.coefficients, last_B1T)
  if initial_state is not None:
    only = jnp.ones((1,), bool) if first_BT is None else first_BT[:, -1]
    keep = lambda new, old: new + jnp.where(only[:, None, None, None], old, 0)
    state = State(*map(keep, state, initial_state))
  return o, state
