"""Based (arXiv 2402.18668): linear attention with exp's Taylor expansion.

    sim(q, k) = 1 + s + s²/2,   s = q·k / √F

Queries, keys and values are plain projections of the tokens; `polynomial.py`
has the rest of the mixer.
"""

from jax import Array

from pallas_kernels import BASED
from rebased_jax.mixer_configs import BasedConfig as BasedConfig
from rebased_jax.mixers.polynomial import PolynomialMixer


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
