"""ReBased (arXiv 2402.10644): linear attention with a learnable kernel.

For tokens x_t of width D, and H heads of F features and P values each,

    q_t = φ_Q(x_t W_Q)        φ_Q(z) = γ_Q ∘ norm(z) + β_Q          (H, F)
    k_t = φ_K(x_t W_K)        φ_K(z) = γ_K ∘ norm(z) + β_K          (H, F)
    v_t = x_t W_V                                                   (H, P)

    sim(q, k) = (q·k)² / F                                    for each head
    o_t = Σ_s sim(q_t, k_s) v_s / (Σ_s sim(q_t, k_s) + eps)        over s ≤ t
    y_t = concat_heads(o_t) W_O

    norm(z) = (z − mean z) / √(var z + 1e-5)

where s runs over the tokens of t's own document. φ is a layer norm whose gain γ
and shift β are separate for queries and keys. They start at 1 and 0 and have
one entry for each of the H·F features. The mean and the variance are those of
all H·F features, before the split into heads, as in the authors' code. With
`norm_scope="head"` each head has its own. The projections have no bias.

The paper writes that each feature is squared, Σ_i q_i² k_i². The authors' code
squares the product instead, and so does this file. Its features are then all
products of two: (q·k)² = Σ_ij (q_i q_j)(k_i k_j). The code multiplies q·k by
F^(−1/2), which gives the factor 1/F. Without eps this factor would cancel in o.

The base class computes, with `query` and `key` from this file,

    y = concat_heads(polynomial_attention(query(x), key(x), x W_V)) W_O

with `REBASED` coefficients and the default scale F^(−1/2), which are this sim.
That takes time O(T): Σ_s sim v_s = feat(q_t) · Σ_s feat(k_s) v_sᵀ. The sum over
s on the right is the recurrent state.

Defaults: H = 12 and F = 16 as in the paper, P = ⌊D / H⌋, and eps = 1e-6, where
the paper's code has 1e-12, which is below the rounding of float32. The presets
of the paper's runs set 1e-12.

The ablations of the paper's Table 1 are switches. z stands for x W:

                   normalize  use_gamma  use_beta
    z²                 no         no         no
    norm(z)²           yes        no         no
    (γz)²              no         yes        no
    (γz + β)²          no         yes        yes
    ReBased            yes        yes        yes
"""

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import REBASED, layer_norm
from pallas_kernels.layer_norm import reference_layer_norm
from pallas_kernels.numerics import broadcast_parameter, sum_dtype
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.mixer_configs import ReBasedConfig as ReBasedConfig
from rebased_jax.mixers.polynomial import PolynomialMixer

NORM_EPS = 1e-5


class KernelAffine(nnx.Module):
  """φ(z) = γ ∘ norm(z) + β on features (…, H·F).

  It is computed in float32, or in float64 for float64 inputs. Parameters: gamma
  (H·F,) and beta (H·F,), where the config has them.
  """

  def __init__(self, config: ReBasedConfig, param_dtype: jnp.dtype):
    ones = jnp.ones(config.heads * config.features, param_dtype)
    self.gamma = nnx.Param(ones) if config.use_gamma else None
    self.beta = nnx.Param(0 * ones) if config.use_beta else None
    self.normalize = config.normalize
    # The derivative of `layer_norm` is its own, which jax can only reverse.
    self.any_derivative = config.implementation == "reference"
    self.groups = 1 if config.norm_scope == "joint" else config.heads

  def __call__(self, z: Array) -> Array:
    """Return φ(z) in the shape and dtype of z."""
    features = z.shape[-1:]
    gamma = jnp.full(features, 1.0) if self.gamma is None else self.gamma[...]
    beta = jnp.full(features, 0.0) if self.beta is None else self.beta[...]
    if not self.normalize:
      wide = z.astype(sum_dtype(z.dtype))
      y = wide * broadcast_parameter(gamma, wide)
      return (y + broadcast_parameter(beta, wide)).astype(z.dtype)
    norm = reference_layer_norm if self.any_derivative else layer_norm
    groups = map(self._split_groups, (z, gamma, beta))
    return norm(*groups, eps=NORM_EPS).reshape(z.shape)

  def _split_groups(self, z: Array) -> Array:
    """Return (…, groups, features that are normalised together)."""
    return z.reshape(*z.shape[:-1], self.groups, -1)


class ReBased(PolynomialMixer):
  """The mixer of the paper.

  With `implementation="reference"` it has derivatives of any kind and order.
  Otherwise it has first derivatives in reverse mode.

  Parameters: project/{q,k,v,o}/kernel, and {query,key}_affine/{gamma,beta} of
  shape (H·F,).
  """

  config_type = ReBasedConfig
  coefficients = REBASED

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: ReBasedConfig,
    *,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
    precision: Precision | None = None,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      width,
      config,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      rngs=rngs,
    )
    self.query_affine = KernelAffine(config, self.param_dtype)
    self.key_affine = KernelAffine(config, self.param_dtype)

  def query(self, x_D: Array) -> Array:
    """Return q = φ_Q(x W_Q), (…, H, F), of tokens (…, D)."""
    return self.split_heads(self.query_affine(self.project.q(x_D)))

  def key(self, x_D: Array) -> Array:
    """Return k = φ_K(x W_K), (…, H, F), of tokens (…, D)."""
    return self.split_heads(self.key_affine(self.project.k(x_D)))
