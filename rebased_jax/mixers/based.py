"""Based (arXiv 2402.18668): linear attention with exp's Taylor expansion.

sim(q, k) = 1 + s + s²/2,   s = q·k / √F
"""

import dataclasses

from flax import nnx
from jax import Array

from pallas_kernels import BASED
from rebased_jax.mixers import base, polynomial


@dataclasses.dataclass(frozen=True)
class BasedConfig(base.MixerConfig):
  """The defaults are those of the ReBased paper, but for eps: there 1e-12."""

  heads: int = 12  # H
  features: int = 16  # F, of queries and keys, a head
  value_features: int | None = None  # P; None: floor(width / heads)
  eps: float = 1e-6  # added to Σ sim
  implementation: str | None = None  # of the kernel; None: the best

  def __post_init__(self):
    polynomial.check_config(self)

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "Based":
    return Based(site.width, self, dtype=site.dtype, rngs=rngs)


class Based(polynomial.PolynomialMixer):
  """The mixer of Based. Parameters: project/{q,k,v,o}/kernel."""

  def __init__(
    self,
    width: int,
    config: BasedConfig,
    *,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    base.check_made(width, config, BasedConfig)
    shape = polynomial.check_sizes(config, width)
    self.project = polynomial.Projections(shape, width, dtype=dtype, rngs=rngs)
    self.coefficients = BASED
    self.eps = config.eps
    self.width, self.dtype = width, base.computation(dtype)
    self.implementation = config.implementation

  def query(self, x_D: Array) -> Array:
    return polynomial.split_heads(self.project.q(x_D), self.project.shape.heads)

  def key(self, x_D: Array) -> Array:
    return polynomial.split_heads(self.project.k(x_D), self.project.shape.heads)
