"""What the Hopper kernels share: features, tiles, and their layouts.

A pair of warpgroups walks over a slice of one head's tokens in chunks of
C = 64. Keys and queries are F = 16 wide. The features of a chunk are blocks of
16 columns,

    cyclic r = 0 … 8   x ∘ (x Π_r)      Π_r rolls by r: a product on the tensor
                                        core, since registers cannot be rolled
    linear             x                 with c1
    constant           (1, 1, 0, …)      with c0; weights (hi, lo) on the query

and everything is divided by c2 / σ, which cancels: sim' = σ a² + c1' a + c0' of
a = q·k, with eps' = σ eps / c2. The state is kept transposed in registers, KVᵀ
(V × E), beside KK (rows: 16 of k̃ k̃ᵀ, then the sum of k twice); the tensor core
reads a copy of KVᵀ in the operands' dtype, and of KK a high and a low half,
whose sum is exact to 16 bits.

Operands are bfloat16 or float16, as the inputs are. float16 has little range:
σ is c2 to a power of two, the copies of KVᵀ and KK are divided by 2^⌈log₂ T⌉,
and g = r do, dz are multiplied by √ of it. With bfloat16 all three are 1.

Values wider than V = 64 are tiles of their own, each walked as a head is. So
are the parts of queries and keys that are m times as wide, x = (x_1, …, x_m):

    (q·k)² = Σ_i (q_i·k_i)² + 2 Σ_{i<j} (q_i·k_i)(q_j·k_j)

A part (i, i) has the features above, of x_i, and c0 / m for c0; a pair has
x_i ∘ (x_j Π_r), r = 0 … 15, in two halves of 8 blocks. See `gpu_wide.py`.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial.gpu.launch import CYCLIC, C, Call, F, V

GROUP = 2  # blocks at a time, where features are made
TILE = 32  # columns of a tile of scores at a time
LAYOUT = plgpu.Layout.WGMMA
f32 = jnp.float32
ROWS = LAYOUT.reduce(1)  # a value a row of a tile
COLUMNS = LAYOUT.reduce(0)

SWIZZLE_32 = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))
SWIZZLE_128 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


class Place(NamedTuple):
  """Where a warpgroup stands."""

  p: Any  # which of the program's heads
  s: Any
  b: Any
  head: Any  # of those that are walked: h, the tile of its values, the part
  h: Any
  tile: Any
  first: Any  # chunk of the slice
  chunks: Any  # of the slice
  i: Any = 0  # of the part
  j: Any = 0
  half: Any = 0

  @property
  def at(self):
    return self.s, self.b, self.head


class Shared(NamedTuple):
  """What a walk holds in shared memory, for one head of the program."""

  phi: Any  # (C, E)
  wide: Any  # (C, V): k̃ or dz q̃, with zeros behind it
  kv: Any  # (V, E)
  kk: Any  # (hi and lo, V, F)
  x: Any  # (C, F) and values (C, V), those of one document; else None
  values: Any
  full: Any  # barriers: a stage's copies are there
  ready: Any
  read: Any
  done: Any


class Work(NamedTuple):
  """What a warpgroup works with."""

  call: Call
  here: Place
  shared: Shared
  inputs: dict  # by name, (stages, C, ·)
  tiles: dict  # by name, for the outputs
  outs: tuple  # arrays
  rolls: Any
  operand: Any  # (C, F), where operands are shared
  count: Any  # tokens of the state before the slice


def fill(x_BTHX, tokens: int, width: int):
  """Zeros up to a multiple of `tokens`, and a width; no copy where it fits."""
  pad = ((0, 0), (0, -x_BTHX.shape[1] % tokens), (0, 0))
  pad = (*pad, (0, width - x_BTHX.shape[-1]))
  return x_BTHX if not any(after for _, after in pad) else jnp.pad(x_BTHX, pad)


def rolls(blocks: range = range(CYCLIC)) -> np.ndarray:
  """Π (F, F a block): x Π holds these rolled copies of x."""
  table = np.zeros((F, len(blocks) * F), np.float32)
  for n, r in enumerate(blocks):
    for i in range(F):
      table[(i + r) % F, n * F + i] = 1
  return table


def weight(r: int, call: Call) -> float:
  """Of the cyclic block r in (q·k)²."""
  return 1.0 if r in (0, CYCLIC - 1) and not call.pairs else 2.0


def smem(call: Call, *shape: int, swizzle=SWIZZLE_32):
  return plgpu.SMEM(shape, call.dtype, transforms=swizzle)


def zeros(shape, dtype=f32):
  return plgpu.layout_cast(jnp.zeros(shape, dtype), LAYOUT)


def iota(shape, axis: int):
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)


def block(r: int) -> slice:
  return slice(r * F, (r + 1) * F)


def columns(x_C, width: int):
  """A value a row, over `width` columns."""
  return lax.broadcast_in_dim(x_C, (C, width), [0])


def mma(work: Work, *pairs, shape):
  """Σ A B on the tensor core, in float32."""
  return mmas(work, (shape, *pairs))[0]


def mmas(work: Work, *products):
  """Σ A B for each (shape, (A, B), …), all under way at once."""
  if work.call.by_shared:
    return [_by_shared(work, zeros(shape), pairs) for shape, *pairs in products]

  def run(*accs):
    for acc, (_, *pairs) in zip(accs, products, strict=True):
      for a, b in pairs:
        plgpu.wgmma(acc, a, b)
    return tuple(acc[...] for acc in accs)

  return pl.run_scoped(run, *(plgpu.ACC(x[0], f32) for x in products))


def add_mma(work: Work, acc, *pairs):
  """acc + Σ A B."""
  return add_mmas(work, (acc, *pairs))[0]


def add_mmas(work: Work, *sums):
  """acc + Σ A B for each (acc, (A, B), …), all under way at once."""
  if work.call.by_shared:
    return [_by_shared(work, acc, pairs) for acc, *pairs in sums]

  def run(refs):
    for ref, (_, *pairs) in zip(refs, sums, strict=True):
      for a, b in pairs:
        plgpu.wgmma(ref, a, b)

  return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc, *_ in sums))


def _by_shared(work: Work, acc, pairs):
  """acc + Σ A B, one product after the other, A from shared memory."""

  def run(ref, a, b):
    plgpu.wgmma(ref, a, b)
    return ref[...]

  product = lambda a, b: pl.run_scoped(
    lambda ref: run(ref, a, b), plgpu.ACC(acc.shape, f32)
  )
  for a, b in pairs:
    if not isinstance(a, jax.Array):
      acc = acc + product(a, b)
      continue
    for start in range(0, a.shape[1], F):
      work.operand[...] = a[:, start : start + F]
      plgpu.commit_smem()
      rows = b if a.shape[1] == F else b.at[pl.ds(start, F)]
      acc = acc + product(work.operand, rows)
  return acc


def two_columns(dtype, first, second=None):
  """(C, F) with one or two leading columns and zeros behind them."""
  second = first if second is None else second
  column = iota((C, F), 1)
  value = jnp.where(column == 0, first, jnp.where(column == 1, second, 0.0))
  return value.astype(dtype)


def split(value: float, dtype) -> tuple[float, float]:
  """(hi, lo): numbers of the dtype whose sum is the value to 16 bits."""
  half = lambda x: float(np.asarray(x, dtype))
  return half(value), half(value - half(value))


def times(x, factor: float):
  """x · factor, at no cost where that is 1."""
  return x if factor == 1 else x * factor


def polynomial(a, call: Call):
  """sim' of q·k."""
  sim = times(a * a, call.square)
  if call.c1:
    sim = sim + call.c1 * a
  return sim + call.c0 if call.c0 else sim


def derivative(a, call: Call):
  """d sim' / d (q·k)."""
  slope = (2.0 * call.square) * a
  return slope + call.c1 if call.c1 else slope


# Features.


def query_features(x_CF, rolled, blocks, call: Call, r_CF=None) -> list:
  """Weighted feature blocks of queries, times r; rolled (C, 16 a block)."""
  once = x_CF if r_CF is None else x_CF.astype(f32) * r_CF
  once = times(once, call.square)
  weighted = {1.0: once, 2.0: once + once}
  features = []
  for i, r in enumerate(blocks):
    if r < CYCLIC:
      heavy = weighted[weight(r, call)].astype(call.dtype)
      features.append(heavy * rolled[:, block(i)].astype(call.dtype))
    elif r == CYCLIC and call.c1:
      linear = x_CF.astype(f32) * (call.c1 if r_CF is None else call.c1 * r_CF)
      features.append(linear.astype(call.dtype))
    elif r_CF is None:
      constant = split(call.c0, call.dtype)
      features.append(two_columns(call.dtype, *constant))
    else:
      value = call.c0 * r_CF
      high = value.astype(call.dtype).astype(f32)
      features.append(two_columns(call.dtype, high, value - high))
  return features


def key_features(x_CF, rolled, blocks, call: Call, exists=None) -> list:
  """Feature blocks of keys; rolled (C, 16 a block)."""
  features = []
  for i, r in enumerate(blocks):
    if r < CYCLIC:
      features.append(x_CF * rolled[:, block(i)].astype(call.dtype))
    elif r == CYCLIC and call.c1:
      features.append(x_CF)
    else:
      one = 1.0 if exists is None else exists
      features.append(two_columns(call.dtype, one))
  return features


def roll(work: Work, x_s, blocks: range):
  """x Π of the cyclic ones of these blocks, (C, 16 a block) float32."""
  rolls = some(work.rolls, blocks)
  if rolls is None:
    return None
  return mma(work, (x_s, rolls), shape=(C, rolls.shape[1]))


def roll_all(work: Work, x_s):
  """x Π of all blocks, (C, 16 a block), which is exact."""
  rolled = mma(work, (x_s, work.rolls), shape=(C, work.rolls.shape[1]))
  return rolled.astype(work.call.dtype)


def some(rolls_s, blocks: range):
  """Π of the cyclic ones of these blocks, (F, 16 a block), or None."""
  blocks = range(blocks.start, min(blocks.stop, CYCLIC))
  if not blocks:
    return None
  return rolls_s.at[:, pl.ds(blocks.start * F, len(blocks) * F)]


def store_split(ref, x_VF) -> None:
  """KK as two halves of the operands' dtype, ref (2, V, F)."""
  hi = x_VF.astype(ref.dtype)
  ref[0] = hi
  ref[1] = (x_VF - hi.astype(f32)).astype(ref.dtype)


def halves(kk_s, start: int) -> list:
  """The parts of 16 rows of KK; their sum is KK."""
  return [kk_s.at[i, pl.ds(start, F)] for i in (0, 1)]


def denominator(work: Work, x_s) -> list:
  """The products KK q and c1' Σ k, of (C, F); q · their sum is the state's."""
  call, kk_s = work.call, work.shared.kk
  quadratic = ((C, F), *[(x_s, kk) for kk in halves(kk_s, 0)])
  if not call.c1:
    return [quadratic]
  ones = two_columns(call.dtype, *split(call.c1, call.dtype))
  return [quadratic, ((C, F), *[(ones, kk) for kk in halves(kk_s, F)])]


def forms(work: Work, products):
  """(σ KK q, that + c1' Σ k) of `denominator`'s products."""
  call = work.call
  quadratic, *linear = (times(x, 1 / call.shrink) for x in products)
  quadratic = times(quadratic, call.square)
  return quadratic, quadratic + linear[0] if linear else quadratic


def values_at(work: Work, ref, chunk):
  """The part of a (B, T, H, P) array that a chunk's tile of values is."""
  here, tokens = work.here, pl.ds(chunk * C, C)
  if here.tile is None:
    return ref.at[here.b, tokens, here.h]
  return ref.at[here.b, tokens, here.h, pl.ds(here.tile * V, V)]


def values_tile(name: str, call: Call) -> tuple:
  """A tile of values for an output: its name, shape and swizzle."""
  swizzle = SWIZZLE_128 if call.P % V == 0 else SWIZZLE_32
  return name, (C, call.width), swizzle


def by_state(work: Work, phi: list) -> list:
  """The pairs whose products are Σ_r phi_r KV_r, (C, V)."""
  kv = lambda r: work.shared.kv.at[:, pl.ds(r * F, F)].transpose((1, 0))
  return [(x, kv(r)) for r, x in enumerate(phi)]


def store_blocks(phi_s, blocks: range, features: list) -> None:
  for r, x in zip(blocks, features, strict=True):
    phi_s[:, pl.ds(r * F, F)] = x


def compiler_params():
  return plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,
  )
