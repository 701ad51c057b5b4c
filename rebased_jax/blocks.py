"""Blocks of the language model: norms, a mixer, and an MLP.

    x ← x + mixer(LN(x));   x ← x + MLP(LN(x))           PreNormBlock
    x ← x + mixer(LN(x));   x ← x + LN(x)                PreNormBlock, no MLP
    x ← x + mixer(RMSNorm(x))                            MambaBlock

The second line is that of the paper's MQAR models, the third that of its Mamba
model. x is the residual stream, (B, T, D) in float32.

A block returns the residual stream as a `Stream`, a sum whose parts are not yet
added: the layer norm of the next block adds them as it reads them. Calls of
modules name the argument `stream`: `nnx.tabulate` cannot print it otherwise.

Two blocks make a `Pair`. All pairs of a model have the same shapes, so that a
model keeps their parameters stacked. The functions at the end run them.
"""

import abc
from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes, devices
from pallas_kernels.arguments import check_not_cut
from rebased_jax.config_checks import DType
from rebased_jax.layer_norm import LayerNorm, Stream
from rebased_jax.linear import output_stddev
from rebased_jax.mixers.attention import AttentionState
from rebased_jax.mixers.base import (
  Mixer,
  MixerConfig,
  MixerState,
  Site,
  take_positions,
)
from rebased_jax.mlp import MLP
from rebased_jax.model_config import Remat

NORM_EPS = 1e-5  # PyTorch's default

Place = Callable[[Array], Array]


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
    dropout_key: Array | None = None,
  ) -> Stream:
    """Return the residual stream of whole rows, or at chosen positions.

    Args:
      stream: the residual stream before the block, (B, T, D).
      segment_ids: integers (B, T) of packed documents. None: one a row.
      axes: the mesh axes that split batch, heads and time. None: no mesh.
      query_positions: integers (B, M); the result is then (B, M, D).
      dropout_key: a PRNG key for the mixer's dropout. None: no dropout.
    """
    x_BTD, n_BTD = self.sum_and_norm(stream=stream, axes=axes)
    y_BTD = self.mixer(
      place(n_BTD, axes),
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
      dropout_key=dropout_key,
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
    x_BTD, n_BTD = self.sum_and_norm(stream=stream, axes=axes)
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
    self.norm1 = make_layer_norm(site.width, site.dtype, rngs, site.param_dtype)
    self.mixer = _make_mixer(mixer, site, rngs)
    self.norm2 = make_layer_norm(site.width, site.dtype, rngs, site.param_dtype)
    self.mlp = _make_mlp(site, mlp_width, rngs)

  def sum_and_norm(
    self, stream: Stream, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Return x and LN(x)."""
    return self.norm1.of_sum(stream=stream, axes=axes)

  def _add(
    self, x: Array, y: Array, axes: ShardAxes | None, place: Place
  ) -> Stream:
    x, n = self.norm2.of_sum(stream=Stream(x, y), axes=axes)
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
      site.width,
      epsilon=NORM_EPS,
      dtype=jnp.dtype(site.dtype),
      param_dtype=jnp.dtype(site.param_dtype),
      rngs=rngs,
    )
    self.mixer = _make_mixer(mixer, site, rngs)

  def sum_and_norm(
    self, stream: Stream, axes: ShardAxes | None = None
  ) -> tuple[Array, Array]:
    """Return x and RMSNorm(x)."""
    del axes
    x = stream.whole()
    # Flax's norm mixes float32 and the compute dtype, which a user may forbid.
    with jax.numpy_dtype_promotion("standard"):
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
    dropout_key: Array | None = None,
  ) -> Stream:
    """Return the residual stream after both blocks.

    The arguments are those of a `Block`. The first block computes whole rows,
    because the second may need all of them.
    """
    first_key = second_key = None
    if dropout_key is not None:
      first_key, second_key = jax.random.split(dropout_key)
    stream = self.first(
      stream=stream,
      segment_ids=segment_ids,
      axes=axes,
      dropout_key=first_key,
    )
    return self.second(
      stream=stream,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
      dropout_key=second_key,
    )

  @property
  def has_dropout(self) -> bool:
    """Whether a mixer of the pair has dropout."""
    mixers = self.first.mixer, self.second.mixer
    return any(mixer.takes_dropout_key for mixer in mixers)

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


def make_layer_norm(
  width: int, dtype: DType, rngs: nnx.Rngs, param_dtype: DType
) -> LayerNorm:
  """Return a layer norm with scale and bias, its statistics in float32."""
  return LayerNorm(
    width,
    eps=NORM_EPS,
    dtype=jnp.dtype(dtype),
    rngs=rngs,
    param_dtype=param_dtype,
  )


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
  if mixer.dropout_stream is not None:
    del mixer.dropout_stream  # the model's calls hand its mixers their keys
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
    precision=site.precision,
    param_dtype=site.param_dtype,
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


@dataclasses.dataclass(frozen=True)
class _Program:
  """The static arguments of a program that runs stacked pairs."""

  graph: nnx.GraphDef  # of one pair
  call: Callable[..., Any]  # of a pair; `nnx.tabulate` wraps it for a while
  axes: ShardAxes | None = None
  scan: bool = True
  remat: Remat = "none"


def _split_program(pairs: Pair, **options: Any) -> tuple[_Program, Any]:
  """Return the program of stacked pairs, and their parameters."""
  graph, parameters = nnx.split(pairs)
  return _Program(graph, type(pairs).__call__, **options), parameters


def _compiled(
  function: Callable[..., Any], program: _Program, *arrays: Any
) -> Any:
  """Return function(program, *arrays), compiled once outside `jax.jit`.

  A scan's body is a new function at each call. Outside `jax.jit` jax would
  compile it anew each time, and keep every copy.
  """
  try:
    hash(program)
  except TypeError:
    # A mixer that is not ours may keep a list or a dict, which have no hash.
    return function(program, *arrays)
  return _call(function, program, devices.program_key(), *arrays)


# Not `compile_once`, which is inlined into a surrounding trace. An eager
# gradient would then transpose the scan anew at each call.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(
  function: Callable[..., Any], program: _Program, key: Any, *arrays: Any
) -> Any:
  del key  # it only tells programs apart
  return function(program, *arrays)


class _PairInputs(NamedTuple):
  """The arrays that one pair takes, or those of all pairs, stacked."""

  parameters: Any
  dropout_key: Array | None


def run_pairs(
  pairs: Pair,
  x_BTD: Array,
  *,
  scan: bool,
  remat: Remat,
  segment_ids: Array | None = None,
  axes: ShardAxes | None = None,
  query_positions: Array | None = None,
  dropout_key: Array | None = None,
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
    dropout_key: a PRNG key for the mixers' dropout. None: no dropout.

  Raises:
    ValueError: an argument does not fit.
  """
  # Inside the compiled program the values are cut already.
  check_not_cut("segment_ids", segment_ids)
  program, parameters = _split_program(pairs, axes=axes, scan=scan, remat=remat)
  if not pairs.has_dropout:
    dropout_key = None
  return _compiled(
    _run_pairs,
    program,
    parameters,
    x_BTD,
    segment_ids,
    query_positions,
    dropout_key,
  )


def _run_pairs(
  program: _Program,
  parameters: Any,
  x_BTD: Array,
  segment_ids: Array | None,
  query_positions: Array | None,
  dropout_key: Array | None,
) -> Stream:
  def run_pair(
    stream: Stream, pair: _PairInputs, query_positions: Array | None = None
  ) -> Stream:
    return nnx.merge(program.graph, pair.parameters)(
      stream=stream,
      segment_ids=segment_ids,
      axes=program.axes,
      query_positions=query_positions,
      dropout_key=pair.dropout_key,
    )

  pairs = _PairInputs(parameters, None)
  if dropout_key is not None:
    count = len(jax.tree.leaves(parameters)[0])
    # The embedding's dropout uses the key itself.
    mixers_key = jax.random.fold_in(dropout_key, 1)
    pairs = _PairInputs(parameters, jax.random.split(mixers_key, count))

  if program.remat != "none":
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    run_pair = jax.checkpoint(
      run_pair,
      # The body of a scan cannot be merged with others.
      prevent_cse=not program.scan,
      policy=dots if program.remat == "dots" else None,
    )
  if not program.scan:
    return _run_one_by_one(program, run_pair, pairs, x_BTD, query_positions)

  # The carry is the sum of the stream's parts: it takes less memory.
  def body(x: Array, pair: _PairInputs) -> tuple[Array, None]:
    return run_pair(Stream(x), pair).whole(), None

  if query_positions is None:
    return Stream(jax.lax.scan(body, x_BTD, pairs)[0])
  before, last = _split_last(pairs)
  if before is not None:
    x_BTD, _ = jax.lax.scan(body, x_BTD, before)
  return run_pair(Stream(x_BTD), last, query_positions)


def _run_one_by_one(
  program: _Program,
  run_pair: Callable[..., Stream],
  pairs: _PairInputs,
  x_BTD: Array,
  query_positions: Array | None,
) -> Stream:
  """Return the residual stream after pairs that are not scanned over."""
  run_whole = jax.jit(run_pair)  # traced once for all pairs after the first
  stream = Stream(x_BTD)
  *before, last = _split(pairs)
  for pair in before:
    stream = run_whole(*_in_turn(program, stream, pair))
    if program.remat == "full":  # so that the backward keeps the sum alone
      stream = Stream(stream.whole())
  stream, last = _in_turn(program, stream, last)
  if query_positions is not None:
    return run_pair(stream, last, query_positions)
  stream = run_whole(stream, last)
  return Stream(stream.whole()) if program.remat == "full" else stream


def _in_turn(
  program: _Program, stream: Stream, pair: Any
) -> tuple[Stream, Any]:
  """Return both, the parameters of the pair available only with the stream.

  Over a mesh XLA would otherwise gather the parameters of all pairs at the
  start, and hold them all.
  """
  if program.axes is None:
    return stream, pair
  return jax.lax.optimization_barrier((stream, pair))


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
  check_not_cut("segment_ids", segment_ids)
  program, parameters = _split_program(pairs, axes=axes)
  return _compiled(
    _prefill_pairs, program, parameters, x_BTD, states, segment_ids
  )


def _prefill_pairs(
  program: _Program,
  parameters: Any,
  x_BTD: Array,
  states: Any,
  segment_ids: Array | None,
) -> tuple[Array, Any]:
  def body(x_BTD: Array, inputs: tuple[Any, Any]) -> tuple[Array, Any]:
    parameters, states = inputs
    pair = nnx.merge(program.graph, parameters)
    return pair.prefill(
      x_BTD, states, segment_ids=segment_ids, axes=program.axes
    )

  return jax.lax.scan(body, x_BTD, (parameters, states))


def step_pairs(pairs: Pair, x_BD: Array, states: Any) -> tuple[Array, Any]:
  """Return the residual stream of one more token, and all pairs' states."""
  program, parameters = _split_program(pairs)
  return _compiled(_step_pairs, program, parameters, x_BD, states)


def _step_pairs(
  program: _Program, parameters: Any, x_BD: Array, states: Any
) -> tuple[Array, Any]:
  # A step writes one slot of a cache. As an input and an output of the scan the
  # cache would be two buffers, and a loop over tokens would copy one to the
  # other. As its carry it is one. Other states are small, and written whole.
  caches = tuple(x if isinstance(x, AttentionState) else None for x in states)

  def without_caches(states: tuple[Any, Any]) -> tuple[Any, ...]:
    pairs = zip(states, caches, strict=True)
    return tuple(x if cache is None else None for x, cache in pairs)

  def body(
    carry: tuple[Array, Any], inputs: tuple[Any, Any, Array]
  ) -> tuple[tuple[Array, Any], Any]:
    x_BD, caches = carry
    parameters, others, index = inputs
    own = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), caches
    )
    # One read, before the write: the stack is then not copied for later reads.
    own = jax.lax.optimization_barrier(own)
    states = tuple(
      other if cache is None else cache
      for other, cache in zip(others, own, strict=True)
    )
    x_BD, states = nnx.merge(program.graph, parameters).step(x_BD, states)
    caches = tuple(
      None if cache is None else _put(cache, state, index)
      for cache, state in zip(caches, states, strict=True)
    )
    return (x_BD, caches), without_caches(states)

  count = len(jax.tree.leaves(parameters)[0])
  inputs = parameters, without_caches(states), jnp.arange(count)
  (x_BD, caches), others = jax.lax.scan(body, (x_BD, caches), inputs)
  return x_BD, tuple(
    other if cache is None else cache
    for other, cache in zip(others, caches, strict=True)
  )


def _put(stack: Any, state: Any, index: Array) -> Any:
  """Return the stacked states with that of one pair replaced."""
  return jax.tree.map(
    lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0),
    stack,
    state,
  )


def attention_matrix(pairs: Pair, x_BTD: Array) -> Array:
  """Return the attention matrix (B, H, T, T) of the last of all pairs."""
  count = len(jax.tree.leaves(nnx.state(pairs))[0])
  *before, last = (unstack(pairs, index) for index in range(count))
  for pair in (*before, last):
    pair.eval()
  stream = Stream(x_BTD)
  for pair in before:
    stream = pair(stream)
  return last.attention_matrix(stream)


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


def _split(parameters: Any) -> list[Any]:
  """Return the parameters of each of the stacked pairs.

  The gradient of a split is one concatenation. That of an index is a whole
  stack of zeros for each pair, and their sum.
  """
  leaves, tree = jax.tree.flatten(parameters)
  columns = [
    [part[0] for part in jax.lax.split(p, (1,) * len(p))] for p in leaves
  ]
  return [tree.unflatten(column) for column in zip(*columns, strict=True)]


def _split_last(parameters: Any) -> tuple[Any | None, Any]:
  """Return the stack without its last pair, None if empty, and the last."""
  leaves, tree = jax.tree.flatten(parameters)
  if len(leaves[0]) == 1:
    return None, _take(parameters, 0)
  columns = [jax.lax.split(p, (len(p) - 1, 1)) for p in leaves]
  before = tree.unflatten([before for before, _ in columns])
  return before, tree.unflatten([last[0] for _, last in columns])
