"""What the Hopper kernels share: features, tiles, and their layouts.

A pair of warpgroups walks over a slice of one head's tokens in chunks of
C = 64. Keys and queries are F = 16 wide. The features of a chunk are blocks of
16 columns,

    cyclic r = 0 … 8   x ∘ (x Π_r)      Π_r rolls by r: a product on the tensor
                                        core, since registers cannot be rolled
    linear             x                 with c1
    constant           (1, 1, 0, …)      with c0; weights (hi, lo) on the query

and everything is divided by c2, which cancels: sim' = s'² + c1' s' + c0', with
eps' = eps / c2. The state is kept transposed in registers, KVᵀ (V × E), beside
KK (rows: 16 of k̃ k̃ᵀ, then the sum of k twice); the tensor core reads a bf16
copy of KVᵀ, and of KK a high and a low half, whose sum is exact to 16 bits.
"""

import dataclasses

from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial.passes import Kernel
from pallas_kernels.polynomial.spec import State

C = 64  # tokens of a chunk
F = 16  # query and key features
V = 64  # value width of the tiles; narrower values leave zeros
CYCLIC = F // 2 + 1  # blocks
GROUP = 2  # blocks at a time
TILE = 32  # columns of a tile of scores at a time
LAYOUT = plgpu.Layout.WGMMA
bf16, f32 = jnp.bfloat16, jnp.float32

SWIZZLE_32 = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))
SWIZZLE_128 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Call:
  """The static part of one kernel launch."""

  B: int
  T: int
  H: int
  P: int  # of v in memory: 16, 32, 48 or 64
  c0: float  # divided by c2, as are c1 and eps
  c1: float
  eps: float
  slices: int  # of time, each a program of its own
  chunks: int  # of a slice
  stages: int = 2

  @property
  def blocks(self) -> int:
    return CYCLIC + (self.c1 != 0) + (self.c0 != 0)

  @property
  def E(self) -> int:
    return F * self.blocks

  @property
  def groups(self) -> list[range]:
    """The blocks, a few at a time, so that they fit the registers."""
    steps = range(0, self.blocks, GROUP)
    return [range(r, min(r + GROUP, self.blocks)) for r in steps]

  @property
  def rows(self) -> int:
    """T of the arrays in memory, a multiple of 8."""
    return -(-self.T // 8) * 8

  @property
  def total(self) -> int:
    """Chunks of a row."""
    return -(-self.T // C)

  @property
  def square(self) -> bool:
    """Whether sim' is the square alone."""
    return self.c0 == self.c1 == 0


def make_call(B, T, H, P, kernel: Kernel, programs: int) -> Call:
  """Cuts time into slices where heads leave half of the device idle."""
  total = -(-T // C)
  slices = max(1, min(programs // (B * H), total // 8))
  chunks = -(-total // slices)
  c0, c1, c2 = dataclasses.astuple(kernel.coefficients)
  return Call(
    B,
    T,
    H,
    P,
    c0 / c2,
    c1 / c2,
    kernel.eps / c2,
    slices=-(-total // chunks),
    chunks=chunks,
  )


def rolls() -> np.ndarray:
  """Π (F, 9 F): x Π holds the nine rolled copies of x."""
  table = np.zeros((F, CYCLIC * F), np.float32)
  for r in range(CYCLIC):
    for i in range(F):
      table[(i + r) % F, r * F + i] = 1
  return table


def weight(r: int) -> float:
  """Of the cyclic block r in (q·k)²."""
  return 1.0 if r in (0, CYCLIC - 1) else 2.0


def smem(*shape: int, dtype=bf16, swizzle=SWIZZLE_32):
  return plgpu.SMEM(shape, dtype, transforms=swizzle)


def zeros(shape, dtype=f32):
  return plgpu.layout_cast(jnp.zeros(shape, dtype), LAYOUT)


def iota(shape, axis: int):
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)


def block(r: int) -> slice:
  return slice(r * F, (r + 1) * F)


def columns(x_C, width: int):
  """A value a row, over `width` columns."""
  return lax.broadcast_in_dim(x_C, (C, width), [0])


def mma(*pairs, shape):
  """Σ A B on the tensor core, in float32."""
  return mmas((shape, *pairs))[0]


def mmas(*products):
  """Σ A B for each (shape, (A, B), …), all under way at once."""

  def run(*accs):
    for acc, (_, *pairs) in zip(accs, products, strict=True):
      for a, b in pairs:
        plgpu.wgmma(acc, a, b)
    return tuple(acc[...] for acc in accs)

  return pl.run_scoped(run, *(plgpu.ACC(x[0], f32) for x in products))


def add_mma(acc, *pairs):
  """acc + Σ A B."""

  def run(ref):
    for a, b in pairs:
      plgpu.wgmma(ref, a, b)

  return pl.run_state(run)(plgpu.ACC.init(acc))


def two_columns(first, second=None):
  """(C, F) bf16 with one or two leading columns and zeros behind them."""
  second = first if second is None else second
  column = iota((C, F), 1)
  value = jnp.where(column == 0, first, jnp.where(column == 1, second, 0.0))
  return value.astype(bf16)


def split(value: float) -> tuple[float, float]:
  """(hi, lo): bf16 numbers whose sum is the value to 16 bits."""
  half = lambda x: float(np.asarray(x, bf16))
  return half(value), half(value - half(value))


def polynomial(a, call: Call):
  """sim' of q·k."""
  sim = a * a
  if call.c1:
    sim = sim + call.c1 * a
  return sim + call.c0 if call.c0 else sim


def derivative(a, call: Call):
  """d sim' / d (q·k)."""
  return 2.0 * a + call.c1 if call.c1 else 2.0 * a


def valid(call: Call, chunk):
  """1.0 for the tokens of a chunk that exist, (C, F)."""
  return jnp.where(chunk * C + iota((C, F), 0) < call.T, 1.0, 0.0)


def seen(start: int, *, queries: int):
  """Whether a query sees a key of its chunk, for TILE columns of the chunk.

  `queries` is the axis of the queries.
  """
  row, column = iota((C, TILE), 0), iota((C, TILE), 1) + start
  return row >= column if queries == 0 else column >= row


def query_features(x_CF, rolled, blocks, call: Call) -> list:
  """Weighted feature blocks of queries, bf16; rolled (C, 16 a block)."""
  weighted = {1.0: x_CF, 2.0: x_CF + x_CF}
  features = []
  for i, r in enumerate(blocks):
    if r < CYCLIC:
      features.append(weighted[weight(r)] * rolled[:, block(i)].astype(bf16))
    elif r == CYCLIC and call.c1:
      features.append((x_CF.astype(f32) * call.c1).astype(bf16))
    else:
      features.append(two_columns(*split(call.c0)))
  return features


def key_features(x_CF, rolled, blocks, call: Call, exists=None) -> list:
  """Feature blocks of keys, bf16; rolled (C, 16 a block)."""
  features = []
  for i, r in enumerate(blocks):
    if r < CYCLIC:
      features.append(x_CF * rolled[:, block(i)].astype(bf16))
    elif r == CYCLIC and call.c1:
      features.append(x_CF)
    else:
      features.append(two_columns(1.0 if exists is None else exists))
  return features


def roll(x_s, rolls_s, blocks: range):
  """x Π of the cyclic ones of these blocks, (C, 16 a block) float32."""
  rolls = some(rolls_s, blocks)
  if rolls is None:
    return None
  return mma((x_s, rolls), shape=(C, rolls.shape[1]))


def roll_all(x_s, rolls_s):
  """x Π, (C, 9 F) bf16, which is exact."""
  return mma((x_s, rolls_s), shape=(C, CYCLIC * F)).astype(bf16)


def some(rolls_s, blocks: range):
  """Π of the cyclic ones of these blocks, (F, 16 a block), or None."""
  blocks = range(blocks.start, min(blocks.stop, CYCLIC))
  if not blocks:
    return None
  return rolls_s.at[:, pl.ds(blocks.start * F, len(blocks) * F)]


def store_split(ref, x_VF) -> None:
  """KK as two bf16 halves, ref (2, V, F)."""
  hi = x_VF.astype(bf16)
  ref[0] = hi
  ref[1] = (x_VF - hi.astype(f32)).astype(bf16)


def halves(kk_s, start: int) -> list:
  """The bf16 parts of 16 rows of KK; their sum is KK."""
  return [kk_s.at[i, pl.ds(start, F)] for i in (0, 1)]


def denominator(x_s, kk_s, call: Call) -> list:
  """The products KK q and c1' Σ k, of (C, F); q · their sum is the state's."""
  quadratic = ((C, F), *[(x_s, kk) for kk in halves(kk_s, 0)])
  if not call.c1:
    return [quadratic]
  ones = two_columns(*split(call.c1))
  return [quadratic, ((C, F), *[(ones, kk) for kk in halves(kk_s, F)])]


def store_keys(k_s, rolls_s, phi_s, wide_s, chunk, call: Call) -> None:
  """The features of the keys, and k̃ with its ones, for the update."""
  x = plgpu.load(k_s, layout=LAYOUT)
  exists = valid(call, chunk) if call.c0 or call.c1 else None
  for blocks in call.groups:
    rolled = roll(k_s, rolls_s, blocks)
    features = key_features(x, rolled, blocks, call, exists)
    store_blocks(phi_s, blocks, features)
  wide_s[:, pl.ds(0, F)] = x
  if exists is not None:
    wide_s[:, pl.ds(F, F)] = two_columns(exists)


def store_blocks(phi_s, blocks: range, features: list) -> None:
  for r, x in zip(blocks, features, strict=True):
    phi_s[:, pl.ds(r * F, F)] = x


def compiler_params():
  return plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,
  )


# Between the states of spec.py and those of the kernels.


def to_kernel(state: State, call: Call, *, cotangent: bool = False):
  """KVᵀ (B, H, V, E) and KK (B, H, V, F) of a state, or of its cotangent.

  A state has the constant feature and the sum of k twice, for the high and the
  low half of a weight; a cotangent once.
  """
  kv, kk, E = state.kv_BHEP, state.kk_BHGG, CYCLIC * F
  parts = [kv[:, :, :E]]
  if call.c1:
    parts.append(kv[:, :, E : E + F])
    E += F
  if call.c0:
    constant = [kv[:, :, E:]] * (1 if cotangent else 2)
    parts += constant
  kv = jnp.concatenate(parts, axis=2).swapaxes(2, 3)
  kv = _grow(kv, V, call.E)
  rows = [(kk[:, :, :F, :F] + kk[:, :, :F, :F].swapaxes(2, 3)) / 2]
  if kk.shape[-1] > F:
    line = kk[:, :, F:, :F] + kk[:, :, :F, F:].swapaxes(2, 3)
    rows += [line] if cotangent else [line / 2, line / 2]
  return kv, _grow(jnp.concatenate(rows, axis=2), V, F)


def from_kernel(
  kv, kk, count_BH, P: int, call: Call, *, cotangent: bool = False
) -> State:
  """The inverse of `to_kernel`; the count is KK's corner."""
  E = (CYCLIC + bool(call.c1)) * F
  kv = kv[:, :, :P].swapaxes(2, 3)
  parts, square = [kv[:, :, :E]], kk[:, :, :F]
  if call.c0:
    constant = kv[:, :, E : E + 1]
    if cotangent:
      constant += kv[:, :, E + 1 : E + 2]
    parts.append(constant)
  kv = jnp.concatenate(parts, axis=2)
  if not (call.c0 or call.c1):
    return State(kv, square)
  line = kk[:, :, F : F + 1] / (2 if cotangent else 1)
  top = jnp.concatenate([square, line.swapaxes(2, 3)], axis=3)
  bottom = jnp.concatenate([line, count_BH[:, :, None, None]], axis=3)
  return State(kv, jnp.concatenate([top, bottom], axis=2))


def _grow(x, rows: int, cols: int):
  pad = ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, cols - x.shape[3]))
  return jnp.pad(x, pad)
