"""Who sees whom within a chunk, in the TPU kernels."""

import dataclasses
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu.call import SUBLANES, Call
from pallas_kernels.polynomial.tpu.products import dot


@dataclasses.dataclass(frozen=True)
class Masks:
  """The masks of one chunk. None stands for a mask that is True everywhere.

  Attributes:
    seen_CC: [s, t]: s ≤ t, and both are of one document.
    valid_1C: the lane holds a token of the row.
    first_1C: the token is of the document of the state before the chunk.
    last_1C: the token is of the document of the state after the chunk.
    joined_11: the states before and after the chunk are of one document.
  """

  seen_CC: Array
  valid_1C: Array | None
  first_1C: Array | None
  last_1C: Array | None
  joined_11: Array | None


def make_masks(
  starts_ref: Any | None, lanes: Any, position: Any, call: Call
) -> Masks:
  """Make the masks of a chunk.

  Args:
    starts_ref: for each token of the block, the position of the first token of
      its document (1, block); None where each row is one document.
    lanes: the chunk's lanes in the block.
    position: the position in the row of the chunk's first token.
    call: the launch.
  """
  C = call.chunk

  def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

  seen = iota((C, C), 0) <= iota((C, C), 1)
  position_1C = position + iota((1, C), 1)
  valid = position_1C < call.T if call.has_tail else None
  if starts_ref is None:
    return Masks(seen, valid, None, None, None)
  start_1C = starts_ref[:, lanes]
  seen &= iota((C, C), 0) + position >= start_1C
  # At position 0 the state before belongs to token 0's document.
  before = jnp.maximum(position, 1)
  last_start_11 = start_1C[:, C - 1 :]
  return Masks(
    seen,
    valid,
    first_1C=start_1C < before,
    last_1C=position_1C >= last_start_11,
    joined_11=last_start_11 < before,
  )


def zero_outside(mask: Array | None, x: Array) -> Array:
  """Return x with 0 where the mask is False; None masks nothing."""
  return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def sum_over_seen(
  x_RC: Array,
  w_CC: Array,
  masks: Masks,
  call: Call,
  *,
  over_queries: bool = False,
) -> Array:
  """Compute Σ_s x_s w_st, or Σ_t x_t w_st with `over_queries`.

  Where rows hold several documents, an Inf or NaN in x makes NaN of the tokens
  that see it, and reaches no other.

  Args:
    x_RC: R numbers a token.
    w_CC: weights [s, t], 0 where query t does not see key s.
    masks: the chunk's masks.
    call: the launch.
    over_queries: whether the sum is over t instead of s.
  """
  over = (1, 1) if over_queries else (1, 0)
  if not call.documents:
    return dot(x_RC, w_CC, over, call)
  x_RC = x_RC.astype(jnp.float32)
  finite_RC = jnp.where(jnp.abs(x_RC) < jnp.inf, 1.0, 0.0)
  finite_1C = jnp.min(finite_RC, axis=0, keepdims=True) > 0
  y_RC = dot(jnp.where(finite_1C, x_RC, 0.0), w_CC, over, call)
  # How many non-finite tokens each token sees; a product needs a whole tile.
  spoilt_8C = jnp.broadcast_to(
    jnp.where(finite_1C, 0.0, 1.0), (SUBLANES, call.chunk)
  )
  seen_CC = jnp.where(masks.seen_CC, 1.0, 0.0)
  count_1C = dot(spoilt_8C, seen_CC, over, call)[:1]
  return jnp.where(count_1C > 0, jnp.nan, y_RC)
