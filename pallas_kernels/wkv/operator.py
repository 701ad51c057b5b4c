"""WKV, the recurrence of RWKV-4 (arXiv 2305.13048), and its derivative.

Each channel on its own, with a decay w < 0 and a bonus u:

    A_{t+1} = e^w A_t + e^{k_t} v_t,   B_{t+1} = e^w B_t + e^{k_t}
    y_t = (A_t + e^{u + k_t} v_t) / (B_t + e^{u + k_t})

`WKVState` holds A and B over e^m, m the largest exponent so far. `gpu` has
kernels for Hopper GPUs, `xla.py` computes it on every device.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.arguments import float_array, integer_array
from pallas_kernels.by_platform import backward_by_platform, forward_by_platform
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.documents import document_runs
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.implementations import Recurrence, chooses_kernels
from pallas_kernels.sharding import unsplit_axes, vary_alike
from pallas_kernels.wkv import xla
from pallas_kernels.wkv.state import (
  WKVState,
  add_token,
  empty_wkv_state,
  output,
  state_gradient,
)

_STATE = WKVState("BD", "BD", "BD")  # the axes of a state's arrays


@on_any_mesh("BTD", ("BTD", _STATE))
def wkv(
  k: Array,
  v: Array,
  w: Array,
  u: Array,
  *,
  initial_state: WKVState | None = None,
  segment_ids: Array | None = None,
  implementation: Recurrence | None = None,
) -> tuple[Array, WKVState]:
  """Compute each channel's mean of past values under exponential weights.

      y_t = (Σ_{i<t} e^{(t−1−i) w + k_i} v_i + e^{u + k_t} v_t)
            / (the same without v)

  Any finite k is safe: nothing overflows. It has reverse-mode derivatives only.
  Over a mesh, batch and channels may be split, by XLA; time may not.

  Args:
    k: (B, T, D), exponents of the tokens' weights, of any float dtype.
    v: (B, T, D), values, in k's dtype.
    w: (D,), decays, finite and < 0. Its dtype, float32 or float64, is that of
      all sums.
    u: (D,), bonuses of a token for its own output, in w's dtype.
    initial_state: (B, D) arrays in w's dtype: the state of the tokens before,
      of the first token's document. None: no tokens before.
    segment_ids: integers (B, T). A document is a run of one id and sees itself
      alone. None: a row is one document.
    implementation: what computes it.

      * `None` (default): "gpu" where the program is lowered for a GPU, the
        process has Hopper GPUs, and the kernels can do the call. Else "xla";
        on a GPU, a warning then says why.
      * `"gpu"`: kernels for Hopper GPUs. They take D channels that are a
        multiple of 128, and no float64.
      * `"xla"`: plain jax, on every device, in about 3 √T steps one after the
        other.

  Returns:
    (y, state): y (B, T, D) in v's dtype, and the state after the last token, of
    the last token's document.

  Raises:
    ValueError: an argument does not fit; the message names it.
    NotImplementedError: the kernels cannot do this call, or the program is
      lowered for another platform than theirs. The message says why.
  """
  k = float_array("k", k, ("B", "T", "D"), nonempty=True)
  B, T, D = k.shape
  v = float_array("v", v, k.shape, like=("k", k))
  w, u = _parameters(w, u, D)
  if initial_state is None:
    initial_state = empty_wkv_state((B, D), w.dtype)
  initial_state = _state("initial_state", initial_state, (B, D), w)
  starts_BT = None
  if segment_ids is not None:
    segment_ids = integer_array("segment_ids", segment_ids, (B, T))
    changes_BT = jnp.diff(document_runs(segment_ids), axis=1) > 0
    starts_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)))
  arrays = k, v, w, u, initial_state, starts_BT
  why_not = lambda: _passes().why_not(k, w)
  if not chooses_kernels("wkv", implementation, arrays, why_not):
    if starts_BT is None:
      starts_BT = jnp.zeros((B, T), bool)
    arrays = vary_alike(k, v, w, u, initial_state, starts_BT)
    return compile_once(xla.wkv, (), *arrays)
  elsewhere = _by_xla if implementation is None else None
  return compile_once(_by_kernel, (elsewhere, bool(unsplit_axes())), *arrays)


@on_any_mesh("BD", ("BD", _STATE))
def wkv_step(
  k: Array, v: Array, w: Array, u: Array, state: WKVState
) -> tuple[Array, WKVState]:
  """Compute `wkv` of one more token a row.

  Args:
    k: (B, D), in w's dtype.
    v: (B, D), in w's dtype.
    w: (D,), decays < 0, float32 or float64.
    u: (D,), bonuses, in w's dtype.
    state: (B, D) arrays in w's dtype, of the tokens before: from `wkv`, an
      earlier step or `empty_wkv_state`.

  Returns:
    (y, state): y (B, D), and the state after the token.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  k = float_array("k", k, ("B", "D"))
  w, u = _parameters(w, u, k.shape[1])
  k, v = (
    float_array(name, x, k.shape, like=("w", w))
    for name, x in (("k", k), ("v", v))
  )
  state = _state("state", state, k.shape, w)
  y, *_ = output(state, k, v, u[None])
  return y, add_token(state, w[None], k, v, jnp.ones_like(v))


def _parameters(w: Array, u: Array, D: int) -> tuple[Array, Array]:
  """Return w and u as arrays; raise ValueError if they do not fit."""
  w = float_array("w", w, (D,))
  if w.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"w has dtype {w.dtype}: expected float32 or float64")
  return w, float_array("u", u, (D,), like=("w", w))


def _state(
  name: str, state: WKVState, shape: tuple[int, ...], w: Array
) -> WKVState:
  """Return a state of arrays; raise ValueError if it does not fit."""
  if not isinstance(state, WKVState):
    raise ValueError(f"{name} is a {type(state).__name__}: expected a WKVState")
  return WKVState(
    *(
      float_array(f"{name}.{field}", x, shape, like=("w", w))
      for field, x in zip(WKVState._fields, state, strict=True)
    )
  )


def _passes():
  # Not at the top of this file: Pallas takes long to import.
  with devices.kernel_imports("gpu"):
    from pallas_kernels.wkv.gpu import passes
  return passes


def _by_xla(*arrays: Any) -> tuple[Array, WKVState]:
  *floats, starts_BT = arrays
  if starts_BT is None:
    starts_BT = jnp.zeros(floats[0].shape[:2], bool)
  return xla.wkv(*floats, starts_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(
  elsewhere: Callable[..., Any] | None,
  by_xla: bool,
  k_BTD: Array,
  v_BTD: Array,
  w_D: Array,
  u_D: Array,
  state: WKVState,
  starts_BT: Array | None,
) -> tuple[Array, WKVState]:
  """Return y and the sums after the row by the kernels.

  Args:
    elsewhere: a function of the arrays that computes it on other platforms.
      None: lowering for them raises NotImplementedError.
    by_xla: whether XLA splits rows and channels over a mesh.
    k_BTD: exponents of the tokens' weights.
    v_BTD: values.
    w_D: decays.
    u_D: bonuses.
    state: the sums before the row.
    starts_BT: whether each token starts a document; None: a row is one.
  """
  arrays = k_BTD, v_BTD, w_D, u_D, state, starts_BT
  return _forward(elsewhere, by_xla, *arrays)[0]


def _named(floats: tuple, starts_BT: Array | None) -> dict[str, Array]:
  named = dict(zip("kvwu", floats, strict=True))
  return named if starts_BT is None else named | dict(starts=starts_BT)


def _forward(elsewhere, by_xla, *arrays):
  def kernel(*arrays):
    *floats, state, starts_BT = arrays
    y_BTD, last, before = _passes().forward(
      _named(floats, starts_BT), state, by_xla=by_xla
    )
    return (y_BTD, last), before

  hopper = devices.kernels_of("gpu")
  results, before = forward_by_platform(
    hopper, kernel, elsewhere, *arrays, is_split=by_xla
  )
  return results, (arrays, (before, results[1].maximum))


def _backward(elsewhere, by_xla, kept, cotangents):
  def kernel(arrays, kept, cotangents):
    *floats, state, starts_BT = arrays
    before, maximum_BD = kept
    dy_BTD, after = cotangents
    # The last state's cotangents are λ and μ after the last token.
    end = WKVState(after.numerator, -after.denominator, -maximum_BD)
    grads, first = _passes().backward(
      _named(floats, starts_BT), before, dy_BTD, end, by_xla=by_xla
    )
    return *(grads[name] for name in "kvwu"), state_gradient(state, first)

  hopper = devices.kernels_of("gpu")
  grads = backward_by_platform(
    hopper, kernel, elsewhere, *kept, cotangents, is_split=by_xla
  )
  return *grads, None


_by_kernel.defvjp(_forward, compiled_backward(_backward))
