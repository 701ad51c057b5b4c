"""A Hopper kernel of softmax cross-entropy and its gradient.

    top = max_v z_v,   total = Σ_v exp(z_v − top)
    ∂(w nll)/∂z_v = w (exp(z_v − top) / total − [v = target])

A warpgroup reads a row of logits twice. The first pass finds top, total and the
first v with z_v = top; the second makes the gradient. The second pass reads the
row from the L2 cache, which holds the rows of all programs, so that 4 bytes a
logit move to and from memory. XLA reads the logits from memory twice, and its
sum of exponentials is bound by instructions. A row is read in blocks; each of
their columns has its own top and total, which are joined after the pass.
"""

import functools

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.row_kernel import over_rows, row_kernel

# So many programs run at once on a Hopper GPU's 132 multiprocessors. Their
# rows, of 50,304 logits each, fit in its cache of 50 MB.
PROGRAMS = 3 * 132
BLOCK = 1024  # logits that a warpgroup loads at a time
TOGETHER = 4  # blocks whose exponentials are taken against one top
f32 = jnp.float32
# 8 logits of 16 bits a thread: loads of 16 bytes.
_LAYOUT = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=8)
_LEAST = float(jnp.finfo(f32).min)


def losses(
  logits_RV: Array, targets_R: Array, weights_R: Array
) -> tuple[Array, Array, Array, Array]:
  """Return (dz, top, total, best) of each row.

  Args:
    logits_RV: z, bfloat16 or float16; V a multiple of 8, at least BLOCK.
    targets_R: int32, in [0, V).
    weights_R: w, float32.

  Returns:
    dz = ∂(w nll)/∂z (R, V) in z's dtype, top and total (R,) in float32, and the
    first index of the greatest logit, int32 (R,).
  """
  R, V = logits_RV.shape
  programs = min(R, PROGRAMS)

  def body(z, targets, weights, dz, top, total, best):
    def row(r, carry):
      state = _over_blocks(V, functools.partial(_absorb, z.at[r]), _start())
      top_1, total_1, best_1 = _join(state)
      top[r], total[r], best[r] = top_1, total_1, best_1
      target, w = targets[r], weights[r]
      share = w / total_1

      def differentiate(blocks, state):
        # All loads come first: the compiler moves no load across a store.
        places = [pl.ds(begin, BLOCK) for begin, _ in blocks]
        values = [_load(z.at[r, at]) for at in places]
        for (begin, _), at, z_W in zip(blocks, places, values, strict=True):
          is_target = _index() == target - begin
          dz_W = share * jnp.exp(z_W - top_1) - jnp.where(is_target, w, 0.0)
          dz[r, at] = dz_W.astype(dz.dtype)
        return state

      _over_blocks(V, differentiate, ())
      return carry

    over_rows(R, programs, row, None)

  rows = lambda dtype: jax.ShapeDtypeStruct((R,), dtype)
  out = jax.typeof(logits_RV), rows(f32), rows(f32), rows(jnp.int32)
  kernel = row_kernel(body, "cross_entropy", out, programs, approx_math=True)
  return kernel(logits_RV, targets_R, weights_R)


def _over_blocks(V: int, function, state):
  """Run state = function(blocks, state) over a row; return the last state.

  A block is (begin, new): BLOCK logits from `begin` on, of which those from
  index `new` on were in no earlier block. `new` is 0 except in the last block
  of a row that is no multiple of BLOCK, which overlaps the one before.
  """
  whole, rest = divmod(V, BLOCK)
  many, few = divmod(whole, TOGETHER)

  def some(i, state):
    first = i * TOGETHER * BLOCK
    return function([(first + n * BLOCK, 0) for n in range(TOGETHER)], state)

  state = lax.fori_loop(0, many, some, state)
  last = [((many * TOGETHER + n) * BLOCK, 0) for n in range(few)]
  if rest:
    last.append((V - BLOCK, BLOCK - rest))
  return function(last, state) if last else state


def _start():
  """Return each column's top, total and place of top before the first block."""
  fill = lambda value: plgpu.layout_cast(jnp.full(BLOCK, value, f32), _LAYOUT)
  index = plgpu.layout_cast(jnp.zeros(BLOCK, jnp.int32), _LAYOUT)
  return fill(_LEAST), fill(0.0), index


def _absorb(z, blocks, state):
  """Update each column's top, total and place of top with some blocks."""
  before_W, total_W, at_W = state
  top_W, values = before_W, []
  for begin, new in blocks:
    z_W = _load(z.at[pl.ds(begin, BLOCK)])
    if new:
      z_W = jnp.where(_index() >= new, z_W, -jnp.inf)
    greater = z_W > top_W
    at_W = jnp.where(greater, _index() + begin, at_W)
    top_W = jnp.maximum(top_W, z_W)
    values.append(z_W)
  total_W = total_W * jnp.exp(before_W - top_W)
  for z_W in values:
    total_W = total_W + jnp.exp(z_W - top_W)
  return top_W, total_W, at_W


def _join(state):
  """Return the whole row's top, total and first place of the top."""
  top_W, total_W, at_W = state
  top = jnp.max(top_W)
  total = jnp.sum(total_W * jnp.exp(top_W - top))
  # In float32, which is exact up to 2²⁴: Mosaic GPU has no minimum of integers.
  back_W = jnp.where(top_W == top, -at_W.astype(f32), _LEAST)
  return top, total, (-jnp.max(back_W)).astype(jnp.int32)


def _index():
  """Return 0 … BLOCK − 1 in the layout of a block."""
  return plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=_LAYOUT)


def _load(ref) -> Array:
  return plgpu.load(ref, layout=_LAYOUT).astype(f32)
