"""The configs of all mixers, and the place in a model that one is made for.

Configs are plain Python: this module imports no jax, so that the command
answers a wrong option at once. `make` imports the mixer. The equations are in
the modules of `rebased_jax.mixers`.

To write a mixer of your own, put its config and the mixer into one file; see
`rebased_jax.mixers.base`.
"""

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from rebased_jax.config_checks import (
  DType,
  Precision,
  check_one_of,
  check_positive,
  compute_dtype,
  keep_dtype_name,
  keep_precision_name,
  make_scalars_plain,
)
from rebased_jax.config_help import with_help

# Needed for type checkers alone.
if TYPE_CHECKING:
  from flax import nnx

  from rebased_jax.mixers import (
    RWKV,
    Attention,
    BaseConv,
    Based,
    Hyena,
    Mamba,
    Mixer,
    ReBased,
  )


#: eps of Based and ReBased in the paper's own code.
OFFICIAL_EPS = 1e-12
#: Implementations of softmax attention.
ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")

#: Implementations of the recurrences of Mamba and RWKV.
RECURRENCES = ("xla", "gpu")


@with_help
@dataclasses.dataclass(frozen=True)
class Site:
  """The place in a model that a mixer is made for."""

  #: D, the width of the model.
  width: int
  #: Index of the layer, from 0.
  layer: int = 0
  #: Number of layers of the model.
  layers: int = 1
  #: Compute dtype: a name, or anything that jax takes for a dtype. The name is
  #: kept.
  dtype: DType = "float32"
  #: Tokens of the longest row that the model takes. None: no limit.
  length: int | None = None
  #: Precision of float32 products: "default", "high" or "highest", or a
  #: jax.lax.Precision, whose name is kept. None: jax's setting.
  precision: Precision | None = None
  #: Dtype of the parameters, as `dtype`.
  param_dtype: DType = "float32"
  #: Draws the initial kernels of all linear layers. None: each mixer's own
  #: distribution.
  kernel_init: "nnx.Initializer | None" = None

  def __post_init__(self) -> None:
    keep_dtype_name(self, "dtype")
    keep_dtype_name(self, "param_dtype")
    keep_precision_name(self, "precision")
    make_scalars_plain(self)
    check_positive(self, "width", "layers", "length")
    if not 0 <= self.layer < self.layers:
      raise ValueError(
        f"Site.layer={self.layer!r}: expected 0 to {self.layers - 1}"
      )
    compute_dtype(self.dtype)
    compute_dtype(self.param_dtype, "param_dtype")


@with_help
@dataclasses.dataclass(frozen=True)
class MixerConfig(abc.ABC):
  """Abstract: all choices of a mixer except its place in a model.

  A subclass with a `__post_init__` calls that of its base class first.
  """

  def __post_init__(self) -> None:
    make_scalars_plain(self)

  @abc.abstractmethod
  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "Mixer":
    """Return the mixer for a place in a model, with fresh parameters."""


@with_help
@dataclasses.dataclass(frozen=True)
class PolynomialConfig(MixerConfig):
  """Abstract: the choices that ReBased and Based share."""

  #: H, the number of heads.
  heads: int = 12
  #: F, the width of queries and keys a head.
  features: int = 16
  #: P, the width of values a head. None: floor(width / heads), with a warning
  #: where the heads do not divide the width. The paper's models, with their eps
  #: of 1e-12, have that floor and no warning.
  value_features: int | None = None
  #: Added to the denominator Σ sim. The paper's code has 1e-12.
  eps: float = 1e-6
  #: Implementation of the operator: "gpu", "tpu", "xla" or
  #: "reference". None: the fastest that can do the call.
  implementation: str | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, "heads", "features", "value_features")
    if not 0 <= self.eps < math.inf:
      raise ValueError(
        f"{type(self).__name__}.eps={self.eps!r}: expected a number ≥ 0"
      )
    if self.implementation is not None:
      from pallas_kernels import IMPLEMENTATIONS

      check_one_of(self, "implementation", None, *IMPLEMENTATIONS)

  def shape(self, width: int) -> "HeadShape":
    """Return the sizes of a head at model width `width`.

    Raises:
      ValueError: there are more heads than the width has channels.
    """
    P = self.value_features or width // self.heads
    if P == 0:
      raise ValueError(
        f"{type(self).__name__}.heads={self.heads} at width {width}: expected "
        "heads ≤ width, for a value width of floor(width / heads) ≥ 1"
      )
    return HeadShape(self.heads, self.features, P)


class HeadShape(NamedTuple):
  """The sizes of the heads of a polynomial mixer."""

  heads: int  # H
  features: int  # F
  value_features: int  # P


@with_help
@dataclasses.dataclass(frozen=True)
class ReBasedConfig(PolynomialConfig):
  """Choices of ReBased; the defaults are the paper's, except eps.

  `heads` is H, `features` F, `value_features` P.
  """

  #: Whether φ normalises its input.
  normalize: bool = True
  #: Whether φ has the scale γ. Without it γ is 1.
  use_gamma: bool = True
  #: Whether φ has the shift β. Without it β is 0.
  use_beta: bool = True
  #: Which features share a mean and a variance. "joint": those of all heads.
  #: "head": those of one head.
  norm_scope: Literal["joint", "head"] = "joint"

  def __post_init__(self) -> None:
    super().__post_init__()
    check_one_of(self, "norm_scope", "joint", "head")

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "ReBased":
    """Return a ReBased layer of the width and dtype that `site` names."""
    from rebased_jax.mixers.rebased import ReBased

    return ReBased(
      site.width,
      self,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )


@with_help
@dataclasses.dataclass(frozen=True)
class BasedConfig(PolynomialConfig):
  """Choices of Based. All defaults but eps are those of the ReBased paper."""

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "Based":
    """Return a Based layer for a place in a model."""
    from rebased_jax.mixers.based import Based

    return Based(
      site.width,
      self,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )


@with_help
@dataclasses.dataclass(frozen=True)
class BaseConvConfig(MixerConfig):
  """Choices of the short convolution; the defaults are the paper's."""

  #: K, the number of taps: y_t depends on the K tokens up to t.
  taps: int = 3

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, "taps")

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "BaseConv":
    """Return a short convolution for a place in a model."""
    from rebased_jax.mixers.conv import BaseConv

    return BaseConv(
      site.width,
      self,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )


@with_help
@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
  """Choices of softmax attention.

  The defaults are the ReBased paper's, but for `dropout`, which is 0.1 there.
  """

  #: H, the number of heads. The paper has one.
  heads: int = 1
  #: Whether q, k and v have a bias. The output always has one.
  use_bias: bool = True
  #: Whether queries and keys have rotary position embedding.
  rotary: bool = False
  #: Tokens that the cache of a state holds. None: the model's longest row.
  length: int | None = None
  #: "xla" or "cudnn", for calls with whole rows and no documents; states and
  #: documents always use "xla". None: "cudnn" where the GPU, the dtype and the
  #: width of a head allow it, else "xla". With "cudnn" an Inf or NaN may reach
  #: earlier tokens of its row.
  implementation: str | None = None
  #: Probability of dropping each attention weight a_ts in a call that gets a
  #: `dropout_key`. Such a call uses "xla": cuDNN's form has no dropout.
  dropout: float = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, "heads", "length")
    check_one_of(self, "implementation", None, *ATTENTION_IMPLEMENTATIONS)
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"AttentionConfig.dropout={self.dropout!r}: expected a number in [0, 1)"
      )
    if self.dropout > 0 and self.implementation == "cudnn":
      raise ValueError(
        f"AttentionConfig.dropout={self.dropout!r} with implementation='cudnn',"
        " which has no dropout: expected implementation=None or 'xla'"
      )

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "Attention":
    """Return softmax attention for a place in a model."""
    from rebased_jax.mixers.attention import Attention

    return Attention(
      site.width,
      self,
      layers=site.layers,
      length=site.length,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )


@with_help
@dataclasses.dataclass(frozen=True)
class HyenaConfig(MixerConfig):
  """Choices of Hyena; the defaults are zoology's."""

  #: L, the lags of the filter. None: the model's longest row.
  length: int | None = None
  #: K, the taps of the short convolution.
  taps: int = 3
  #: Hidden width of the network that computes the filter.
  filter_width: int = 64

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, "length", "taps", "filter_width")

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "Hyena":
    """Return Hyena for a place in a model."""
    from rebased_jax.mixers.hyena import Hyena

    return Hyena(
      site.width,
      self,
      layers=site.layers,
      length=site.length,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )


@with_help
@dataclasses.dataclass(frozen=True)
class MambaConfig(MixerConfig):
  """Choices of Mamba's mixer; the defaults are the ReBased paper's."""

  #: N, the states of a channel.
  state: int = 16
  #: K, the taps of the convolution.
  taps: int = 4
  #: I / D, the channels for each channel of the model.
  expand: int = 2
  #: "published" draws every projection from N(0, 0.02²), W_o from
  #: N(0, 0.02² / (2 · layers)), and sets b_Δ to 0. "intended" draws W_Δ
  #: uniformly within ±1/√R, and b_Δ such that softplus(b_Δ) is log-uniform in
  #: [0.001, 0.1].
  initialization: Literal["published", "intended"] = "published"
  #: What computes the scan: "gpu", kernels for Hopper GPUs, or "xla". None: the
  #: kernels on Hopper GPUs where they can, else "xla".
  implementation: str | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, "state", "taps", "expand")
    check_one_of(self, "initialization", "published", "intended")
    check_one_of(self, "implementation", None, *RECURRENCES)

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "Mamba":
    """Return Mamba's mixer for a place in a model."""
    from rebased_jax.mixers.mamba import Mamba

    return Mamba(
      site.width,
      self,
      layers=site.layers,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )


@with_help
@dataclasses.dataclass(frozen=True)
class RWKVConfig(MixerConfig):
  """Choices of RWKV; the defaults are those of the ReBased paper's code."""

  #: "published" draws all four projections from U(±1/√D), because the code's
  #: own initialisation never reaches them. "intended" sets those of k, r and
  #: the output to 0, as the code marks them, and draws v's from N(0, 0.02²).
  #: Then only the output projection has a gradient until it has moved.
  initialization: Literal["published", "intended"] = "published"
  #: "bfloat16" rounds the outputs of the recurrence, and its gradients of k,
  #: v, decay and first, as the code's float mode does; the recurrence itself is
  #: computed in float32. "float32" rounds nothing.
  wkv_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  #: What computes the recurrence: "gpu", kernels for Hopper GPUs, or "xla".
  #: None: the kernels on Hopper GPUs where they can, else "xla".
  implementation: str | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    check_one_of(self, "initialization", "published", "intended")
    check_one_of(self, "wkv_dtype", "bfloat16", "float32")
    check_one_of(self, "implementation", None, *RECURRENCES)

  def make(self, site: Site, *, rngs: "nnx.Rngs") -> "RWKV":
    """Return RWKV's time-mix for a place in a model."""
    from rebased_jax.mixers.rwkv import RWKV

    return RWKV(
      site.width,
      self,
      layer=site.layer,
      layers=site.layers,
      dtype=site.dtype,
      param_dtype=site.param_dtype,
      precision=site.precision,
      kernel_init=site.kernel_init,
      rngs=rngs,
    )
