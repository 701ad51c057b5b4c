"""Tokens and positions, and the sizes that rows are padded to."""

from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import check_integers


def to_int32(x: Array) -> Array:
  """Return integers of any dtype as int32.

  A narrow dtype does not hold the size of a table, so that `x < size` would
  wrap in it. A value outside int32 becomes the nearest value inside, which no
  table has a row for.

  Args:
    x: integers of any shape. NumPy arrays are converted by NumPy: jax would
      first cut 64 bits to 32.
  """
  if x.dtype == jnp.int32:
    return x
  if x.dtype.itemsize >= 4:
    numpy = np if isinstance(x, np.ndarray) else jnp
    limits = jnp.iinfo(jnp.int32)
    x = numpy.minimum(x, limits.max)
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
      x = numpy.maximum(x, limits.min)
  return x.astype(jnp.int32)


def integer_rows(name: str, x: Array) -> Array:
  """Return integers (B, T) as int32.

  Args:
    name: of the argument, for the message.
    x: the argument.

  Raises:
    ValueError: x is not an array of integers (B, T), both > 0.
  """
  check_integers(name, x)
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(f"{name} has shape {x.shape}: expected (B, T), both > 0")
  return to_int32(x)


def check_vocabulary(name: str, tokens_T: np.ndarray, size: int) -> None:
  """Check that the tokens of a text are of the vocabulary.

  Args:
    name: the text's name, for the message.
    tokens_T: integers of any dtype.
    size: V, the size of the vocabulary.

  Raises:
    ValueError: a token is not in [0, V). The message names its place.
  """
  wrong = np.flatnonzero((tokens_T < 0) | (tokens_T >= size))
  if wrong.size:
    raise ValueError(
      f"{name}[{wrong[0]}] is the token {tokens_T[wrong[0]]}: expected one of "
      f"the model's vocabulary, 0 to {size - 1}"
    )


def power_of_two(least: int) -> int:
  """Return the smallest power of two that is at least `least`."""
  return 1 << (least - 1).bit_length()
