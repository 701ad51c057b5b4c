"""Draw the keys of many parameters."""

from flax import nnx
import jax
from jax import Array


def in_linear_time(rngs: nnx.Rngs) -> nnx.Rngs:
  """Return an `nnx.Rngs` that draws the keys of another one, and counts there.

  Where a model is traced, Flax compares the place of the count before and after
  each key. jax answers only after a walk through all that was traced before.
  So the time of Flax's own streams grows with the square of the keys.

  Args:
    rngs: its keys are drawn, and its counts grow.
  """
  result = nnx.Rngs()
  for name, stream in rngs.items():
    own = _Stream(stream.key[...], tag=stream.tag)
    own.key, own.count = stream.key, stream.count
    setattr(result, name, own)
  return result


class _Stream(nnx.RngStream):
  """A stream that sets its count without comparing places."""

  def __call__(self) -> Array:
    """Return the next key."""
    count = self.count.get_value()
    self.count.set_value(count + 1)
    return jax.random.fold_in(self.key.get_value(), count)
