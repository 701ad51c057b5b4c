"""Random numbers by hashing: splitmix64, vectorised over arrays.

A random number is a hash of what it is for, such as (seed, step, row). Any one
can be computed alone, on any host, without the numbers before it.

Source: splitmix64 of Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators" (OOPSLA 2014), in the form of Vigna's reference code.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def hash64(*keys: int | np.ndarray) -> np.ndarray:
  """Hash each tuple of integers to 64 bits, by chained splitmix64.

  Args:
    *keys: integers in [0, 2**64), or integer arrays that broadcast together.

  Returns:
    uint64 hashes of the broadcast shape, or of shape (1,) if every key is a
    plain integer.
  """
  state = np.zeros(1, np.uint64)
  for key in keys:
    state = state + np.asarray(key).astype(np.uint64) + _GOLDEN
    _finalize(state)
  return state


def hash64_slots(state_B: np.ndarray, slots: int) -> np.ndarray:
  """Return the first outputs of the splitmix64 generator of each state.

  Args:
    state_B: start states, uint64 (B,).
    slots: the number S of outputs for each state.

  Returns:
    uint64 (B, S).
  """
  hash_BS = state_B[:, None] + _GOLDEN * np.arange(1, slots + 1, dtype="uint64")
  _finalize(hash_BS)
  return hash_BS


def _finalize(x: np.ndarray) -> None:
  """Apply splitmix64's finalizer in place."""
  scratch = np.empty_like(x)
  for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, None)):
    np.right_shift(x, np.uint64(shift), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    if factor is not None:
      np.multiply(x, factor, out=x)
