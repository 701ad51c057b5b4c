"""A mixer of your own: a moving average with a learned decay per channel."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from rebased_jax import Mixer, MixerConfig


@dataclasses.dataclass(frozen=True)
class MovingAverageConfig(MixerConfig):
  """Configuration of `MovingAverage`."""

  #: Decay per token that every channel starts with.
  decay: float = 0.9

  def __post_init__(self):
    if not 0 < self.decay < 1:
      raise ValueError(f"decay={self.decay!r}: expected a number in (0, 1)")

  def make(self, site, *, rngs):
    return MovingAverage(site.width, self, dtype=site.dtype, rngs=rngs)


class MovingAverage(Mixer):
  """h_t = a h_{t−1} + (1 − a) x_t, y_t = W h_t."""

  config_type = MovingAverageConfig
  no_segment_ids = "it averages whole rows"

  def __init__(
    self, width, config, *, dtype: jax.typing.DTypeLike = "float32", rngs
  ):
    super().__init__(width, config, dtype=dtype)
    logit = jnp.log(config.decay / (1 - config.decay))
    self.decay_logit = nnx.Param(jnp.full(width, logit, jnp.float32))
    self.project = nnx.Linear(
      width, width, use_bias=False, dtype=self.dtype, rngs=rngs
    )

  def init_state(self, batch):
    return jnp.zeros((batch, self.width), jnp.float32)

  def _prefill(self, x_BTD, state, *, segment_ids, axes):
    decay_D = jax.nn.sigmoid(self.decay_logit[...])

    def token(h_BD, x_BD):
      h_BD = decay_D * h_BD + (1 - decay_D) * x_BD
      return h_BD, h_BD

    x_TBD = jnp.moveaxis(x_BTD.astype(jnp.float32), 1, 0)
    state, h_TBD = jax.lax.scan(token, state, x_TBD)
    return self.project(jnp.moveaxis(h_TBD, 0, 1)), state
