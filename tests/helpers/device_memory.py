"""Free memory of a GPU, filled with NaN.

A kernel that reads what nobody wrote, or does not write all of its results,
then shows NaN instead of what an earlier test left there.
"""

import jax
import jax.numpy as jnp

_PIECE = 1 << 28  # bytes of one array


def fill_free_memory_with_nan(most: int) -> None:
  """Fill `most` bytes with NaN, or half of the free memory; free them again."""
  stats = jax.devices()[0].memory_stats()
  free = stats["bytes_limit"] - stats["bytes_in_use"]
  pieces = [
    jnp.full((_PIECE // 4,), jnp.nan, jnp.float32)
    for _ in range(min(most, free // 2) // _PIECE)
  ]
  jax.block_until_ready(pieces)
  for piece in pieces:
    piece.delete()
