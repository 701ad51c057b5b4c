"""A Hopper kernel of softmax cross-entropy with its gradient.

    top = max_v z_v,   total = Σ_v exp(z_v − top)
    ∂(w nll)/∂z_v = w (exp(z_v − top) / total − [v = target])

A warpgroup takes a row, twice: for top, total and the first v where z is top,
and for the gradient. The second time the row comes from the cache, where the
rows of all programs fit, so that 4 bytes a logit move to and from memory; XLA
reads the logits a second time, and its sum of exponentials is bound by its
instructions. Each of a thread's places in a row has its own top and total,
which are joined at the end.
"""

import functools

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.cross_entropy import WIDTH
from pallas_kernels.row_kernel import over_rows, row_kernel

# All at once on a Hopper's 132 multiprocessors; their rows, of 50,304 logits,
# fit in its cache of 50 MB.
PROGRAMS = 3 * 132
TOGETHER = 4  # parts of a row whose exponentials have one top
f32 = jnp.float32
_LAYOUT = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=8)
_LEAST = float(jnp.finfo(f32).min)


def losses(
  logits_RV: Array, targets_R: Array, weights_R: Array
) -> tuple[Array, Array, Array, Array]:
  """(∂(w nll)/∂z, in the dtype of z; top; total; where z is top first).

  Args:
    logits_RV: z, bfloat16 or float16; V a multiple of 8, WIDTH at least.
    targets_R: int32, in [0, V).
    weights_R: w, float32.
  """
  R, V = logits_RV.shape
  programs = min(R, PROGRAMS)

  def body(z, targets, weights, dz, top, total, best):
    def row(r, carry):
      state = _over_parts(V, functools.partial(_absorb, z.at[r]), _start())
      top_1, total_1, best_1 = _join(state)
      top[r], total[r], best[r] = top_1, total_1, best_1
      target, w = targets[r], weights[r]
      share = w / total_1

      def differentiate(parts, state):
        # All loads stand before the stores, which nothing passes.
        places = [pl.ds(begin, WIDTH) for begin, _ in parts]
        values = [_load(z.at[r, at]) for at in places]
        for (begin, _), at, z_W in zip(parts, places, values, strict=True):
          is_target = _index() == target - begin
          dz_W = share * jnp.exp(z_W - top_1) - jnp.where(is_target, w, 0.0)
          dz[r, at] = dz_W.astype(dz.dtype)
        return state

      _over_parts(V, differentiate, ())
      return carry

    over_rows(R, programs, row, None)

  rows = lambda dtype: jax.ShapeDtypeStruct((R,), dtype)
  out = jax.typeof(logits_RV), rows(f32), rows(f32), rows(jnp.int32)
  kernel = row_kernel(body, "cross_entropy", out, programs, approx_math=True)
  return kernel(logits_RV, targets_R, weights_R)


def _over_parts(V: int, function, state):
  """function(parts, state) over a row: parts (begin, from) of WIDTH logits.

  The last part may begin inside the one before it; only what is at `from` or
  behind it is new there.
  """
  whole, rest = divmod(V, WIDTH)
  many, few = divmod(whole, TOGETHER)

  def some(i, state):
    first = i * TOGETHER * WIDTH
    return function([(first + n * WIDTH, 0) for n in range(TOGETHER)], state)

  state = lax.fori_loop(0, many, some, state)
  last = [((many * TOGETHER + n) * WIDTH, 0) for n in range(few)]
  if rest:
    last.append((V - WIDTH, WIDTH - rest))
  return function(last, state) if last else state


def _start():
  fill = lambda value: plgpu.layout_cast(jnp.full(WIDTH, value, f32), _LAYOUT)
  index = plgpu.layout_cast(jnp.zeros(WIDTH, jnp.int32), _LAYOUT)
  return fill(_LEAST), fill(0.0), index


def _absorb(z, parts, state):
  """The tops, totals and places with some parts of the row more."""
  before_W, total_W, at_W = state
  top_W, values = before_W, []
  for begin, new in parts:
    z_W = _load(z.at[pl.ds(begin, WIDTH)])
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
  """Of a whole row: top, total and the first place of the top."""
  top_W, total_W, at_W = state
  top = jnp.max(top_W)
  total = jnp.sum(total_W * jnp.exp(top_W - top))
  # Of float32, which is exact up to 2²⁴: a warpgroup has no least of integers.
  back_W = jnp.where(top_W == top, -at_W.astype(f32), _LEAST)
  return top, total, (-jnp.max(back_W)).astype(jnp.int32)


def _index():
  """0 … WIDTH − 1."""
  return plgpu.broadcasted_iota(jnp.int32, (WIDTH,), 0, layout=_LAYOUT)


def _load(ref) -> Array:
  return plgpu.load(ref, layout=_LAYOUT).astype(f32)
