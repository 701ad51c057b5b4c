"""The two passes of WKV's Hopper kernels, and which calls they can do.

The D channels are G groups of 128. The kernels read arrays (B, T, G, W), so
that XLA can split rows and groups over a mesh. Sums over tokens come back as
one part for each row.
"""

import jax
from jax import Array
import jax.export
import jax.numpy as jnp

from pallas_kernels.partitioning import run_by_name
from pallas_kernels.time_slices import MOST_ROWS, slices_with_starts
from pallas_kernels.wkv.gpu import (
  backward as backward_kernels,
  forward as forward_kernels,
)
from pallas_kernels.wkv.gpu.walk import Launch, W, make_launch, sums_names
from pallas_kernels.wkv.state import WKVState

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# The axes of each array as `run_by_name` takes them. Its heads are the
# groups of channels.
_PATTERNS = {
  **dict.fromkeys(("k", "v", "dy", "y", "dk", "dv"), "B.H."),
  **dict.fromkeys(("w", "u", "dw", "du"), "BH."),
  **{
    each: "BH."
    for name in ("state", "last", "end", "first")
    for each in sums_names(name)
  },
  **dict.fromkeys(sums_names("before"), "B.H."),
  "starts": "B.",
}


def why_not(k_BTD: Array, w_D: Array) -> str | None:
  """Return what the kernels cannot do of a call; None: they can do it.

  Args:
    k_BTD: the keys, of which shape and dtype are read.
    w_D: the decays, of which the dtype is read.
  """
  B, _, D = k_BTD.shape
  if any(map(jax.export.is_symbolic_dim, k_BTD.shape)):
    return f"sizes that are left open, {k_BTD.shape}"
  if B > MOST_ROWS:
    return f"B={B} rows: at most {MOST_ROWS}"
  if k_BTD.dtype not in _DTYPES:
    return f"dtype {k_BTD.dtype}: float32, bfloat16 or float16 only"
  if w_D.dtype != jnp.float32:
    return f"sums in {w_D.dtype}: float32 only"
  if D % W:
    return f"D={D} channels: a multiple of {W}"
  return "jax_enable_x64" if jax.config.jax_enable_x64 else None


def forward(
  arrays: dict[str, Array], state: WKVState, *, by_xla: bool
) -> tuple[Array, WKVState, dict[str, Array]]:
  """Return (y, last, before).

  Args:
    arrays: "k" and "v" (B, T, D), "w" and "u" (D,) in float32, and perhaps
      "starts" (B, T), whether a token starts a document.
    state: the sums before the row, (B, D) float32.
    by_xla: whether XLA splits rows and channels over a mesh.

  Returns:
    y (B, T, D) in k's dtype; the sums after the row, (B, D) float32; the sums
    before each chunk, in the form that `backward` takes.
  """
  shape = arrays["k"].shape
  inputs = _grouped(arrays) | _named("state", state, _groups(shape))
  found = run_by_name(_forward, inputs, _PATTERNS, by_xla=by_xla)
  before = {name: found[name] for name in sums_names("before")}
  return found["y"].reshape(shape), _sums(found, "last"), before


def backward(
  arrays: dict[str, Array],
  before: dict[str, Array],
  dy_BTD: Array,
  end: WKVState,
  *,
  by_xla: bool,
) -> tuple[dict[str, Array], WKVState]:
  """Return the gradients of k, v, w and u by these names, and λ and μ.

  The gradients of k and v have k's dtype, all else is float32. λ and μ are
  those before the row, (B, D) each.

  Args:
    arrays: as `forward` takes them.
    before: from `forward`.
    dy_BTD: the cotangent of y, in k's dtype.
    end: λ and μ after the row, (B, D) float32.
    by_xla: as in `forward`.
  """
  shape = arrays["k"].shape
  inputs = _grouped(arrays | dict(dy=dy_BTD)) | before
  inputs |= _named("end", end, _groups(shape))
  found = run_by_name(_backward, inputs, _PATTERNS, by_xla=by_xla)
  grads = dict(
    k=found["dk"].reshape(shape),
    v=found["dv"].reshape(shape),
    w=found["dw"].sum(axis=0).reshape(-1),
    u=found["du"].sum(axis=0).reshape(-1),
  )
  return grads, _sums(found, "first")


def _groups(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """Return the shape (B, G, W) of one value for each channel of a row."""
  return shape[0], shape[-1] // W, W


def _named(
  name: str, sums: WKVState, shape: tuple[int, int, int]
) -> dict[str, Array]:
  reshaped = (x.reshape(shape) for x in sums)
  return dict(zip(sums_names(name), reshaped, strict=True))


def _sums(found: dict[str, Array], name: str) -> WKVState:
  arrays = (found[each] for each in sums_names(name))
  return WKVState(*(x.reshape(x.shape[0], -1) for x in arrays))


def _grouped(arrays: dict[str, Array]) -> dict[str, Array]:
  """Return the arrays in the kernels' form, with channels in groups.

  w and u get a row for each row of the batch, because every array must have the
  same axis of rows.
  """
  B, G, _ = _groups(arrays["k"].shape)
  grouped = {}
  for name, x in arrays.items():
    if name == "starts":
      x = x.astype(jnp.int32)
    elif name in ("w", "u"):
      x = jnp.broadcast_to(x.reshape(1, G, W), (B, G, W))
    else:
      x = x.reshape(*x.shape[:-1], G, W)
    grouped[name] = x
  return grouped


def _forward(arrays: dict[str, Array]) -> dict[str, Array]:
  launch, arrays = _launch(arrays)
  if launch.slices > 1:
    arrays = arrays | forward_kernels.slice_sums(launch, arrays)
  return forward_kernels.forward(launch, arrays)


def _backward(arrays: dict[str, Array]) -> dict[str, Array]:
  launch, arrays = _launch(arrays)
  if launch.slices > 1:
    arrays = arrays | backward_kernels.slice_cotangents(launch, arrays)
  found = backward_kernels.backward(launch, arrays)
  return found | {name: found[name].sum(axis=1) for name in ("dw", "du")}


def _launch(arrays: dict[str, Array]) -> tuple[Launch, dict[str, Array]]:
  """Return the launch, and the arrays with "broken" where they need it."""
  documents = "starts" in arrays
  launch = make_launch(arrays["k"], documents=documents)
  if documents and launch.slices > 1:
    broken = slices_with_starts(arrays["starts"], launch.slices, launch.tokens)
    arrays = arrays | dict(broken=broken)
  return launch, arrays
