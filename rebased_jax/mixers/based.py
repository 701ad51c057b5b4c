"""Based (arXiv 2402.18668): linear attention with exp's Taylor expansion.

    sim(q, k) = 1 + s + s²/2,   s = q·k / √F

Queries, keys and values are plain projections of the tokens; `polynomial.py`
has the rest of the mixer.
"""

import dataclasses

from flax import nnx
from jax import Array

from pallas_kernels import BASED
from rebased_jax.mixers.base import Site
from rebased_jax.mixers.polynomial import PolynomialConfig, PolynomialMixer


@dataclasses.dataclass(frozen=True)
class BasedConfig(PolynomialConfig):
  """Choices of Based. All defaults but eps are those of the ReBased paper."""

  def make(self, site: Site, *, rngs: nnx.Rngs) -> "Based":
    """Return a Based layer for a place in a model."""
    return Based(
      site.width, self, dtype=site.dtype, precision=site.precision, rngs=rngs
    )


class Based(PolynomialMixer):
  """The mixer of Based. Parameters: project/{q,k,v,o}/kernel."""

  config_type = BasedConfig
  coefficients = BASED

  def query(self, x_D: Array) -> Array:
    """Return q = x W_Q, (…, H, F), of tokens (…, D)."""
    return self.split_heads(self.project.q(x_D))

  def key(self, x_D: Array) -> Array:
    """Return k = x W_K, (…, H, F), of tokens (…, D)."""
    return self.split_heads(self.project.k(x_D))
