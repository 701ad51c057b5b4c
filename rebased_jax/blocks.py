"""Blocks of the language model: norms, a mixer, and an MLP.

    x ← x + mixer(LN(x));   x ← x + MLP(LN(x))           PreNormBlock
    x ← x + mixer(LN(x));   x ← x + LN(x)                PreNormBlock, no MLP
    x ← x + mixer(RMSNorm(x))                            MambaBlock

The second line is that of the paper's MQAR models, the third that of its Mamba
model. x is the residual stream, (B, T, D) in float32.

A block returns the residual stream as a `Stream`, a sum whose parts are not yet
added: the layer norm of the next block adds them as it reads them. Two blocks
make a `Pair`. All pairs of a model have the same shapes, so that a model keeps
their parameters stacked. The functions at the end run stacked pairs.
"""

import abc
from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes
from rebased_jax.layer_norm import LayerNorm, Stream
from rebased_jax.linear import output_stddev
from rebased_jax.mixers.base import (
  Mixer,
  MixerConfig,
  MixerState,
  Site,
  take_positions,
)
from rebased_jax.mlp import MLP

NORM_EPS = 1e-5  # PyTorch's default

Place = Callable[[Array], Array]
Remat = Literal["none", "dots", "full"]


class Block(nnx.Module):
  """Abstract: a norm, a mixer, and what follows the mixer.

  A subclass sets `norm1` and `mixer`, and defines `sum_and_norm` and `_add`.
  """

  norm1: nnx.Module
  mixer: Mixer

  @abc.abstractmethod
  def sum_and_norm(
    self, stream: Stream, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Return the residual stream as one array x, and norm1(x)."""

  @abc.abstractmethod
  def _add(
    self, x: Array, y: Array, axes: ShardAxes | None, place: Place
  ) -> Stream:
    """Return the residual stream after the block.

    Args:
      x: the residual stream before the block.
      y: the mixer's output.
      axes: the mesh axes. None: no mesh.
      place: holds an activation to its place on the mesh.
    """

  def __call__(
    self,
    stream: Stream,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Stream:
    """Return the residual stream of whole rows, or at chosen positions.

    Args:
      stream: the residual stream before the block, (B, T, D).
      segment_ids: integers (B, T) of packed documents. None: one a row.
      axes: the mesh axes that split batch, heads and time. None: no mesh.
      query_positions: integers (B, M); the result is then (B, M, D).
    """
    x_BTD, n_BTD = self.sum_and_norm(stream, axes)
    y_BTD = self.mixer(
      place(n_BTD, axes),
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )
    place_rows = functools.partial(
      place, axes=axes, whole_rows=query_positions is None
    )
    if query_positions is not None and axes is not None:
      axes = dataclasses.replace(axes, time=None)
    x_BTD = take_positions(x_BTD, query_positions)
    return self._add(x_BTD, place_rows(y_BTD), axes, place_rows)

  def prefill(
    self,
    stream: Stream,
    state: MixerState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Stream, MixerState]:
    """Return the residual stream of T more tokens, and the mixer's state."""
    x_BTD, n_BTD = self.sum_and_norm(stream, axes)
    y_BTD, state = self.mixer.prefill(
      n_BTD, state, segment_ids=segment_ids, axes=axes
    )
    return self._add(x_BTD, y_BTD, axes, _leave), state

  def step(
    self, stream: Stream, state: MixerState
  ) -> tuple[Stream, MixerState]:
    """Return the residual stream of one more token, and the mixer's state."""
    x_BD, n_BD = self.sum_and_norm(stream)
    y_BD, state = self.mixer.step(n_BD, state)
    return self._add(x_BD, y_BD, None, _leave), state


class PreNormBlock(Block):
  """x ← x + mixer(LN(x)), then x ← x + MLP(LN(x)).

  Without an MLP the second line is x ← x + LN(x).

  Parameters: norm1/{scale,bias}, mixer/…, norm2/{scale,bias} and, with an MLP,
  mlp/{up,down}/{kernel,bias}.
  """

  norm1: LayerNorm

  def __init__(
    self,
    mixer: MixerConfig,
    site: Site,
    *,
    mlp_width: int | None,
    rngs: nnx.Rngs,
  ):
    """Make the block.

    Args:
      mixer: config of the mixer.
      site: the block's place in the model.
      mlp_width: hidden width of the MLP. None: no MLP.
      rngs: draws the initial parameters.
    """
    self.norm1 = make_layer_norm(site.width, site.dtype, rngs)
    self.mixer = _make_mixer(mixer, site, rngs)
    self.norm2 = make_layer_norm(site.width, site.dtype, rngs)
    self.mlp = _make_mlp(site, mlp_width, rngs)

  def sum_and_norm(
    self, stream: Stream, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Return x and LN(x)."""
    return self.norm1.of_sum(stream, axes)

  def _add(
    self, x: Array, y: Array, axes: ShardAxes | None, place: Place
  ) -> Stream:
    x, n = self.norm2.of_sum(Stream(x, y), axes)
    x, n = place(x), place(n)
    if self.mlp is None:
      return Stream(x, n)
    y, bias = self.mlp.parts(n, axes)
    return Stream(x, place(y), bias)


class MambaBlock(Block):
  """x ← x + mixer(RMSNorm(x)).

  Parameters: norm1/scale and mixer/….
  """

  def __init__(self, mixer: MixerConfig, site: Site, *, rngs: nnx.Rngs):
    """Make the block of a mixer's config at a place in the model."""
    self.norm1 = nnx.RMSNorm(
      site.width, epsilon=NORM_EPS, dtype=jnp.dtype(site.dtype), rngs=rngs
    )
    self.mixer = _make_mixer(mixer, site, rngs)

  def sum_and_norm(
    self, stream: Stream, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Return x and RMSNorm(x)."""
    del axes
    x = stream.whole()
    return x, self.norm1(x)

  def _add(
    self, x: Array, y: Array, axes: ShardAxes | None, place: Place
  ) -> Stream:
    del axes, place
    return Stream(x, y)


class Pair(nnx.Module):
  """Two blocks, one after the other. Parameters: first/…, second/…."""

  def __init__(self, first: Block, second: Block):
    self.first = first
    self.second = second

  def __call__(
    self,
    stream: Stream,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Stream:
    """Return the residual stream after both blocks.

    The arguments are those of a `Block`. The first block computes whole rows,
    because the second may need all of them.
    """
    stream = self.first(stream, segment_ids=segment_ids, axes=axes)
    return self.second(
      stream,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )

  def init_state(self, batch: int) -> tuple[MixerState, MixerState]:
    """Return both mixers' states before a document's first token."""
    return (
      self.first.mixer.init_state(batch),
      self.second.mixer.init_state(batch),
    )

  def prefill(
    self,
    x_BTD: Array,
    states: tuple[MixerState, MixerState],
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, tuple[MixerState, MixerState]]:
    """Return the residual stream of T more tokens, and both states."""
    stream, first = self.first.prefill(
      Stream(x_BTD), states[0], segment_ids=segment_ids, axes=axes
    )
    stream, second = self.second.prefill(
      stream, states[1], segment_ids=segment_ids, axes=axes
    )
    return stream.whole(), (first, second)

  def step(
    self, x_BD: Array, states: tuple[MixerState, MixerState]
  ) -> tuple[Array, tuple[MixerState, MixerState]]:
    """Return the residual stream of one more token, and both states."""
    stream, first = self.first.step(Stream(x_BD), states[0])
    stream, second = self.second.step(stream, states[1])
    return stream.whole(), (first, second)

  def state_size(self, length: int) -> int:
    """Return the bytes of both states for a row of `length` tokens."""
    first, second = self.first.mixer, self.second.mixer
    return first.state_size(length) + second.state_size(length)

  def attention_matrix(self, stream: Stream) -> Array:
    """Return the second mixer's attention matrix, (B, H, T, T)."""
    _, n_BTD = self.second.sum_and_norm(self.first(stream))
    return self.second.mixer.attention_matrix(n_BTD)


def make_layer_norm(width: int, dtype: str, rngs: nnx.Rngs) -> LayerNorm:
  """Return a layer norm with weight and bias, its statistics in float32."""
  return LayerNorm(width, eps=NORM_EPS, dtype=jnp.dtype(dtype), rngs=rngs)


def _make_mixer(config: MixerConfig, site: Site, rngs: nnx.Rngs) -> Mixer:
  """Return the mixer that a config makes.

  Raises:
    TypeError: `config.make` returned something else.
  """
  mixer = config.make(site, rngs=rngs)
  if not isinstance(mixer, Mixer):
    found = "None" if mixer is None else f"a {type(mixer).__name__}"
    raise TypeError(
      f"{type(config).__name__}.make returned {found}: expected a Mixer"
    )
  return mixer


def _make_mlp(site: Site, mlp_width: int | None, rngs: nnx.Rngs) -> MLP | None:
  if mlp_width is None:
    return None
  return MLP(
    site.width,
    mlp_width,
    dtype=site.dtype,
    stddev=output_stddev(site.layers),
    rngs=rngs,
  )


def place(
  x_BTD: Array, axes: ShardAxes | None, *, whole_rows: bool = True
) -> Array:
  """Hold activations to the split of batch and time over the mesh.

  Without it XLA may gather the activations rather than the weights.

  Args:
    x_BTD: (B, T, D), or (B, M, D) at chosen positions.
    axes: the mesh axes. None: no mesh, and x is returned.
    whole_rows: whether x has all positions. Chosen positions are split over
      the batch alone.

  Raises:
    ValueError: the mesh of the context does not fit.
  """
  if axes is None:
    return x_BTD
  if whole_rows:
    axes.check(x_BTD.shape[0], None, x_BTD.shape[1])
  spec = axes.bt() if whole_rows else PartitionSpec(axes.batch)
  return jax.lax.with_sharding_constraint(x_BTD, spec)


def _leave(x: Array) -> Array:
  """Return x where it is."""
  return x


# Stacked pairs: one `Pair` whose parameters have a leading axis of the pairs.


def stack(pairs: list[Pair]) -> Pair:
  """Return one `Pair` whose parameters are those of all pairs, stacked."""
  graph, _ = nnx.split(pairs[0])
  states = [nnx.state(pair) for pair in pairs]
  return nnx.merge(graph, jax.tree.map(lambda *x: jnp.stack(x), *states))


def unstack(pairs: Pair, index: int) -> Pair:
  """Return one of the stacked pairs."""
  graph, parameters = nnx.split(pairs)
  return nnx.merge(graph, _take(parameters, index))


def run_pairs(
  pairs: Pair,
  x_BTD: Array,
  *,
  scan: bool,
  remat: Remat,
  segment_ids: Array | None = None,
  axes: ShardAxes | None = None,
  query_positions: Array | None = None,
) -> Stream:
  """Return the residual stream after all stacked pairs.

  Args:
    pairs: the stacked pairs.
    x_BTD: the residual stream before the first pair.
    scan: whether one compiled pair is scanned over the pairs. Otherwise the
      pairs run one by one.
    remat: what the backward pass computes again. "none" keeps every value that
      it needs. "dots" keeps the outputs of projections alone, so that norms,
      gates, GELUs and the mixer's operator run twice. "full" keeps the inputs
      of each pair alone.
    segment_ids: as in a call of a `Block`.
    axes: as in a call of a `Block`.
    query_positions: as in a call of a `Block`, for the last pair.
  """
  graph, parameters = nnx.split(pairs)

  def run_pair(
    stream: Stream, parameters: Any, query_positions: Array | None = None
  ) -> Stream:
    return nnx.merge(graph, parameters)(
      stream,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
    )

  if remat != "none":
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    run_pair = jax.checkpoint(
      run_pair,
      prevent_cse=not scan,  # the body of a scan cannot be merged with others
      policy=dots if remat == "dots" else None,
    )
  if query_positions is None:
    return _run_whole_rows(run_pair, x_BTD, parameters, scan, remat)
  before = jax.tree.map(lambda p: p[:-1], parameters)
  stream = _run_whole_rows(run_pair, x_BTD, before, scan, remat)
  return run_pair(stream, _take(parameters, -1), query_positions)


def _run_whole_rows(
  run_pair: Callable[[Stream, Any], Stream],
  x_BTD: Array,
  parameters: Any,
  scan: bool,
  remat: Remat,
) -> Stream:
  """Return the residual stream after pairs; there may be none."""
  count = len(jax.tree.leaves(parameters)[0])
  if scan and count:
    # The carry is the sum of the stream's parts: it takes less memory.
    def body(x: Array, parameters: Any) -> tuple[Array, None]:
      return run_pair(Stream(x), parameters).whole(), None

    return Stream(jax.lax.scan(body, x_BTD, parameters)[0])
  run_pair = jax.jit(run_pair)  # traced once for all pairs after the first
  stream = Stream(x_BTD)
  for index in range(count):
    stream = run_pair(stream, _take(parameters, index))
    if remat == "full":  # so that the backward keeps the sum alone
      stream = Stream(stream.whole())
  return stream


def init_states(pairs: Pair, batch: int) -> Any:
  """Return the states of all stacked pairs before a row's first token."""
  state = unstack(pairs, 0).init_state(batch)
  count = len(jax.tree.leaves(nnx.state(pairs))[0])
  return jax.tree.map(lambda x: jnp.stack([x] * count), state)


def prefill_pairs(
  pairs: Pair,
  x_BTD: Array,
  states: Any,
  *,
  segment_ids: Array | None = None,
  axes: ShardAxes | None = None,
) -> tuple[Array, Any]:
  """Return the residual stream of T more tokens, and all pairs' states."""
  graph, parameters = nnx.split(pairs)

  def body(x_BTD: Array, inputs: tuple[Any, Any]) -> tuple[Array, Any]:
    parameters, states = inputs
    pair = nnx.merge(graph, parameters)
    return pair.prefill(x_BTD, states, segment_ids=segment_ids, axes=axes)

  return jax.lax.scan(body, x_BTD, (parameters, states))


def step_pairs(pairs: Pair, x_BD: Array, states: Any) -> tuple[Array, Any]:
  """Return the residual stream of one more token, and all pairs' states."""
  graph, parameters = nnx.split(pairs)

  def body(x_BD: Array, inputs: tuple[Any, Any]) -> tuple[Array, Any]:
    parameters, states = inputs
    return nnx.merge(graph, parameters).step(x_BD, states)

  return jax.lax.scan(body, x_BD, (parameters, states))


def state_size(pairs: Pair, length: int) -> int:
  """Return the bytes of all pairs' states for a row of `length` tokens."""
  graph, parameters = nnx.split(pairs)
  # Shapes alone, so that a model without values has a size too.
  shapes = jax.eval_shape(lambda x: _take(x, 0), parameters)
  count = len(jax.tree.leaves(parameters)[0])
  return count * nnx.merge(graph, shapes).state_size(length)


def _take(parameters: Any, index: int) -> Any:
  """Return the parameters of one of the stacked pairs."""
  return jax.tree.map(lambda p: p[index], parameters)
