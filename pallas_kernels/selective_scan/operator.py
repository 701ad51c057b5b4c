"""The scan of Mamba (arXiv 2312.00752) and its derivative.

    h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ,   y_t = h_t C_t

`gpu` has kernels for Hopper GPUs, `xla.py` computes it on every device. Both
keep one state a chunk, and compute the others again in the backward.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.arguments import (
  float_array,
  integer_array,
  positive_integer,
)
from pallas_kernels.by_platform import backward_by_platform, forward_by_platform
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.documents import document_runs
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.implementations import Recurrence, chooses_kernels
from pallas_kernels.selective_scan import xla
from pallas_kernels.sharding import unsplit_axes, vary_alike


@on_any_mesh("BTI", ("BTI", "BIN"))
def selective_scan(
  x: Array,
  delta: Array,
  A: Array,
  B: Array,
  C: Array,
  *,
  initial_state: Array | None = None,
  segment_ids: Array | None = None,
  chunk: int | None = None,
  implementation: Recurrence | None = None,
) -> tuple[Array, Array]:
  """Scan h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ and read y_t = h_t C_t.

  Sizes: I channels of N states each. Time is linear in T. Memory for the
  backward is one state a chunk beside the arguments. It has reverse-mode
  derivatives only. The skip D ∘ x and the gate of Mamba's mixer are not part of
  it. Over a mesh, batch and channels may be split, by XLA; time may not.

  Args:
    x: the input, (B, T, I), of any float dtype; float32 is advised. All arrays
      have its dtype, which is also that of the states.
    delta: Δ ≥ 0 (B, T, I), each channel's step.
    A: (I, N), ≤ 0.
    B: (B, T, N), what writes into the states.
    C: (B, T, N), what reads them.
    initial_state: h (B, I, N) before the first token, of its document. None:
      zeros.
    segment_ids: integers (B, T). A document is a run of one id; its state
      starts from zeros. An Inf or NaN in one document stays in it. None: a row
      is one document.
    chunk: the most tokens of a row that "xla" scans at once. None: 32 to 256,
      more for fewer rows. The kernels do no call with a chunk.
    implementation: what computes it.

      * `None` (default): "gpu" where the program is lowered for a GPU, the
        process has Hopper GPUs, and the kernels can do the call. Else "xla";
        on a GPU, a warning then says why.
      * `"gpu"`: kernels for Hopper GPUs, which hold states in float32. They
        take I channels that are a multiple of 64, at most 32 states, and no
        float64.
      * `"xla"`: plain jax, on every device.

  Returns:
    (y, state): y (B, T, I), and h (B, I, N) after the last token, of the last
    token's document; both in x's dtype.

  Raises:
    ValueError: an argument does not fit; the message names it.
    NotImplementedError: the kernels cannot do this call, or the program is
      lowered for another platform than theirs. The message says why.
  """
  x = float_array("x", x, ("B", "T", "I"), nonempty=True)
  rows, T, I = x.shape
  like = ("x", x)
  delta = float_array("delta", delta, x.shape, like=like)
  A = float_array("A", A, (I, "N"), like=like, nonempty=True)
  N = A.shape[1]
  B = float_array("B", B, (rows, T, N), like=like)
  C = float_array("C", C, (rows, T, N), like=like)
  if initial_state is None:
    initial_state = jnp.zeros((rows, I, N), x.dtype)
  initial_state = float_array(
    "initial_state", initial_state, (rows, I, N), like=like
  )
  if segment_ids is not None:
    segment_ids = integer_array("segment_ids", segment_ids, (rows, T))
  if chunk is not None:
    chunk = positive_integer("chunk", chunk)
  arrays = vary_alike(x, delta, A, B, C, initial_state, _starts(segment_ids))

  def why_not() -> str | None:
    if chunk is not None:
      return f"chunk={chunk}, because its own chunks have one size"
    return _passes().why_not(x, A)

  if not chooses_kernels("selective_scan", implementation, arrays, why_not):
    chunk = chunk or xla.chunk_tokens(rows)
    return compile_once(xla.scan_chunks, (chunk,), *arrays)
  elsewhere = _by_xla if implementation is None else None
  return compile_once(_by_kernel, (elsewhere, bool(unsplit_axes())), *arrays)


def _starts(segment_ids_BT: Array | None) -> Array | None:
  """Return whether each token starts a document; None without documents."""
  if segment_ids_BT is None:
    return None
  return jnp.diff(document_runs(segment_ids_BT), axis=1, prepend=0) != 0


def _passes():
  # Not at the top of this file: Pallas takes long to import.
  with devices.kernel_imports("gpu"):
    from pallas_kernels.selective_scan.gpu import passes
  return passes


def _by_xla(x_BTI: Array, *arrays: Array | None) -> tuple[Array, Array]:
  return xla.scan_chunks(xla.chunk_tokens(x_BTI.shape[0]), x_BTI, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(
  elsewhere: Callable[..., Any] | None,
  by_xla: bool,
  x_BTI: Array,
  delta_BTI: Array,
  A_IN: Array,
  B_BTN: Array,
  C_BTN: Array,
  h_BIN: Array,
  starts_BT: Array | None,
) -> tuple[Array, Array]:
  """Return y and the last state by the kernels.

  Args:
    elsewhere: a function of the arrays that computes it on other platforms.
      None: lowering for them raises NotImplementedError.
    by_xla: whether XLA splits rows and channels over a mesh.
    x_BTI: the input.
    delta_BTI: the steps Δ.
    A_IN: the rates.
    B_BTN: what writes into the states.
    C_BTN: what reads them.
    h_BIN: the state before the row.
    starts_BT: whether each token starts a document; None: a row is one.
  """
  arrays = x_BTI, delta_BTI, A_IN, B_BTN, C_BTN, h_BIN, starts_BT
  return _forward(elsewhere, by_xla, *arrays)[0]


_NAMES = ("x", "delta", "A", "B", "C", "h", "starts")


def _named(arrays: tuple) -> dict[str, Array]:
  pairs = zip(_NAMES, arrays, strict=True)
  return {name: x for name, x in pairs if x is not None}


def _forward(elsewhere, by_xla, *arrays):
  def kernel(*arrays):
    named = _named(arrays)
    y_BTI, last_BIN, before = _passes().forward(named, by_xla=by_xla)
    return (y_BTI, last_BIN.astype(y_BTI.dtype)), before

  hopper = devices.kernels_of("gpu")
  results, before = forward_by_platform(
    hopper, kernel, elsewhere, *arrays, is_split=by_xla
  )
  return results, (arrays, before)


def _backward(elsewhere, by_xla, kept, cotangents):
  def kernel(arrays, before, cotangents):
    dy_BTI, dlast_BIN = cotangents
    dlast_BIN = dlast_BIN.astype(jnp.float32)
    found = _passes().backward(
      _named(arrays), before, dy_BTI, dlast_BIN, by_xla=by_xla
    )
    floats = zip(_NAMES[:-1], arrays[:-1], strict=True)
    return tuple(found[name].astype(x.dtype) for name, x in floats)

  hopper = devices.kernels_of("gpu")
  grads = backward_by_platform(
    hopper, kernel, elsewhere, *kept, cotangents, is_split=by_xla
  )
  return *grads, None


_by_kernel.defvjp(_forward, compiled_backward(_backward))
