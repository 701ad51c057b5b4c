"""Blocks of the language model, and what configures them.

    x ← x + mixer(LN(x));   x ← x + mlp(LN(x))

Without an MLP the second line is x ← x + LN(x), as in the paper's MQAR models.
Its Mamba model has blocks of one line, x ← x + mixer(RMSNorm(x)).
"""

import abc
from collections.abc import Callable
import dataclasses
from typing import Literal

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, devices
from pallas_kernels.layer_norm.xla import Stream
from pallas_kernels.numerics import sum_dtype
from rebased_jax.layer_norm import LayerNorm
from rebased_jax.mixers import base
from rebased_jax.mlp import MLP

NORM_EPS = 1e-5  # PyTorch's default
Place = Callable[[Array], Array]
same: Place = lambda x: x


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What an `LM` is."""

  first: base.MixerConfig  # of the first block of each pair
  second: base.MixerConfig  # of the second
  vocab_size: int  # V
  width: int  # D
  pairs: int = 1  # half the number of layers
  positions: int | None = None  # rows of the learned table; None: no positions
  mlp_width: int | None = None  # hidden width of the MLPs; None: no MLP
  dropout: float = 0.0  # of the embeddings
  dtype: str = "float32"  # of the computation; parameters are float32
  block: Literal["pre-norm", "mamba"] = "pre-norm"  # around each mixer
  # One compiled pair for all; False: each its own; None: that on a GPU alone,
  # where a scan copies all that the backward needs, twice.
  scan_layers: bool | None = None
  remat: Literal["none", "dots", "full"] = "none"  # what the backward repeats

  def __post_init__(self):
    base.positive(
      self, "vocab_size", "width", "pairs", "positions", "mlp_width"
    )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"ModelConfig.dropout={self.dropout}: expected a number in [0, 1)"
      )
    base.one_of(self, "dtype", *base.DTYPES)
    base.one_of(self, "block", "pre-norm", "mamba")
    base.one_of(self, "remat", "none", "dots", "full")
    if self.block == "mamba" and self.mlp_width is not None:
      raise ValueError(
        f"ModelConfig.mlp_width={self.mlp_width}: expected None with "
        "block='mamba', which has no MLP"
      )

  @property
  def layers(self) -> int:
    return 2 * self.pairs

  @property
  def scans(self) -> bool:
    """Whether layers are scanned over, on the device that calls run on."""
    if self.scan_layers is None:
      return devices.platform() != "gpu"
    return self.scan_layers


class Block(nnx.Module):
  """Abstract: a norm, a mixer, and what follows it.

  The stream is handed on in parts, which the next norm sums. A subclass sets
  norm1 and mixer, and says how it begins and ends.
  """

  norm1: nnx.Module
  mixer: base.Mixer

  @abc.abstractmethod
  def normed(self, stream: Stream, axes=None) -> tuple[Array, Array]:
    """The stream whole, and its norm1."""

  @abc.abstractmethod
  def _rest(self, x: Array, y: Array, axes=None, place: Place = same) -> Stream:
    """The block's stream, of the one before it and its mixer's output.

    `place` holds an activation to its place on the mesh.
    """

  def __call__(
    self,
    stream: Stream,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Stream:
    x_BTD, n_BTD = self.normed(stream, axes)
    y_BTD = self.mixer(
      base.place(n_BTD, axes),
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )
    place = lambda x: base.place(x, axes, whole_rows=query_positions is None)
    if query_positions is not None and axes is not None:
      axes = dataclasses.replace(axes, time=None)
    x_BTD = base.take_positions(x_BTD, query_positions)
    return self._rest(x_BTD, place(y_BTD), axes, place)

  def prefill(self, stream, state, *, segment_ids=None, axes=None):
    x, n = self.normed(stream, axes)
    y, state = self.mixer.prefill(n, state, segment_ids=segment_ids, axes=axes)
    return self._rest(x, y, axes), state

  def step(self, stream, state):
    x, n = self.normed(stream)
    y, state = self.mixer.step(n, state)
    return self._rest(x, y), state


class PreNormBlock(Block):
  """x + mixer(LN(x)), then x + mlp(LN(x)), or x + LN(x) without an MLP."""

  def __init__(
    self,
    config: ModelConfig,
    mixer: base.MixerConfig,
    layer: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.norm1 = layer_norm(config, rngs)
    self.mixer = mixer.make(_site(config, layer), rngs=rngs)
    self.norm2 = layer_norm(config, rngs)
    self.mlp = _mlp(config, rngs) if config.mlp_width else None

  def normed(self, stream: Stream, axes=None) -> tuple[Array, Array]:
    return self.norm1.of_sum(stream, axes)

  def _rest(self, x: Array, y: Array, axes=None, place: Place = same) -> Stream:
    x, n = map(place, self.norm2.of_sum(Stream(x, y), axes))
    if self.mlp is None:
      return Stream(x, n)
    y, bias = self.mlp.parts(n, axes)
    return Stream(x, place(y), bias)


class MambaBlock(Block):
  """x + mixer(RMSNorm(x)), the norm with a weight alone."""

  def __init__(
    self,
    config: ModelConfig,
    mixer: base.MixerConfig,
    layer: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.norm1 = nnx.RMSNorm(
      config.width, epsilon=NORM_EPS, dtype=jnp.dtype(config.dtype), rngs=rngs
    )
    self.mixer = mixer.make(_site(config, layer), rngs=rngs)

  def normed(self, stream: Stream, axes=None) -> tuple[Array, Array]:
    x = stream.whole()
    return x, self.norm1(x)

  def _rest(self, x: Array, y: Array, axes=None, place: Place = same) -> Stream:
    return Stream(x, y)


class Pair(nnx.Module):
  """A block of the short convolution, then a block of the mixer."""

  def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs):
    block = MambaBlock if config.block == "mamba" else PreNormBlock
    self.first = block(config, config.first, 2 * index, rngs=rngs)
    self.second = block(config, config.second, 2 * index + 1, rngs=rngs)

  def __call__(
    self,
    stream: Stream,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Stream:
    stream = self.first(stream, segment_ids=segment_ids, axes=axes)
    return self.second(
      stream,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )

  def init_state(self, batch: int):
    return (
      self.first.mixer.init_state(batch),
      self.second.mixer.init_state(batch),
    )

  def prefill(self, x_BTD: Array, states, *, segment_ids=None, axes=None):
    stream, first = self.first.prefill(
      Stream(x_BTD), states[0], segment_ids=segment_ids, axes=axes
    )
    stream, second = self.second.prefill(
      stream, states[1], segment_ids=segment_ids, axes=axes
    )
    return stream.whole(), (first, second)

  def step(self, x_BD: Array, states):
    stream, first = self.first.step(Stream(x_BD), states[0])
    stream, second = self.second.step(stream, states[1])
    return stream.whole(), (first, second)


def remat(function: Callable, config: ModelConfig) -> Callable:
  """The function; its backward makes again what `config.remat` does not keep.

  "none" keeps all; "dots" the outputs of projections, so that norms, gates,
  GELUs and the mixer's operator run twice; "full" the inputs alone.
  """
  if config.remat == "none":
    return function
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(
    function,
    prevent_cse=not config.scans,  # a scan's body is apart already
    policy=dots if config.remat == "dots" else None,
  )


def logits(
  x_D: Array, embedding_VD: Array, dtype: jnp.dtype | None = None
) -> Array:
  """x's products with an embedding in its dtype, (…, V), summed in float32.

  Args:
    x_D: (…, D).
    embedding_VD: of the head.
    dtype: that the sums are rounded to; None: they stay in float32.
  """
  return jnp.einsum(
    "...d,vd->...v",
    x_D,
    embedding_VD.astype(x_D.dtype),
    preferred_element_type=sum_dtype(x_D.dtype) if dtype is None else dtype,
  )


def layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> LayerNorm:
  """LN with weight and bias, statistics in float32."""
  dtype = jnp.dtype(config.dtype)
  return LayerNorm(config.width, eps=NORM_EPS, dtype=dtype, rngs=rngs)


def _mlp(config: ModelConfig, rngs: nnx.Rngs) -> MLP:
  stddev = base.depth_scaled(config.layers)
  D, hidden = config.width, config.mlp_width
  return MLP(D, hidden, dtype=config.dtype, stddev=stddev, rngs=rngs)


def _site(config: ModelConfig, layer: int) -> base.Site:
  return base.Site(
    config.width, layer, config.layers, config.dtype, config.positions
  )
