"""Slices of time that different programs of a kernel walk at once.

A recurrence has one program for each row and group of channels. Where these are
too few for the device, time is cut into slices of whole chunks.
"""

from typing import NamedTuple

from jax import Array
import jax.numpy as jnp

# Pallas makes the rows the third axis of a CUDA grid, which cannot be longer.
MOST_ROWS = 65_535


class Cut(NamedTuple):
  """The numbers that decide where a kernel cuts time, and how finely.

  A cut costs another pass over the inputs. It is made where rows and groups of
  channels alone leave multiprocessors without work.
  """

  enough: int  # programs that a launch may have without a cut
  programs: int  # programs that a launch has at most with one
  least: int  # the fewest chunks of a slice


def cut_time(chunks: int, walks: int, cut: Cut) -> tuple[int, int]:
  """Return (slices, chunks of a slice); the last slice may have fewer.

  Args:
    chunks: of a row, which slices have whole numbers of.
    walks: programs that each slice has, one a row and group of channels.
    cut: where and how finely time is cut.
  """
  slices = 1
  if walks < cut.enough:
    slices = max(1, min(cut.programs // walks, chunks // cut.least))
  each = -(-chunks // slices)
  return -(-chunks // each), each


def slices_with_starts(starts_BT: Array, slices: int, tokens: int) -> Array:
  """Return int32 (B, slices): 1 where a document starts in the slice, else 0.

  Args:
    starts_BT: whether each token starts a document; T ≤ slices · tokens.
    slices: of a row.
    tokens: of a slice.
  """
  B, T = starts_BT.shape
  padded = jnp.pad(starts_BT, ((0, 0), (0, slices * tokens - T)))
  is_in = (padded != 0).reshape(B, slices, tokens).any(axis=-1)
  return is_in.astype(jnp.int32)
