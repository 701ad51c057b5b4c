"""ReBased (arXiv 2402.10644): linear attention with a learnable kernel.

    sim(q, k) = (φ_Q(q)·φ_K(k))² / F,   φ(x) = γ ∘ norm(x) + β
    norm(x)   = (x − mean x) / sqrt(var x + 1e-5)

with γ, β of their own for queries and keys. norm, γ and β act on all heads'
features together, before the split into heads, as in the official code;
`norm_scope="head"` normalises each head alone. The ablations of the paper's
Table 1 are the switches:

                   normalize  use_gamma  use_beta
    x²                 no         no         no
    norm(x)²           yes        no         no
    (γx)²              no         yes        no
    (γx + β)²          no         yes        yes
    ReBased            yes        yes        yes
"""

import dataclasses
from typing import Literal

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import REBASED
from pallas_kernels.layer_norm.xla import layer_norm
from pallas_kernels.numerics import broadcast_parameter, sum_dtype
from rebased_jax.mixers import base, polynomial

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class ReBasedConfig(base.MixerConfig):
  """The defaults are the paper's, but for eps: there 1e-12."""

  heads: int = 12  # H
  features: int = 16  # F, of queries and keys, a head
  value_features: int | None = None  # P; None: floor(width / heads)
  use_gamma: bool = True
  use_beta: bool = True
  normalize: bool = True
  norm_scope: Literal["joint", "head"] = "joint"
  eps: float = 1e-6  # added to Σ sim
  implementation: str | None = None  # of the kernel; None: the best

  def __post_init__(self):
    polynomial.check_config(self)
    if self.norm_scope not in ("joint", "head"):
      raise ValueError(
        f"ReBasedConfig.norm_scope={self.norm_scope!r}: expected 'joint' or "
        "'head'"
      )

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "ReBased":
    return ReBased(site.width, self, dtype=site.dtype, rngs=rngs)


class KernelAffine(nnx.Module):
  """φ(x) = γ ∘ norm(x) + β on (…, H·F), in float32."""

  def __init__(self, config: ReBasedConfig):
    ones = jnp.ones(config.heads * config.features, jnp.float32)
    self.gamma = nnx.Param(ones) if config.use_gamma else None
    self.beta = nnx.Param(0 * ones) if config.use_beta else None
    self.normalize = config.normalize
    self.groups = 1 if config.norm_scope == "joint" else config.heads

  def __call__(self, x: Array) -> Array:
    values = lambda p, value: (
      jnp.full(x.shape[-1:], value) if p is None else p[...]
    )
    gamma, beta = values(self.gamma, 1.0), values(self.beta, 0.0)
    if self.normalize:
      split = lambda y: y.reshape(*y.shape[:-1], self.groups, -1)
      y = layer_norm(*map(split, (x, gamma, beta)), NORM_EPS, x.dtype)
      return y.reshape(x.shape)
    wide = x.astype(sum_dtype(x.dtype))
    return (
      wide * broadcast_parameter(gamma, wide) + broadcast_parameter(beta, wide)
    ).astype(x.dtype)


class ReBased(polynomial.PolynomialMixer):
  """The mixer of the paper.

  Parameters: project/{q,k,v,o}/kernel, {query,key}_affine/{gamma,beta}.
  """

  def __init__(
    self,
    width: int,
    config: ReBasedConfig,
    *,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    base.check_made(width, config, ReBasedConfig)
    shape = polynomial.check_sizes(config, width)
    self.project = polynomial.Projections(shape, width, dtype=dtype, rngs=rngs)
    self.query_affine = KernelAffine(config)
    self.key_affine = KernelAffine(config)
    self.coefficients = REBASED
    self.eps = config.eps
    self.width, self.dtype = width, base.computation(dtype)
    self.implementation = config.implementation

  def query(self, x_D: Array) -> Array:
    q = self.query_affine(self.project.q(x_D))
    return polynomial.split_heads(q, self.project.shape.heads)

  def key(self, x_D: Array) -> Array:
    k = self.key_affine(self.project.k(x_D))
    return polynomial.split_heads(k, self.project.shape.heads)
