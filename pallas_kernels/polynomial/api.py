"""The public functions: check the arguments and choose an implementation."""

from typing import Any, Literal, overload
import warnings

from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices, documents as documents_lib, numerics
from pallas_kernels.arguments import flag
from pallas_kernels.compile_once import compile_once
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.implementations import (
  check_split,
  outside_checked_shard_map,
)
from pallas_kernels.plain_derivatives import are_plain
from pallas_kernels.polynomial import (
  checks,
  decode,
  operator,
  spec,
  state as state_lib,
  xla,
)
from pallas_kernels.polynomial.coefficients import REBASED, Coefficients
from pallas_kernels.polynomial.operator import Kernel, Passes, StaticArguments
from pallas_kernels.polynomial.state import State
from pallas_kernels.sharding import (
  ShardAxes,
  axes_of,
  check_axes,
  unsplit_axes,
  vary_alike,
)

Implementation = Literal["gpu", "tpu", "xla", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = (
  "gpu",
  "tpu",
  "xla",
  "reference",
)

_STATE = ("BHEP", "BHGG")  # the axes of a State's arrays


def _attention_outputs(arguments: dict[str, Any]) -> Any:
  """Return the axes of the results of `polynomial_attention`."""
  return ("BTHP", State(*_STATE)) if arguments.get("return_state") else "BTHP"


@overload
def polynomial_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  coefficients: Coefficients = ...,
  scale: float | None = ...,
  eps: float = ...,
  segment_ids: Array | None = ...,
  initial_state: State | None = ...,
  return_state: Literal[False] = ...,
  axes: ShardAxes | None = ...,
  implementation: Implementation | None = ...,
) -> Array: ...


@overload
def polynomial_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  coefficients: Coefficients = ...,
  scale: float | None = ...,
  eps: float = ...,
  segment_ids: Array | None = ...,
  initial_state: State | None = ...,
  return_state: Literal[True],
  axes: ShardAxes | None = ...,
  implementation: Implementation | None = ...,
) -> tuple[Array, State]: ...


@overload
def polynomial_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  coefficients: Coefficients = ...,
  scale: float | None = ...,
  eps: float = ...,
  segment_ids: Array | None = ...,
  initial_state: State | None = ...,
  return_state: bool,
  axes: ShardAxes | None = ...,
  implementation: Implementation | None = ...,
) -> Array | tuple[Array, State]: ...


@on_any_mesh("BTHF", _attention_outputs)
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
  r"""Causal linear attention with a polynomial similarity.

  Computes, for each row of the batch and each head,

  .. math::

    o_t = \frac{\sum_s \mathrm{sim}_{ts} v_s}
               {\sum_s \mathrm{sim}_{ts} + \mathrm{eps}},
    \qquad
    \mathrm{sim}_{ts} = c_0 + c_1 s_{ts} + c_2 s_{ts}^2,
    \qquad
    s_{ts} = \mathrm{scale} \cdot q_t^\top k_s

  where the sums are over the tokens :math:`s \le t` of t's document. With the
  default coefficients this is the attention of ReBased (arXiv 2402.10644), if
  the norm, γ and β of the paper have been applied to q and k before the call.

  Time and memory are linear in T, and so are those of the gradient. The result
  can be differentiated in reverse mode with respect to q, k, v and
  `initial_state`. Forward mode and higher derivatives need
  `implementation="reference"`.

  Sums and the recurrent state are float32, or float64 for float64 inputs.

  An Inf or NaN of one token reaches neither earlier outputs nor other
  documents. The gradients of k and v in its document become NaN, and so does
  that of q from this token on. The kernels are weaker: within a chunk "gpu"
  spreads it to every output, and "tpu" too where there are no `segment_ids`.

  Args:
    q: queries (B, T, H, F), of dtype float32, bfloat16, float16 or float64.
    k: keys (B, T, H, F), of q's dtype.
    v: values (B, T, H, P), of q's dtype.
    coefficients: the coefficients of sim: `REBASED`, `BASED` or your own.
    scale: the factor of q·k. If None, it is :math:`F^{-1/2}`.
    eps: a number ≥ 0, added to the denominator. With 0, a token whose
      similarities are all 0 gets NaN. It must be small beside Σ sim. The
      default suits q and k whose entries are near 1, as a norm makes them. For
      others pass an eps that is as much smaller or larger as their sim.
    segment_ids: integers (B, T). A run of equal ids is a document, and a token
      sees its own document alone. If None, each row is one document.
    initial_state: the recurrent state of the tokens before q. It belongs to the
      document of token 0. If None, there are none; pass None, or zeros in its
      row, where token 0 starts a document.
    return_state: whether to return the state after the last token. It belongs
      to the document of that token.
    axes: the axes of the ambient mesh (`jax.set_mesh`) that split batch, heads
      and time. If None, they are read off q's type where it has a layout. Else
      XLA splits the work over batch and heads.
    implementation: what computes it.

      * `None` (default): the kernels of the platform that the program is
        lowered for, if they can do the call and its device is known. Else
        "xla"; on a GPU or TPU, a warning then says why.
      * `"gpu"`: Pallas kernels for Hopper GPUs. For float32 they must be named.
      * `"tpu"`: Pallas kernels for TPUs v5e, v5p and v6e.
      * `"xla"`: plain jax, on every device: in chunks of 64 tokens, or in spans
        of chunks where calls are expected to run on a GPU.
      * `"reference"`: the equations as they stand, quadratic in T.

      The kernels multiply operands of q's dtype. "gpu" multiplies float32 ones
      as two bfloat16 numbers each, which sum to 16 bits.

  Returns:
    An array (B, T, H, P) of v's dtype. With `return_state=True`, the pair of
    that array and the `State`.

  Raises:
    ValueError: an argument does not fit. The message names it, says what it is
      and what was expected.
    NotImplementedError: the named implementation cannot do this call, or the
      program is lowered for another platform than its own. The message says
      why, before anything is computed.
  """
  q, k, v, segment_ids = checks.sequences(q, k, v, segment_ids)
  kernel = checks.kernel(q, coefficients, scale, eps)
  return_state = flag("return_state", return_state)
  B, T, H, F = q.shape
  P = v.shape[-1]
  if initial_state is not None:
    initial_state = checks.state(
      "initial_state", initial_state, B, H, F, P, coefficients, q.dtype
    )
  check_axes(axes, B, H, T)
  states = initial_state is not None or return_state
  q, k, v, segment_ids, initial_state = vary_alike(
    q, k, v, segment_ids, initial_state
  )
  name = _choose(implementation, q, v, kernel, states=states, axes=axes)
  if name == "reference":
    o, state = _reference(
      q, k, v, kernel, segment_ids, initial_state, return_state=return_state
    )
  else:
    static = StaticArguments(_passes(name), kernel, axes, return_state)
    if name in devices.KERNEL_PLATFORMS:
      static = static._replace(
        kernels=devices.kernels_of(name),
        by_xla=axes is None and bool(unsplit_axes()),
        elsewhere=xla.CHUNKS if implementation is None else None,
      )
    elif _fills_a_gpu(q):
      static = static._replace(
        passes=xla.spans(in_parts=devices.has_bfloat16_products()),
        kernels=devices.XLA_ON_GPU,
        elsewhere=xla.CHUNKS,
        is_plain=True,
      )
    arrays = q, k, v, segment_ids, initial_state
    o, state = compile_once(operator.attend, (static,), *arrays)
  if not return_state:
    return o
  assert state is not None
  return o, state


@on_any_mesh("BHF", ("BHP", State(*_STATE)), of="q")
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
  """Advance `polynomial_attention` by one token, as generation does.

  The cost does not depend on how many tokens came before. Steps after a prefill
  give the outputs of one call over all tokens.

  Args:
    state: the recurrent state of the tokens before, from
      `polynomial_attention(..., return_state=True)`, from an earlier step or
      from `zero_state`.
    q: queries (B, H, F) of this token.
    k: keys (B, H, F), of q's dtype.
    v: values (B, H, P), of q's dtype.
    coefficients: as in `polynomial_attention`.
    scale: as in `polynomial_attention`.
    eps: as in `polynomial_attention`.

  Returns:
    (o, state): the output (B, H, P) of v's dtype, and the state after this
    token.

  Raises:
    ValueError: an argument does not fit. The message names it.
  """
  q, k, v = checks.arrays(q, k, v, "(B, H, F)", "(B, H, P)", 3)
  kernel = checks.kernel(q, coefficients, scale, eps)
  B, H, F = q.shape
  P = v.shape[-1]
  state = checks.state("state", state, B, H, F, P, coefficients, q.dtype)
  return decode.step(state, q, k, v, kernel)


@on_any_mesh("BMHF", "BMHP")
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
  """Compute `polynomial_attention` at M chosen positions of each row only.

  Time and memory are O(M·T), which is less than the linear operator takes for
  small M. The function is plain jax, with derivatives of any kind.

  Args:
    q: queries (B, M, H, F) of the chosen positions.
    k: keys (B, T, H, F) of all tokens, of q's dtype.
    v: values (B, T, H, P) of all tokens, of q's dtype.
    positions: integers (B, M), each in [0, T), in any order. The output at a
      position outside that range is NaN.
    coefficients: as in `polynomial_attention`.
    scale: as in `polynomial_attention`.
    eps: as in `polynomial_attention`.
    segment_ids: as in `polynomial_attention`.

  Returns:
    An array (B, M, H, P) of v's dtype.

  Raises:
    ValueError: an argument does not fit. The message names it.
  """
  k, _, v, segment_ids = checks.sequences(k, k, v, segment_ids, names="kkv")
  q, positions = checks.query_positions(q, k, positions)
  T = k.shape[1]
  kernel = checks.kernel(q, coefficients, scale, eps)
  inside_BM = (positions >= 0) & (positions < T)
  t_T = jnp.arange(T, dtype=positions.dtype)
  mask_BMT = positions[:, :, None] >= t_T[None, None]
  if segment_ids is not None:
    runs_BT = documents_lib.document_runs(segment_ids)
    own_BM = jnp.take_along_axis(runs_BT, positions, axis=1)
    mask_BMT = mask_BMT & (own_BM[:, :, None] == runs_BT[:, None])
  o_BMHP = spec.reference(
    q, k, v, mask_BMT, coefficients=kernel.coefficients, eps=kernel.eps
  )
  return jnp.where(inside_BM[:, :, None, None], o_BMHP, jnp.nan)


@on_any_mesh("BTHF", "BHTS")
def polynomial_attention_weights(
  q: Array,
  k: Array,
  *,
  coefficients: Coefficients = REBASED,
  scale: float | None = None,
  eps: float = 1e-6,
) -> Array:
  """Compute the attention matrix of `polynomial_attention`, for inspection.

  Time and memory are O(T²).

  Args:
    q: queries (B, T, H, F), of one document a row.
    k: keys (B, T, H, F), of q's dtype.
    coefficients: as in `polynomial_attention`.
    scale: as in `polynomial_attention`.
    eps: as in `polynomial_attention`.

  Returns:
    The matrix A (B, H, T, T) with o_t = Σ_s A_ts v_s. It is 0 for s > t, and a
    row sums to 1 but for `eps`. The dtype is float32, or float64 for float64
    inputs.

  Raises:
    ValueError: an argument does not fit. The message names it.
  """
  q, k, _ = checks.arrays(q, k, k, "(B, T, H, F)", "(B, T, H, F)", 4, "qkk")
  kernel = checks.kernel(q, coefficients, scale, eps)
  T = q.shape[1]
  mask_BTT = jnp.tril(jnp.ones((1, T, T), bool))
  sim_BHTT = spec.similarities(q, k, mask_BTT, kernel.coefficients)
  return sim_BHTT / (sim_BHTT.sum(axis=-1, keepdims=True) + kernel.eps)


def which_implementation(
  implementation: str | None = None, *, axes: ShardAxes | None = None
) -> tuple[Implementation, str]:
  """Return the implementation that calls run on this device, and the reason.

  A single call may still run "xla", if the kernels cannot do that call.

  Args:
    implementation: as in `polynomial_attention`.
    axes: as in `polynomial_attention`.

  Returns:
    (name, reason); the reason is a text for people.

  Raises:
    ValueError: there is no implementation of that name.
    NotImplementedError: the named implementation cannot run on this device.
  """
  if implementation is None:
    return _of_device()
  _check_name(implementation, axes)
  if implementation == "gpu":
    devices.check_gpu()
  if implementation == "tpu":
    devices.check_tpu()
  return implementation, "it was named"


def _check_name(implementation: str, axes: ShardAxes | None) -> None:
  """Check a named implementation, as far as no device matters.

  Raises:
    ValueError: there is no implementation of that name.
    NotImplementedError: it cannot split the arrays by these axes.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r}: expected None or one of "
      f"{IMPLEMENTATIONS}"
    )
  if implementation == "reference" and axes is not None and axes.time:
    raise NotImplementedError(
      f"implementation='reference' does not split time (axes.time="
      f"{axes.time!r}); 'xla' does"
    )


def _of_device() -> tuple[Implementation, str]:
  """Return the default implementation of this device, and the reason."""
  try:
    if devices.platform() == "tpu":
      devices.check_tpu()
      return "tpu", (
        f"a TPU {devices.tpu_generation()}; calls that its kernels cannot do "
        "run 'xla'"
      )
    devices.check_gpu()
  except NotImplementedError as error:
    return "xla", str(error)
  return "gpu", "a Hopper GPU; calls that its kernels cannot do run 'xla'"


def _kernels_of_known_device() -> Implementation | None:
  """Return the implementation whose kernels a known device runs, if any.

  The device need not be the one that calls are expected to run on.
  """
  if devices.knows_tpu():
    return "tpu"
  return "gpu" if devices.is_hopper() else None


def _choose(
  implementation: Implementation | None,
  q: Array,
  v: Array,
  kernel: Kernel,
  *,
  states: bool,
  axes: ShardAxes | None,
) -> Implementation:
  """Choose the implementation of this call, which is then able to do it.

  Kernels are chosen where a known device runs them. Lowering for another
  platform then takes "xla", if no implementation was named.

  Args:
    implementation: the name that the caller gave, or None.
    q: queries.
    v: values.
    kernel: the static numbers.
    states: whether the call takes or returns a state.
    axes: the mesh axes.

  Raises:
    NotImplementedError: the named implementation cannot do the call.
  """
  if implementation is None and are_plain():
    implementation = "reference"
  if implementation is None:
    name = _kernels_of_known_device()
  else:
    _check_name(implementation, axes)
    name = implementation
  if name not in devices.KERNEL_PLATFORMS:
    if implementation is None:
      _warn_of_xla(_of_device()[1])
    return name or "xla"
  states = states or (axes is not None and axes.time is not None)
  try:
    devices.check_named(name)
    check_split(name, axes)
    outside_checked_shard_map(name, q)
    _kernels(name).supports(q, v, kernel, states=states)
    if implementation is None:
      _check_default(name, q)
  except NotImplementedError as error:
    if implementation is not None:
      raise
    _warn_of_xla(error)
    return "xla"
  return name


def _check_default(name: Implementation, q: Array) -> None:
  """Refuse what kernels do only where their implementation is named."""
  if name == "gpu" and q.dtype == jnp.float32:
    raise NotImplementedError(
      "the Hopper kernels have not been timed with float32; "
      "implementation='gpu' runs them"
    )


def _warn_of_xla(reason: object) -> None:
  """Warn that "xla" runs where calls are expected to run on an accelerator."""
  if devices.platform() != "cpu":
    warnings.warn(f"polynomial_attention runs 'xla': {reason}", stacklevel=4)


def _fills_a_gpu(q: Array) -> bool:
  """Whether "xla" takes spans of chunks where it is lowered for a GPU.

  Inside a `jax.shard_map` that checks what varies over the mesh it does not:
  `by_platform` does not know over which axes its results vary.
  """
  return devices.platform() == "gpu" and not axes_of(q)


def _passes(name: Implementation) -> Passes:
  """Return the five passes of an implementation."""
  return xla.CHUNKS if name == "xla" else _kernels(name)


def _kernels(name: Implementation):
  """Import the passes of "gpu" or "tpu"."""
  # Not at the top of this file: Pallas takes long to import, and some versions
  # of jax cannot import what the kernels are written with.
  with devices.kernel_imports(name):
    if name == "tpu":
      from pallas_kernels.polynomial.tpu import passes
    else:
      from pallas_kernels.polynomial.gpu import passes
  return passes


def _reference(
  q: Array,
  k: Array,
  v: Array,
  kernel: Kernel,
  segment_ids: Array | None,
  initial_state: State | None,
  *,
  return_state: bool,
) -> tuple[Array, State | None]:
  """Compute a call by the quadratic equations; also the state, if asked for."""
  T = q.shape[1]
  coefficients, acc = kernel.coefficients, numerics.sum_dtype(q.dtype)
  q_BHTF, k_BHTF, v_BHTP = (
    jnp.moveaxis(x.astype(acc), 2, 1) for x in (q, k, v)
  )
  mask_BTS = jnp.tril(jnp.ones((1, T, T), bool))
  first_BT = last_B1T = None
  if segment_ids is not None:
    runs_BT = documents_lib.document_runs(segment_ids)
    mask_BTS = mask_BTS & (runs_BT[:, :, None] == runs_BT[:, None])
    first_BT = runs_BT == 0
    last_B1T = (runs_BT == runs_BT[:, -1:])[:, None]
  past = None
  if initial_state is not None:
    past = state_lib.query_state(q_BHTF, initial_state, coefficients)
    if first_BT is not None:
      num_BHTP, z_BHT = past
      past = (
        jnp.where(first_BT[:, None, :, None], num_BHTP, 0),
        jnp.where(first_BT[:, None], z_BHT, 0),
      )
  o = spec.reference(
    q, k, v, mask_BTS, coefficients=coefficients, eps=kernel.eps, past=past
  )
  if not return_state:
    return o, None
  state = state_lib.key_state(k_BHTF, v_BHTP, coefficients, last_B1T)
  if initial_state is not None:
    # The initial state is in the last one where a row is a single document.
    if first_BT is not None:
      single_B111 = first_BT[:, -1][:, None, None, None]
      initial_state = State(
        *(jnp.where(single_B111, x, 0) for x in initial_state)
      )
    state = State(*map(jnp.add, state, initial_state))
  return o, state
