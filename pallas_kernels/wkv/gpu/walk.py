"""The walk of a program over the tokens of a slice of time.

A program walks one slice of one row, for a group of W = 128 channels. Each
thread has one channel, and its sums in registers. The inputs of a block of
tokens are loaded one block ahead, so that they arrive while the block before
them is computed.

Where rows × groups give too few programs, time is cut into slices, which are
walked at once. A first kernel computes each slice's own sums. A second one
starts each slice from the sums of all slices before it, decayed by the tokens
between. The backward does the same from the end, with λ and μ.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.devices import WARPGROUP
from pallas_kernels.time_slices import Cut, cut_time
from pallas_kernels.wkv.state import EMPTY, WKVState, add_token

W = WARPGROUP  # channels of a program, one a thread
C = 8  # tokens of a chunk; the sums before each are kept for the backward
BLOCK = 2 * C  # tokens that the forward loads at once; slices are whole blocks
f32 = jnp.float32

# Each of a Hopper GPU's 132 multiprocessors runs three programs at once. The
# least is in blocks. These numbers were computed and not yet measured.
CUT = Cut(enough=200, programs=3 * 132, least=16)

_CHANNELS = plgpu.Layout.WG_STRIDED((W,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class Launch:
  """The static record of a kernel launch.

  Attributes:
    B: rows of the batch.
    T: tokens of a row.
    G: groups of W channels.
    dtype: of the arrays with tokens; sums are float32.
    documents: whether rows hold several documents.
    slices: slices of time, which different programs walk at once.
    tokens: tokens of a slice, in whole blocks; the last slice may have fewer.
  """

  B: int
  T: int
  G: int
  dtype: Any
  documents: bool
  slices: int
  tokens: int

  @property
  def total_chunks(self) -> int:
    """Chunks of a row."""
    return -(-self.T // C)


def make_launch(k_BTGW: Array, *, documents: bool) -> Launch:
  """Return the launch of a call, with time cut into slices.

  Args:
    k_BTGW: the keys, of which shape and dtype are read.
    documents: whether rows hold several documents.
  """
  B, T, G, _ = k_BTGW.shape
  slices, blocks = cut_time(-(-T // BLOCK), B * G, CUT)
  return Launch(B, T, G, k_BTGW.dtype, documents, slices, blocks * BLOCK)


class Place(NamedTuple):
  """A program's part of the arrays; all are traced integers."""

  b: Any  # the row
  s: Any  # the slice of time
  g: Any  # the group of channels
  first: Any  # the slice's first token
  tokens: Any  # how many tokens it has


def place(launch: Launch, skipped: int = 0) -> Place:
  """Find the part of this program.

  Args:
    launch: the launch.
    skipped: slices before the first one that the launch walks.
  """
  b, s, g = (lax.axis_index(name) for name in ("b", "s", "g"))
  s = s + skipped
  first = s * launch.tokens
  return Place(b, s, g, first, jnp.minimum(launch.tokens, launch.T - first))


# Registers.


def load(ref_W) -> Array:
  """Load one value for each channel, in the array's dtype."""
  return plgpu.load(ref_W, layout=_CHANNELS)


def full(value: float) -> Array:
  """Return the same float32 value for each channel."""
  return plgpu.layout_cast(jnp.full(W, value, f32), _CHANNELS)


def empty_sums() -> WKVState:
  """Return the sums of no tokens."""
  return WKVState(full(0), full(0), full(EMPTY))


def load_sums(refs: dict[str, Any], name: str, at: tuple) -> WKVState:
  """Load three arrays of sums, as `sums_names` calls them."""
  return WKVState(*(load(refs[each].at[at]) for each in sums_names(name)))


def store_sums(refs: dict[str, Any], name: str, at: tuple, sums) -> None:
  """Store sums in three arrays, as `sums_names` calls them."""
  for each, x_W in zip(sums_names(name), sums, strict=True):
    refs[each].at[at][...] = x_W


def sums_names(name: str) -> tuple[str, ...]:
  """Return the names of the three arrays of a `WKVState`."""
  return tuple(f"{name}_{field}" for field in WKVState._fields)


def where(condition, x: Any, y: Any) -> Any:
  """Return the tree x if the condition holds, else y."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


def advance(sums: WKVState, w_W: Array, k_W: Array, v_W: Array) -> WKVState:
  """Return the sums after one more token."""
  return add_token(sums, w_W, k_W, v_W, full(1))


# The walk.


class Token(NamedTuple):
  """A token of a block.

  Attributes:
    t: its place in the row; beyond the end where it is no token.
    inputs: one value for each channel, by name, in float32.
    start: whether it starts a document; None where rows have none.
    is_one: whether it is a token; None where all are.
  """

  t: Any
  inputs: dict[str, Array]
  start: Any
  is_one: Any


def walk(
  launch: Launch,
  here: Place,
  refs: dict[str, Any],
  names: tuple[str, ...],
  block: int,
  step: Callable[[Any, list[Token], Any], Any],
  carry: Any,
  *,
  from_end: bool = False,
) -> Any:
  """Run carry = step(first token, tokens, carry) over the slice's blocks.

  Args:
    launch: the launch.
    here: the program's part.
    refs: arrays in HBM; those of `names` and "starts" are read.
    names: arrays (B, T, G, W) that a step reads.
    block: tokens of a block, C or BLOCK.
    step: takes the number of the block's first token in the row and the
      block's tokens, in the order of time.
    carry: what goes from step to step, in registers.
    from_end: whether to walk from the last block to the first.
  """
  is_cut = launch.T % block != 0  # the last block has fewer tokens
  count = (here.tokens + block - 1) // block

  def first_of(i):
    return here.first + (count - 1 - i if from_end else i) * block

  def fetch(first):
    """Load the inputs of a block in their dtype; a cast would wait for them."""
    loaded = []
    for j in range(block):
      t = jnp.clip(first + j, 0, launch.T - 1)
      at = here.b, t, here.g
      loaded.append({name: load(refs[name].at[at]) for name in names})
    return loaded

  def run(i, carry):
    loaded, carry = carry
    first = first_of(i)
    ahead = fetch(first_of(i + 1))
    tokens = []
    for j, inputs in enumerate(loaded):
      t, start = first + j, None
      if launch.documents:
        start = refs["starts"][here.b, jnp.minimum(t, launch.T - 1)] != 0
      wide = {name: x_W.astype(f32) for name, x_W in inputs.items()}
      tokens.append(Token(t, wide, start, t < launch.T if is_cut else None))
    return ahead, step(first, tokens, carry)

  carry = fetch(first_of(0)), carry
  return lax.fori_loop(0, count, run, carry)[1]


def keep(token: Token, after: Any, before: Any) -> Any:
  """Return what is after a token, or what was before if it is none."""
  if token.is_one is None:
    return after
  return where(token.is_one, after, before)


def reset(token: Token, sums: WKVState) -> WKVState:
  """Return empty sums if the token starts a document."""
  if token.start is None:
    return sums
  return where(token.start, empty_sums(), sums)


def join_slices(
  launch: Launch,
  here: Place,
  sums: WKVState,
  w_W: Array,
  refs: dict[str, Any],
  *,
  from_end: bool = False,
) -> WKVState:
  """Return the sums before this slice, from those before the first one.

  Args:
    launch: the launch.
    here: the program's part.
    sums: those before the first slice. With `from_end`, λ and μ after the last
      one.
    w_W: decays.
    refs: "slice_…", the own sums of all slices but the last; with `from_end` of
      all but the first. With documents also "broken", in which slices a
      document starts.
    from_end: whether to join the slices after this one.
  """
  if launch.slices == 1:
    return sums

  def join(i, sums):
    s = launch.slices - 1 - i if from_end else i
    own = load_sums(refs, "slice", (here.b, s - 1 if from_end else s, here.g))
    tokens = jnp.minimum(launch.tokens, launch.T - s * launch.tokens)
    x, y, p = own
    after = add_token(sums, tokens.astype(f32) * w_W, p, x, y)
    if launch.documents:
      after = where(refs["broken"][here.b, s] != 0, own, after)
    return after

  count = launch.slices - 1 - here.s if from_end else here.s
  return lax.fori_loop(0, count, join, sums)


def kernel(
  name: str,
  launch: Launch,
  body: Callable[[dict[str, Any]], None],
  arrays: dict[str, Array],
  outputs: dict[str, jax.ShapeDtypeStruct],
  *,
  slices: int,
) -> dict[str, Array]:
  """Run body(refs) in a program for each slice, row and group of channels.

  Args:
    name: the kernel's name in a profile.
    launch: the launch.
    body: takes the references of arrays and outputs by name.
    arrays: the inputs.
    outputs: shapes and dtypes of the outputs.
    slices: how many slices are walked.

  Returns:
    The outputs, by name.
  """

  def run(*refs):
    body(dict(zip((*arrays, *outputs), refs, strict=True)))

  call = plgpu.kernel(
    run,
    out_type=list(outputs.values()),
    grid=(launch.B, slices, launch.G),
    grid_names=("b", "s", "g"),
    kernel_name=name,
    # No shared memory is used, so that nothing needs a barrier.
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
    ),
  )
  return dict(zip(outputs, call(*arrays.values()), strict=True))


def sums_outputs(
  name: str, launch: Launch, *axes: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Describe three arrays of sums (B, axes, G, W)."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=f32)
  each = launch.B, *axes, launch.G, W
  return {field: shape(each) for field in sums_names(name)}
