"""What the TPU kernels share: sizes, features, products, masks.

Tokens are on lanes: q and k are (F, C), v and o (P, C), so that features are
rows and a (T, 16) array does not fill eight times its bytes. Scores are
[s, t]: what belongs to a query is a row, which broadcasts for nothing.

All is divided by c2: sim / c2 = a² + c1' a + c0', with a = q·k, c' = c / c2,
eps' = eps / c2. The features of `spec.py` are then weighted by 1, 2, …, 2, 1
(c1' for x and c0' for the 1), exact in bfloat16, on the side of the queries:

    φ_w(q)·φ(k) = sim / c2

The 1 stands on the first of 8 rows, the others of which are 0.
"""

from collections.abc import Iterator
import dataclasses

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

ONES = 8  # rows of the 1
GROUP = 256  # features that are made and used at a time
_HIGH = 0xFFFF0000  # the bits of a float32 that bfloat16 keeps


@dataclasses.dataclass(frozen=True)
class Call:
  """The static part of a call of the kernels."""

  B: int
  T: int
  H: int
  F: int
  P: int  # rows of a head's values, as they are given
  dtype: str
  c1: float  # divided by c2, as c0 and eps are
  c0: float
  eps: float
  affine: bool
  documents: bool
  heads: int  # of one step of the grid
  chunk: int  # tokens whose scores are taken as they stand
  span: int  # tokens of the chunks that are laid out one behind the other
  block: int  # tokens of one step of the grid, a loop over spans

  @property
  def steps(self) -> int:
    return -(-self.T // self.block)

  @property
  def tail(self) -> bool:
    """Whether the last block has lanes past the last token."""
    return self.T % self.block != 0

  @property
  def V(self) -> int:
    """Rows of the values, filled up to whole tiles."""
    return -(-self.P // 8) * 8

  @property
  def squares(self) -> int:
    """Rows of the products x_i x_{i+r}."""
    return self.F * (self.F // 2 + 1)

  @property
  def E(self) -> int:
    """Rows of the features, in the kernels' own form."""
    return self.squares + (self.F + ONES if self.affine else 0)

  @property
  def G(self) -> int:
    """Rows of x̃: x, and the rows of the 1."""
    return self.F + (ONES if self.affine else 0)

  @property
  def vmem_bytes(self) -> int:
    """Of a step of the largest kernel: twice its blocks, of which the next are
    on their way, and the states, which may also come in and go out."""
    tokens = 6 * jnp.dtype(self.dtype).itemsize * (self.F + self.P)
    states = 5 * 4 * 128 * (self.E + self.G)  # a row fills 128 lanes
    return self.heads * (tokens * self.block + states)

  def weight(self, r: int) -> float:
    return 1.0 if r == 0 or 2 * r == self.F else 2.0

  def groups(self) -> list[tuple[int, range, bool]]:
    """(first row, blocks r, whether x and 1 follow), of GROUP rows or more."""
    size, blocks = max(1, GROUP // self.F), self.F // 2 + 1
    starts = range(0, blocks, size)
    return [
      (
        start * self.F,
        range(start, min(start + size, blocks)),
        self.affine and start == starts[-1],
      )
      for start in starts
    ]

  def rows(self, group) -> slice:
    first, blocks, more = group
    size = len(blocks) * self.F + (self.F + ONES if more else 0)
    return slice(first, first + size)


def weighted(kk_GG: Array, call: Call) -> Array:
  """W∘kk, with W of `spec.weights_GG` divided by c2."""
  if not call.affine:
    return kk_GG
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, kk_GG.shape, axis) for axis in (0, 1)
  )
  x_x = (row < call.F) & (column < call.F)
  x_1 = (jnp.minimum(row, column) < call.F) & (
    jnp.maximum(row, column) == call.F
  )
  w_GG = jnp.where(x_1, call.c1 / 2, jnp.where(x_x, 1.0, 0.0))
  one = (row == call.F) & (column == call.F)
  return kk_GG * jnp.where(one, call.c0, w_GG)


# Products.


def dot(a: Array, b: Array, over: tuple[int, int], call: Call) -> Array:
  """Σ over a's axis and b's, in float32."""
  wide = call.dtype == "float32"
  level = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    a.astype(call.dtype),
    b.astype(call.dtype),
    (((over[0],), (over[1],)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=level,
  )


def _parts(x: Array) -> list[Array]:
  """float32 as a sum of three bfloat16, cut bit by bit."""
  parts = []
  for _ in range(3):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_HIGH)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    parts.append(high.astype(jnp.bfloat16))
    x = x - high
  return parts


def dot_left(a: Array, b: Array, call: Call) -> Array:
  """a (M, K) in float32 times b (K, C), of the call's dtype, exactly."""
  if call.dtype == "float32":
    return dot(a, b, (1, 0), call)
  b = b.astype(call.dtype)
  return dot(
    jnp.concatenate(_parts(a), 1), jnp.concatenate([b] * 3), (1, 0), call
  )


def dot_right(a: Array, b: Array, call: Call) -> Array:
  """a (M, C) in float32 times b (K, C) over C, exactly."""
  if call.dtype == "float32":
    return dot(a, b, (1, 1), call)
  M = a.shape[0]
  y = dot(jnp.concatenate(_parts(a)), b, (1, 1), call)
  return y[:M] + y[M : 2 * M] + y[2 * M :]


# Features.


def roll(x: Array, r: int) -> Array:
  """Row i is x's row i + r, around."""
  r %= x.shape[0]
  return x if r == 0 else jnp.concatenate([x[r:], x[:r]])


def extend(x_FC: Array, one_1C: Array | None, call: Call) -> Array:
  """x̃; `one` is the row of the 1, or None for ones."""
  if not call.affine:
    return x_FC
  return jnp.concatenate([x_FC, _ones(x_FC, one_1C)])


def _ones(x_FC: Array, one_1C: Array | None = None) -> Array:
  C = x_FC.shape[1]
  first = jax.lax.broadcasted_iota(jnp.int32, (ONES, C), 0) == 0
  one = 1.0 if one_1C is None else one_1C
  return jnp.where(first, one, 0.0).astype(x_FC.dtype)


def features(x_FC: Array, call: Call, *, weighted: bool) -> Iterator:
  """(group, its rows of the features) of x in float32."""
  for group in call.groups():
    _, blocks, more = group
    rows = []
    for r in blocks:
      w = call.weight(r) if weighted else 1.0
      rows.append(x_FC * (roll(x_FC, r) * w if w != 1 else roll(x_FC, r)))
    if more:
      w1, w0 = (call.c1, call.c0) if weighted else (1.0, 1.0)
      rows += [x_FC * w1, _ones(x_FC) * w0]
    yield group, jnp.concatenate(rows).astype(call.dtype)


def pull(u_EC: Array, group, x_FC: Array, call: Call, *, weighted: bool):
  """The cotangent of x from that of a group's features, in two parts.

  The first is Σ_r u_r ∘ roll(x), with which x·(first) = u·features; the
  second its mirror, Σ_r roll⁻¹(u_r ∘ x).
  """
  first_FC = second_FC = jnp.zeros_like(x_FC)
  for i, r in enumerate(group[1]):
    u_FC = u_EC[i * call.F : (i + 1) * call.F]
    if weighted and call.weight(r) != 1:
      u_FC = u_FC * call.weight(r)
    first_FC += u_FC * roll(x_FC, r)
    second_FC += roll(u_FC * x_FC, -r)
  return first_FC, second_FC


# Masks and places.


def each_chunk(work, call: Call, *, reverse: bool = False) -> None:
  """Runs work(head, lanes in the block, place in the row) for each chunk.

  In order, or from the end. `work` is a generator; what reads or writes the
  state stands between the same two yields of all chunks, and so in their order.
  """
  first = _step(call, reverse)(pl.program_id(2)) * call.block
  chunk = lambda head, place: work(head, _lanes(place, call), first + place)

  def span(i, carry):
    start = (call.block // call.span - 1 - i if reverse else i) * call.span
    places = range(0, call.span, call.chunk)
    order = reversed(places) if reverse else places
    heads = range(call.heads)
    _interleave([chunk(h, start + place) for place in order for h in heads])
    return carry

  if call.span == call.block:
    span(0, None)
  else:
    jax.lax.fori_loop(0, call.block // call.span, span, None)


def _interleave(chunks: list) -> None:
  """Runs the chunks' generators, each one yield behind the one before it.

  The compiler keeps near to the order that it is given, so a chunk's first
  products stand before the last of the chunk ahead of it, which wait for
  results.
  """
  live = []
  while chunks or live:
    live = chunks[:1] + live
    chunks = chunks[1:]
    live = [chunk for chunk in live if next(chunk, "done") is None]


def _lanes(place, call: Call):
  """The slice of a chunk that starts there."""
  if not isinstance(place, int):
    place = pl.multiple_of(place, call.chunk)
  return pl.ds(place, call.chunk)


@dataclasses.dataclass(frozen=True)
class Masks:
  """Of one chunk. None where all is seen."""

  seen_CC: Array  # [s, t]: s ≤ t, in one document
  valid_1C: Array | None  # is a token
  first_1C: Array | None  # of the document of the state before
  last_1C: Array | None  # of the document of the state after
  joined_11: Array | None  # these two are one document


def masks(start_ref, at, begin, call: Call) -> Masks:
  """`begin` is the place of the chunk's first token; `start` has for each token
  that of its document's first, or is None."""
  C = call.chunk
  iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  seen = iota((C, C), 0) <= iota((C, C), 1)
  place_1C = begin + iota((1, C), 1)
  valid = place_1C < call.T if call.tail else None
  if start_ref is None:
    return Masks(seen, valid, None, None, None)
  start_1C = start_ref[:, at]
  seen &= iota((C, C), 0) + begin >= start_1C
  before = jnp.maximum(begin, 1)
  end_11 = start_1C[:, C - 1 :]
  return Masks(
    seen, valid, start_1C < before, place_1C >= end_11, end_11 < before
  )


def only(mask, x):
  """x where the mask holds (None: everywhere), else 0."""
  return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def seen_sum(
  x_RC: Array, w_CC: Array, m: Masks, call: Call, *, over_queries: bool = False
) -> Array:
  """Σ_s x_s w_st (or Σ_t x_t w_st), w being 0 where s is not seen from t.

  Of documents, an Inf or NaN in x reaches those alone that see it.
  """
  over = (1, 1) if over_queries else (1, 0)
  if not call.documents:
    return dot(x_RC, w_CC, over, call)
  x_RC = x_RC.astype(jnp.float32)
  fine_RC = jnp.where(jnp.abs(x_RC) < jnp.inf, 1.0, 0.0)
  fine_1C = jnp.min(fine_RC, axis=0, keepdims=True) > 0
  y_RC = dot(jnp.where(fine_1C, x_RC, 0.0), w_CC, over, call)
  bad_8C = jnp.broadcast_to(jnp.where(fine_1C, 0.0, 1.0), (8, call.chunk))
  seen_CC = jnp.where(m.seen_CC, 1.0, 0.0)
  bad_1C = dot(bad_8C, seen_CC, over, call)[:1]
  return jnp.where(bad_1C > 0, jnp.nan, y_RC)


def take_up(new, kv_ref, kk_ref, m: Masks, call: Call, *, by_feature) -> None:
  """Adds sums of a chunk, by groups of features, to the state."""
  groups, new_GG = new
  for group, sums in zip(call.groups(), groups, strict=True):
    rows = call.rows(group)
    at = (rows, slice(None)) if by_feature else (slice(None), rows)
    kv_ref[at] = only(m.joined_11, kv_ref[at]) + sums
  kk_ref[...] = only(m.joined_11, kk_ref[...]) + new_GG


# The grid, and the arrays' blocks: some heads, some tokens.


def _step(call: Call, reverse: bool):
  """The block of time at a step of the grid."""
  return lambda c: call.steps - 1 - c if reverse else c


def tokens(rows: int, call: Call, *, reverse: bool = False) -> pl.BlockSpec:
  """Of a (B, H·rows, T) array; a head's rows need not be whole tiles."""
  at = _step(call, reverse)
  return pl.BlockSpec(
    (None, call.heads * rows, call.block), lambda b, h, c: (b, h, at(c))
  )


def starts(call: Call, *, reverse: bool = False) -> pl.BlockSpec:
  """Of the (B, 1, T) documents' starts."""
  at = _step(call, reverse)
  return pl.BlockSpec((None, 1, call.block), lambda b, h, c: (b, 0, at(c)))


def scalars(call: Call, *, reverse: bool = False) -> pl.BlockSpec:
  """Of a (B, H, 1, T) array."""
  at = _step(call, reverse)
  return pl.BlockSpec(
    (None, call.heads, 1, call.block), lambda b, h, c: (b, h, 0, at(c))
  )


def whole(size: tuple[int, int], call: Call) -> pl.BlockSpec:
  """Of a (B, H, ·, ·) array."""
  return pl.BlockSpec((None, call.heads, *size), lambda b, h, c: (b, h, 0, 0))


def states_in(state, sizes, call: Call) -> list:
  """The inputs that a state is, for `run`; none where there is none."""
  if state is None:
    return []
  return [(x, whole(n, call)) for x, n in zip(state, sizes, strict=True)]


def states_out(sizes, call: Call) -> list:
  """The outputs that a state is, for `run`."""
  shape = lambda size: jax.ShapeDtypeStruct(
    (call.B, call.H, *size), jnp.float32
  )
  return [(shape(size), whole(size, call)) for size in sizes]


def begin(states, start) -> None:
  """At a row's first step, the states in VMEM are `start`, or None: 0."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    for ref, x in zip(states, start or (None,) * len(states), strict=True):
      ref[...] = jnp.zeros_like(ref) if x is None else x[...]


def end(states, out, call: Call) -> None:
  """At a row's last step, the states in VMEM go out."""

  @pl.when(pl.program_id(2) == call.steps - 1)
  def _():
    for ref, x in zip(out, states, strict=True):
      ref[...] = x[...]


def load(ref, head: int, rows: int, at, mask_1C: Array | None = None) -> Array:
  """A head's rows, masked and filled up with zeros to whole tiles."""
  x = ref[pl.ds(head * rows, rows), at]
  if rows % 8:
    zeros = jnp.zeros((-rows % 8, x.shape[1]), jnp.float32)
    x = jnp.concatenate([x.astype(jnp.float32), zeros])
  return only(mask_1C, x).astype(ref.dtype)


def store(ref, head: int, rows: int, at, x: Array) -> None:
  """The inverse of `load`."""
  ref[pl.ds(head * rows, rows), at] = x[:rows].astype(ref.dtype)


def run(body, call: Call, inputs, outputs, scratch, name: str):
  """pallas_call over (batch, heads, blocks), of (array or shape, spec)s.

  Under vmap the new axis joins the batch, the first axis of all arrays.
  """
  arrays, in_specs = zip(*inputs, strict=True)
  shapes, out_specs = zip(*outputs, strict=True)

  @jax.custom_batching.custom_vmap
  def each(*arrays):
    found = pl.pallas_call(
      body,
      grid=(call.B, call.H // call.heads, call.steps),
      in_specs=list(in_specs),
      out_specs=list(out_specs),
      out_shape=list(shapes),
      scratch_shapes=[
        pltpu.VMEM((call.heads, *size), jnp.float32) for size in scratch
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
      ),
      name=f"polynomial_{name}",
    )(*arrays)
    return tuple(found)

  @each.def_vmap
  def _(size, batched, *arrays):
    B = size * call.B
    joined = [
      (x if mapped else jnp.broadcast_to(x, (size, *x.shape))).reshape(
        B, *x.shape[1 + mapped :]
      )
      for x, mapped in zip(arrays, batched, strict=True)
    ]
    many = [jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype) for x in shapes]
    found = run(
      body,
      dataclasses.replace(call, B=B),
      zip(joined, in_specs, strict=True),
      zip(many, out_specs, strict=True),
      scratch,
      name,
    )
    cut = tuple(x.reshape(size, call.B, *x.shape[1:]) for x in found)
    return cut, (True,) * len(cut)

  return each(*arrays)
