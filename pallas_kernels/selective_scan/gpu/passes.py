"""The two passes of the scan's Hopper kernels, and which calls they can do.

The I channels are G groups of 64. The kernels read arrays (B, T, G, W), so that
XLA can split rows and groups over a mesh. Sums over channels come back as one
part for each group, and sums over tokens as one part for each row.
"""

import jax
from jax import Array
import jax.export
import jax.numpy as jnp

from pallas_kernels.partitioning import run_by_name
from pallas_kernels.selective_scan.gpu import (
  backward as backward_kernels,
  forward as forward_kernels,
)
from pallas_kernels.selective_scan.gpu.walk import C, Launch, W, make_launch
from pallas_kernels.time_slices import MOST_ROWS, slices_with_starts

_MOST_STATES = 32  # the tiles of so many states fit in a thread's registers
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# The axes of each array as `run_by_name` takes them. Its heads are the
# groups of channels.
_PATTERNS = {
  **dict.fromkeys(("x", "delta", "dy", "y", "dx", "ddelta"), "B.H."),
  **dict.fromkeys(("A", "h", "last", "dlast", "dh", "dA", "dB", "dC"), "BH.."),
  **dict.fromkeys(("B", "C"), "B.."),
  "before": "B.H..",
  "starts": "B.",
}


def why_not(x_BTI: Array, A_IN: Array) -> str | None:
  """Return what the kernels cannot do of a call; None: they can do it.

  Args:
    x_BTI: the input, of which shape and dtype are read.
    A_IN: the rates, likewise.
  """
  I, N = A_IN.shape
  if any(map(jax.export.is_symbolic_dim, (*x_BTI.shape, N))):
    return f"sizes that are left open, {x_BTI.shape}"
  if x_BTI.shape[0] > MOST_ROWS:
    return f"B={x_BTI.shape[0]} rows: at most {MOST_ROWS}"
  if x_BTI.dtype not in _DTYPES:
    return f"dtype {x_BTI.dtype}: float32, bfloat16 or float16 only"
  if I % W:
    return f"I={I} channels: a multiple of {W}"
  if N > _MOST_STATES:
    return f"N={N} states: at most {_MOST_STATES}"
  return "jax_enable_x64" if jax.config.jax_enable_x64 else None


def forward(
  arrays: dict[str, Array], *, by_xla: bool
) -> tuple[Array, Array, Array]:
  """Return (y, last, before).

  Args:
    arrays: "x" and "delta" (B, T, I), "A" (I, N), "B" and "C" (B, T, N), "h"
      (B, I, N), and perhaps "starts" (B, T), whether a token starts a document.
    by_xla: whether XLA splits rows and channels over a mesh.

  Returns:
    y (B, T, I) in x's dtype; the last state (B, I, N) in float32; the states
    before each chunk, in the form that `backward` takes.
  """
  _, T, I = arrays["x"].shape
  N = arrays["A"].shape[1]
  found = run_by_name(_forward, _grouped(arrays), _PATTERNS, by_xla=by_xla)
  y_BTI = found["y"].reshape(-1, T, I)
  last_BIN = found["last"].reshape(-1, I, found["last"].shape[-1])[..., :N]
  return y_BTI, last_BIN, found["before"]


def backward(
  arrays: dict[str, Array],
  before: Array,
  dy_BTI: Array,
  dlast_BIN: Array,
  *,
  by_xla: bool,
) -> dict[str, Array]:
  """Return the gradients of x, delta, A, B, C and h, by these names.

  Those of x and delta have x's dtype, the others are float32.

  Args:
    arrays: as `forward` takes them.
    before: from `forward`.
    dy_BTI: the cotangent of y, in x's dtype.
    dlast_BIN: the cotangent of the last state, float32.
    by_xla: as in `forward`.
  """
  B, T, I = arrays["x"].shape
  N = arrays["A"].shape[1]
  inputs = _grouped(arrays | dict(dy=dy_BTI, dlast=dlast_BIN))
  del inputs["h"]
  inputs |= dict(before=before)
  found = run_by_name(_backward, inputs, _PATTERNS, by_xla=by_xla)
  return dict(
    x=found["dx"].reshape(B, T, I),
    delta=found["ddelta"].reshape(B, T, I),
    A=found["dA"].sum(axis=0).reshape(I, -1)[..., :N],
    B=found["dB"].sum(axis=1)[..., :N],
    C=found["dC"].sum(axis=1)[..., :N],
    h=found["dh"].reshape(B, I, -1)[..., :N],
  )


def _grouped(arrays: dict[str, Array]) -> dict[str, Array]:
  """Return the arrays in the kernels' form: grouped channels, padded states.

  A state beyond N has B = C = 0, and so stays 0. A gets a row for each row of
  the batch, because every array must have the same axis of rows.
  """
  B, T, I = arrays["x"].shape
  grouped = {}
  for name, x in arrays.items():
    if name == "starts":
      # TMA copies whole chunks of them.
      x = jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -T % C)))
    elif name in ("x", "delta", "dy"):
      x = x.reshape(B, T, I // W, W)
    else:
      pad = -x.shape[-1] % 8
      x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x
      if name not in ("B", "C"):
        x = x.astype(jnp.float32).reshape(-1, I // W, W, x.shape[-1])
        x = jnp.broadcast_to(x, (B, *x.shape[1:]))
    grouped[name] = x
  return grouped


def _forward(arrays: dict[str, Array]) -> dict[str, Array]:
  launch, arrays = _launch(arrays)
  if launch.slices > 1:
    arrays = arrays | forward_kernels.slice_states(launch, arrays)
  found = forward_kernels.forward(launch, arrays)
  return found | dict(y=found["y"][:, : launch.T])


def _backward(arrays: dict[str, Array]) -> dict[str, Array]:
  launch, arrays = _launch(arrays)
  if launch.slices > 1:
    arrays = arrays | backward_kernels.slice_cotangents(launch, arrays)
  found = backward_kernels.backward(launch, arrays)
  return dict(
    dx=found["dx"][:, : launch.T],
    ddelta=found["ddelta"][:, : launch.T],
    dA=found["dA"].sum(axis=1),
    dB=found["dB"][:, :, : launch.T],
    dC=found["dC"][:, :, : launch.T],
    dh=found["dh"],
  )


def _launch(arrays: dict[str, Array]) -> tuple[Launch, dict[str, Array]]:
  """Return the launch, and the arrays with "broken" where they need it."""
  documents = "starts" in arrays
  N = arrays["A"].shape[-1]
  launch = make_launch(arrays["x"], N, documents=documents)
  if documents and launch.slices > 1:
    broken = slices_with_starts(
      arrays["starts"], launch.slices, launch.chunks * C
    )
    arrays = arrays | dict(broken=broken)
  return launch, arrays
