"""The config of the language model, and the blocks that it makes."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from rebased_jax.config_checks import (
  DType,
  Precision,
  check_one_of,
  check_positive,
  keep_dtype_name,
  keep_precision_name,
  make_scalars_plain,
)
from rebased_jax.config_help import with_help
from rebased_jax.mixer_configs import MixerConfig, Site

# Imported where they are used: a config is plain Python.
if TYPE_CHECKING:
  from flax import nnx

  from rebased_jax.blocks import Block, Pair

#: What the backward pass computes again; see `ModelConfig.remat`.
Remat = Literal["none", "dots", "full"]
# A wrong number would otherwise build pairs for hours.
_MOST_PAIRS = 10_000


@with_help
@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Choices of an `LM`."""

  #: Mixer of the first block of each pair.
  first: MixerConfig
  #: Mixer of the second block of each pair.
  second: MixerConfig
  #: V, the size of the vocabulary.
  vocab_size: int
  #: D, the width of the residual stream.
  width: int
  #: Pairs of blocks, half the number of layers.
  pairs: int = 1
  #: Rows of the learned position table. None: no positions.
  positions: int | None = None
  #: Hidden width of the MLPs. None: no MLPs, and x ← x + LN(x) in their place.
  mlp_width: int | None = None
  #: Dropout of the embeddings in training.
  dropout: float = 0.0
  #: Compute dtype: "float32", "bfloat16", "float16" or "float64". Python code
  #: may give anything that jax takes for a dtype; the name is kept. The
  #: residual stream is float32, or float64 if this is float64.
  dtype: DType = "float32"
  #: Precision of float32 products, forward and backward: "default", "high" or
  #: "highest", as `jax.lax.Precision` has them. None: jax's setting,
  #: `jax_default_matmul_precision`, or else the device's default, which is TF32
  #: on a GPU and bfloat16 on a TPU. The operator's own float32 products and
  #: attention's scores have the highest precision always. Other dtypes have no
  #: choice.
  precision: Precision | None = None
  #: "pre-norm", or "mamba": x ← x + mixer(RMSNorm(x)), without an MLP.
  block: Literal["pre-norm", "mamba"] = "pre-norm"
  #: Whether one compiled pair is scanned over all pairs. None: yes, except on a
  #: GPU, where a scan copies all that the backward pass needs, twice.
  scan_layers: bool | None = None
  #: What the backward pass computes again instead of keeping it. "none":
  #: nothing. "dots": all but the outputs of projections. "full": everything
  #: inside a pair.
  remat: Remat = "none"
  #: Whether learned positions start from 0 at each document of a packed row, so
  #: that it has the logits that it has alone. False, as published: they run
  #: through the row.
  restart_positions: bool = False
  #: Dtype of the parameters, as `dtype`. Gradients and the optimiser's state
  #: have it too. "bfloat16" halves their memory, and loses updates that are
  #: smaller than 1/256 of a parameter.
  param_dtype: DType = "float32"

  def __post_init__(self) -> None:
    keep_dtype_name(self, "dtype")
    keep_dtype_name(self, "param_dtype")
    keep_precision_name(self, "precision")
    make_scalars_plain(self)
    for name in ("first", "second"):
      mixer = getattr(self, name)
      if not isinstance(mixer, MixerConfig):
        raise TypeError(
          f"ModelConfig.{name}={mixer!r}: expected the config of a mixer, such "
          "as ReBasedConfig(heads=4)"
        )
    check_positive(
      self, "vocab_size", "width", "pairs", "positions", "mlp_width"
    )
    if self.pairs > _MOST_PAIRS:
      raise ValueError(
        f"ModelConfig.pairs={self.pairs}: expected at most {_MOST_PAIRS}; each "
        "pair takes time before anything is computed"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"ModelConfig.dropout={self.dropout}: expected a number in [0, 1)"
      )
    check_one_of(self, "block", "pre-norm", "mamba")
    check_one_of(self, "remat", "none", "dots", "full")
    if self.restart_positions and self.positions is None:
      raise ValueError(
        "ModelConfig.restart_positions=True with positions=None: expected a "
        "table of positions; set positions to the tokens of the longest row"
      )
    if self.block == "mamba" and self.mlp_width is not None:
      raise ValueError(
        f"ModelConfig.mlp_width={self.mlp_width}: expected None with "
        "block='mamba', which has no MLP"
      )

  @property
  def layers(self) -> int:
    """Number of blocks."""
    return 2 * self.pairs

  @property
  def scans(self) -> bool:
    """Whether pairs are scanned over, on the device that calls run on."""
    if self.scan_layers is None:
      from pallas_kernels import devices

      return devices.platform() != "gpu"
    return self.scan_layers

  def make_block(
    self, mixer: MixerConfig, layer: int, *, rngs: "nnx.Rngs"
  ) -> "Block":
    """Return a block of this model around a mixer, with fresh parameters."""
    from rebased_jax.blocks import MambaBlock, PreNormBlock

    site = Site(
      self.width,
      layer,
      self.layers,
      self.dtype,
      self.positions,
      self.precision,
      self.param_dtype,
    )
    if self.block == "mamba":
      return MambaBlock(mixer, site, rngs=rngs)
    return PreNormBlock(mixer, site, mlp_width=self.mlp_width, rngs=rngs)

  def make_pair(self, index: int, *, rngs: "nnx.Rngs") -> "Pair":
    """Return a pair of blocks of this model, with fresh parameters."""
    from rebased_jax.blocks import Pair

    first = self.make_block(self.first, 2 * index, rngs=rngs)
    return Pair(first, self.make_block(self.second, 2 * index + 1, rngs=rngs))


def check_length(config: ModelConfig, length: int) -> None:
  """Check that the position table has room for a row of `length` tokens.

  Raises:
    ValueError: the row is longer than the position table.
  """
  if config.positions is not None and length > config.positions:
    raise ValueError(
      f"a row of {length} tokens: the position table has {config.positions} "
      "rows (ModelConfig.positions)"
    )
