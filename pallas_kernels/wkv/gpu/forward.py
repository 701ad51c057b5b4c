"""The Hopper kernels of WKV's forward.

    A_{t+1} = e^w A_t + e^{k_t} v_t,   B_{t+1} = e^w B_t + e^{k_t}
    y_t = (A_t + e^{u + k_t} v_t) / (B_t + e^{u + k_t})

k and v are read once, or twice where time is cut into slices. A and B before
each chunk are written for the backward.
"""

import jax
from jax import Array
import jax.experimental.pallas as pl

from pallas_kernels.wkv.gpu.walk import (
  BLOCK,
  C,
  Launch,
  W,
  advance,
  empty_sums,
  join_slices,
  keep,
  kernel,
  load,
  load_sums,
  place,
  reset,
  store_sums,
  sums_outputs,
  walk,
)
from pallas_kernels.wkv.state import output


def slice_sums(launch: Launch, arrays: dict[str, Array]) -> dict[str, Array]:
  """Compute the own sums of each slice but the last.

  Args:
    launch: the launch, of several slices.
    arrays: "k", "v", "w"; "starts" with documents.

  Returns:
    "slice_…" (B, slices − 1, G, W), float32.
  """

  def body(refs):
    here = place(launch)
    w_W = load(refs["w"].at[here.b, here.g])

    def step(_, tokens, sums):
      for token in tokens:
        k_W, v_W = token.inputs["k"], token.inputs["v"]
        sums = reset(token, sums)
        sums = keep(token, advance(sums, w_W, k_W, v_W), sums)
      return sums

    sums = walk(launch, here, refs, ("k", "v"), BLOCK, step, empty_sums())
    store_sums(refs, "slice", (here.b, here.s, here.g), sums)

  names = ("k", "v", "w", "starts")
  return kernel(
    "wkv_slice_sums",
    launch,
    body,
    {name: arrays[name] for name in names if name in arrays},
    sums_outputs("slice", launch, launch.slices - 1),
    slices=launch.slices - 1,
  )


def forward(launch: Launch, arrays: dict[str, Array]) -> dict[str, Array]:
  """Compute y, the sums after the row, and those before each chunk.

  Args:
    launch: the launch.
    arrays: "k", "v", "w", "u", "state_…" (the sums before the row); "starts"
      with documents; with several slices also what `slice_sums` returns, and
      "broken" if there are documents.

  Returns:
    "y" (B, T, G, W) in k's dtype; "last_…" (B, G, W) and "before_…" (B, chunks,
    G, W) in float32.
  """

  def body(refs):
    here = place(launch)
    row = here.b, here.g
    w_W, u_W = load(refs["w"].at[row]), load(refs["u"].at[row])
    sums = load_sums(refs, "state", row)
    sums = join_slices(launch, here, sums, w_W, refs)

    def step(_, tokens, sums):
      for j, token in enumerate(tokens):
        if j % C == 0:
          _store_before(launch, here, refs, token, sums)
        k_W, v_W = token.inputs["k"], token.inputs["v"]
        sums = reset(token, sums)
        y_W, *_ = output(sums, k_W, v_W, u_W)
        store_token(here, refs["y"], token, y_W)
        sums = keep(token, advance(sums, w_W, k_W, v_W), sums)
      return sums

    sums = walk(launch, here, refs, ("k", "v"), BLOCK, step, sums)
    pl.when(here.s == launch.slices - 1)(
      lambda: store_sums(refs, "last", row, sums)
    )

  y = jax.ShapeDtypeStruct((launch.B, launch.T, launch.G, W), launch.dtype)
  outputs = dict(y=y) | sums_outputs("last", launch)
  outputs |= sums_outputs("before", launch, launch.total_chunks)
  return kernel(
    "wkv_forward", launch, body, arrays, outputs, slices=launch.slices
  )


def store_token(here, ref, token, x_W: Array) -> None:
  """Store a value for each channel of a token, if it is one."""

  def store():
    ref.at[here.b, token.t, here.g][...] = x_W.astype(ref.dtype)

  store() if token.is_one is None else pl.when(token.is_one)(store)


def _store_before(launch: Launch, here, refs, token, sums) -> None:
  """Store the sums before the chunk that starts at a token, if it is one."""

  def store():
    store_sums(refs, "before", (here.b, token.t // C, here.g), sums)

  store() if token.is_one is None else pl.when(token.is_one)(store)
