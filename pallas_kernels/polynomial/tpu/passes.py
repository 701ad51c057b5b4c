"""Polynomial attention on TPUs: the five passes of `operator.py`.

The kernels are written in Pallas Mosaic TPU. They take (B, H·X, T) arrays,
tokens along lanes, where the public call has (B, T, H, X). XLA transposes
nothing if a matrix product makes the array or reads it, as a projection does:
it gives that product the other layout.
"""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.documents import document_starts
from pallas_kernels.polynomial.operator import (
  Kernel,
  add_slice_axis,
  drop_slice_axis,
  raise_if_unsupported,
)
from pallas_kernels.polynomial.state import State, restore_antisymmetric_part
from pallas_kernels.polynomial.tpu import (
  backward as backward_kernels,
  forward as forward_kernels,
  sizes,
  states as states_lib,
)
from pallas_kernels.polynomial.tpu.call import Call

VALUES = 128  # the largest P that the kernels take


def supports(q: Array, v: Array, kernel: Kernel, *, states: bool) -> None:
  """Raise NotImplementedError, with the reason, if "xla" must do the call.

  Args:
    q: queries (B, T, H, F).
    v: values (B, T, H, P).
    kernel: the static numbers.
    states: whether the call takes or returns a state; these kernels can.
  """
  del states
  F, P = q.shape[-1], v.shape[-1]
  widths = ", ".join(map(str, sizes.WIDTHS))
  raise_if_unsupported(
    "tpu",
    [
      (
        q.dtype not in (jnp.bfloat16, jnp.float32),
        f"dtype {q.dtype}: bfloat16 and float32 only",
      ),
      (F not in sizes.WIDTHS, f"F={F}: {widths} only"),
      (P > VALUES, f"P={P}: 1 to {VALUES}"),
      (kernel.coefficients.c2 <= 0, "c2 ≤ 0"),
    ],
  )


def forward(
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  runs_BT: Array | None,
  state: State | None,
  kernel: Kernel,
  *,
  return_state: bool,
) -> tuple[Array, State | None, State | None]:
  """Return o_BTHP, the state after the last token and that before the first."""
  call = _call("forward", q_BTHF, v_BTHP, runs_BT, kernel)
  o_BRT, after = forward_kernels.forward(
    _tokens_last(q_BTHF),
    _tokens_last(k_BTHF),
    _tokens_last(v_BTHP, call.P),
    _starts(runs_BT, call),
    states_lib.to_kernel(state, kernel, call, by_feature=False),
    call,
    return_state=return_state,
  )
  final = None
  if after is not None:
    P = v_BTHP.shape[-1]
    final = states_lib.from_kernel(after, P, kernel, call, by_feature=False)
    final = restore_antisymmetric_part(final, state, _single_document(runs_BT))
  return _tokens_second(o_BRT, v_BTHP), final, add_slice_axis(state)


def key_state(
  k_BTHF: Array, v_BTHP: Array, runs_BT: Array | None, kernel: Kernel
) -> State:
  """Return the state after the last token, from a zero state."""
  call = _call("forward", k_BTHF, v_BTHP, runs_BT, kernel)
  after = forward_kernels.key_state(
    _tokens_last(k_BTHF),
    _tokens_last(v_BTHP, call.P),
    _starts(runs_BT, call),
    call,
  )
  P = v_BTHP.shape[-1]
  return states_lib.from_kernel(after, P, kernel, call, by_feature=False)


def backward_queries(
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  do_BTHP: Array,
  runs_BT: Array | None,
  before: State | None,
  kernel: Kernel,
) -> tuple[Array, Array, Array]:
  """Return dq_BTHF, r_BH1T and dz_BH1T; the last two are multiplied by c2."""
  call = _call("backward_queries", q_BTHF, v_BTHP, runs_BT, kernel)
  dq_BRT, r_BH1T, dz_BH1T = backward_kernels.backward_queries(
    _tokens_last(q_BTHF),
    _tokens_last(k_BTHF),
    _tokens_last(v_BTHP, call.P),
    _tokens_last(do_BTHP, call.P),
    _starts(runs_BT, call),
    states_lib.to_kernel(
      drop_slice_axis(before), kernel, call, by_feature=True
    ),
    call,
  )
  return _tokens_second(dq_BRT, q_BTHF), r_BH1T, dz_BH1T


def backward_keys(
  q_BTHF: Array,
  k_BTHF: Array,
  v_BTHP: Array,
  do_BTHP: Array,
  r_BH1T: Array,
  dz_BH1T: Array,
  runs_BT: Array | None,
  dstate: State | None,
  kernel: Kernel,
  *,
  return_state: bool,
) -> tuple[Array, Array, State | None]:
  """Return dk_BTHF, dv_BTHP and the cotangent of the state before token 0."""
  call = _call("backward_keys", q_BTHF, v_BTHP, runs_BT, kernel)
  dk_BRT, dv_BRT, dbefore = backward_kernels.backward_keys(
    _tokens_last(q_BTHF),
    _tokens_last(k_BTHF),
    _tokens_last(v_BTHP, call.P),
    _tokens_last(do_BTHP, call.P),
    r_BH1T,
    dz_BH1T,
    _starts(runs_BT, call),
    states_lib.to_kernel(dstate, kernel, call, by_feature=True),
    call,
    return_state=return_state,
  )
  dinitial = None
  if dbefore is not None:
    P = v_BTHP.shape[-1]
    dinitial = states_lib.from_kernel(dbefore, P, kernel, call, by_feature=True)
    dinitial = restore_antisymmetric_part(
      dinitial, dstate, _single_document(runs_BT)
    )
  dk_BTHF = _tokens_second(dk_BRT, k_BTHF)
  return dk_BTHF, _tokens_second(dv_BRT, v_BTHP), dinitial


def query_cotangent(
  q_BTHF: Array,
  do_BTHP: Array,
  r_BH1T: Array,
  dz_BH1T: Array,
  runs_BT: Array | None,
  kernel: Kernel,
) -> State:
  """Return the cotangent of the state before token 0, if the last's is 0."""
  call = _call("backward_keys", q_BTHF, do_BTHP, runs_BT, kernel)
  dbefore = backward_kernels.query_cotangent(
    _tokens_last(q_BTHF),
    _tokens_last(do_BTHP, call.P),
    r_BH1T,
    dz_BH1T,
    _starts(runs_BT, call),
    call,
  )
  P = do_BTHP.shape[-1]
  return states_lib.from_kernel(dbefore, P, kernel, call, by_feature=True)


def _call(
  name: str, q_BTHF: Array, v_BTHP: Array, runs_BT: Array | None, kernel: Kernel
) -> Call:
  return sizes.make_call(
    name, q_BTHF, v_BTHP, kernel, documents=runs_BT is not None
  )


def _tokens_last(x_BTHX: Array, rows: int | None = None) -> Array:
  """Lay an array out as (B, H·rows, T), each head's X padded to `rows`."""
  B, T, H, X = x_BTHX.shape
  if rows is not None and rows != X:
    x_BTHX = jnp.pad(x_BTHX, ((0, 0), (0, 0), (0, 0), (0, rows - X)))
  return x_BTHX.reshape(B, T, -1).swapaxes(1, 2)


def _tokens_second(x_BRT: Array, like_BTHX: Array) -> Array:
  """Undo `_tokens_last`, to the shape of a public array."""
  B, T, H, X = like_BTHX.shape
  return x_BRT.swapaxes(1, 2).reshape(B, T, H, -1)[..., :X]


def _starts(runs_BT: Array | None, call: Call) -> Array | None:
  """Return the position where each token's document starts, (B, 1, T).

  T is padded to whole blocks. None where each row is one document.
  """
  if runs_BT is None:
    return None
  start_BT = document_starts(runs_BT)
  padding = call.steps * call.block - call.T
  return jnp.pad(start_BT, ((0, 0), (0, padding)), mode="edge")[:, None]


def _single_document(runs_BT: Array | None) -> Array | None:
  """Return which rows are a single document (B,); None for all."""
  return None if runs_BT is None else runs_BT[:, 0] == runs_BT[:, -1]
