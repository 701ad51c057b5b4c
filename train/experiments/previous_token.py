"""A fixed short convolution, which adds the previous token to each token.

    y_t = x_{t−1} + x_t,   x_{−1} = 0

It is the first layer of the paper's model in section 5.5: there the convolution
is held at the previous token, so that the second layer alone must recall. After
it the place of a value in a row holds its key too. It has no parameters.
"""

import dataclasses

from flax import nnx
from jax import Array
import jax.numpy as jnp

from rebased_jax import Mixer, MixerConfig, ShardAxes, Site


@dataclasses.dataclass(frozen=True)
class PreviousTokenConfig(MixerConfig):
  """The fixed convolution has no choices."""

  def make(self, site: Site, *, rngs: nnx.Rngs) -> "PreviousToken":
    """Return the fixed convolution for a place in a model."""
    del rngs  # it has no parameters
    return PreviousToken(site.width, self, dtype=site.dtype)


class PreviousToken(Mixer):
  """The fixed convolution; its state is the last token, (B, 1, D)."""

  config_type = PreviousTokenConfig
  no_segment_ids = "each row of the experiment is one document"

  def init_state(self, batch: int) -> Array:
    """Return a token of 0, (B, 1, D)."""
    return jnp.zeros((batch, 1, self.width), self.dtype)

  def _prefill(
    self,
    x_BTD: Array,
    state: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, Array]:
    del segment_ids, axes
    x_BTD = x_BTD.astype(self.dtype)
    before_BTD = jnp.concatenate([state, x_BTD[:, :-1]], axis=1)
    return x_BTD + before_BTD, x_BTD[:, -1:]
