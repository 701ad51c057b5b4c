"""The interface that every sequence mixer has.

A mixer maps x_BTD to y_BTD, causally. Its state is what a document's past
tokens are to later ones: a pytree of arrays with the batch in front. An
incoming state belongs to the document of the first token, a returned one to
that of the last; a row that starts a document starts from `init_state`.
"""

import abc
from collections.abc import Callable
import dataclasses
import math
import numbers
from typing import Any

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import ShardAxes, numerics

MixerState = Any
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of a computation


@dataclasses.dataclass(frozen=True)
class Site:
  """Where in a model a mixer stands."""

  width: int  # D
  layer: int = 0  # counted from 0
  layers: int = 1
  dtype: str = "float32"  # of the computation; parameters are float32
  length: int | None = None  # the longest row, where the model has a longest

  def __post_init__(self):
    positive(self, "width", "layers", "length")
    if not 0 <= self.layer < self.layers:
      raise ValueError(
        f"Site.layer={self.layer!r}: expected 0 to {self.layers - 1}"
      )
    computation(self.dtype)


class Mixer(nnx.Module):
  """Abstract: y_BTD = mixer(x_BTD), with a state for one token at a time.

  A subclass sets its width and its dtype. An argument of a wrong shape raises
  ValueError; what a mixer cannot do, NotImplementedError.
  """

  width: int  # D
  dtype: jnp.dtype  # of the computation

  @abc.abstractmethod
  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    """y_BTD of whole rows; y_BMD where only positions (B, M) are wanted.

    Args:
      x_BTD: the tokens.
      segment_ids: integers (B, T); a document is a run of one id, and sees
        itself alone.
      axes: the mesh axes that split batch, heads and time.
      query_positions: integers (B, M), each in [0, T).
    """

  @abc.abstractmethod
  def init_state(self, batch: int) -> MixerState:
    """The state before the first token of a document."""

  @abc.abstractmethod
  def prefill(
    self,
    x_BTD: Array,
    state: MixerState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, MixerState]:
    """y_BTD of T more tokens, and the state after them."""

  @abc.abstractmethod
  def step(self, x_BD: Array, state: MixerState) -> tuple[Array, MixerState]:
    """y_BD of one more token, and the state after it."""

  def state_size(self, length: int) -> int:
    """Bytes of state that a sequence of `length` tokens holds."""
    del length  # constant, unless a mixer says otherwise
    return tree_bytes(lambda: self.init_state(1))


@dataclasses.dataclass(frozen=True)
class MixerConfig(abc.ABC):
  """Abstract: what a mixer is, apart from the width it works at."""

  @abc.abstractmethod
  def make(self, site: Site, *, rngs: nnx.Rngs) -> Mixer:
    """The mixer, with fresh parameters."""


class Linear(nnx.Linear):
  """flax's, with the gradient of its bias summed in float32."""

  def __call__(self, x_D: Array) -> Array:
    y_D = self.product(x_D)
    return numerics.add_bias(y_D, self.bias[...]) if self.use_bias else y_D

  def product(self, x_D: Array) -> Array:
    """Without the bias."""
    return x_D.astype(self.dtype) @ self.kernel[...].astype(self.dtype)


def linear(
  features_in: int,
  features_out: int,
  *,
  dtype: str,
  rngs: nnx.Rngs,
  use_bias: bool = False,
  stddev: float = 0.02,
) -> Linear:
  """A projection with the paper's initialisation, N(0, 0.02²)."""
  return Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=nnx.initializers.normal(stddev),
    dtype=computation(dtype),
    param_dtype=jnp.float32,
    rngs=rngs,
  )


def computation(dtype: str) -> jnp.dtype:
  """The dtype of that name; raises ValueError where nothing computes in it."""
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r}: expected one of {DTYPES}")
  if dtype == "float64" and not jax.config.jax_enable_x64:
    raise ValueError("dtype='float64': expected jax_enable_x64 to be set")
  return jnp.dtype(dtype)


def check_made(width: int, config: object, kind: type[MixerConfig]) -> None:
  """Raises ValueError where a mixer is made of another config or no width."""
  if not isinstance(config, kind):
    name = type(config).__name__
    raise ValueError(f"config is a {name}: expected a {kind.__name__}")
  if not _whole(width) or width < 1:
    raise ValueError(f"width={width!r}: expected an integer ≥ 1")


def check_rows(
  mixer: Mixer,
  x_BTD: Array,
  segment_ids: Array | None,
  *,
  query_positions: Array | None = None,
  state: MixerState = None,
) -> None:
  """Raises ValueError where an argument of a call has a wrong shape or dtype.

  Of a state, the number of rows alone is looked at.
  """
  _check_tokens(mixer, x_BTD, "(B, T, D)")
  B, T = x_BTD.shape[:2]
  if segment_ids is not None:
    _check_integers(mixer, "segment_ids", segment_ids)
    if segment_ids.shape != (B, T):
      raise _wrong(mixer, "segment_ids", segment_ids, f"(B, T) = {(B, T)}")
  if query_positions is not None:
    shape = query_positions.shape
    _check_integers(mixer, "query_positions", query_positions)
    if len(shape) != 2 or shape[0] != B or shape[1] == 0:
      form = f"(B, M), B = {B} and M ≥ 1"
      raise _wrong(mixer, "query_positions", query_positions, form)
  _check_state(mixer, B, state)


def check_token(mixer: Mixer, x_BD: Array, state: MixerState) -> None:
  """The same of the arguments of a step."""
  _check_tokens(mixer, x_BD, "(B, D)")
  _check_state(mixer, x_BD.shape[0], state)


def _check_tokens(mixer: Mixer, x: Array, form: str) -> None:
  D = mixer.width
  if x.ndim != form.count(",") + 1 or 0 in x.shape or x.shape[-1] != D:
    raise _wrong(mixer, "x", x, f"{form}, none 0, with D = {D}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"{type(mixer).__name__}: x is {x.dtype}: expected floats")


def _check_integers(mixer: Mixer, name: str, x: Array) -> None:
  if not jnp.issubdtype(x.dtype, jnp.integer):
    mixer_name = type(mixer).__name__
    raise ValueError(f"{mixer_name}: {name} is {x.dtype}: expected integers")


def _check_state(mixer: Mixer, rows: int, state: MixerState) -> None:
  for leaf in jax.tree.leaves(state):
    if leaf.shape[0] != rows:
      raise _wrong(mixer, "state", leaf, f"{rows} rows, as x has")


def _wrong(mixer: Mixer, name: str, x: Array, form: str) -> ValueError:
  mixer_name = type(mixer).__name__
  return ValueError(
    f"{mixer_name}: {name} has shape {x.shape}: expected {form}"
  )


def take_positions(x_BTD: Array, positions_BM: Array | None) -> Array:
  """x_BMD: the chosen positions of each row, or all; NaN outside the row."""
  if positions_BM is None:
    return x_BTD
  inside_BM = (positions_BM >= 0) & (positions_BM < x_BTD.shape[1])
  x_BMD = jnp.take_along_axis(
    x_BTD, positions_BM[:, :, None], axis=1, mode="clip"
  )
  return jnp.where(inside_BM[..., None], x_BMD, jnp.nan)


def place(
  x_BTD: Array, axes: ShardAxes | None, *, whole_rows: bool = True
) -> Array:
  """x_BTD, held to the split of batch and time: weights move to it, not it.

  Args:
    x_BTD: (B, T, D); or (B, M, D) of chosen positions.
    axes: the mesh axes; None: there is no mesh.
    whole_rows: False of (B, M, D), which is split over the batch alone.

  Raises:
    ValueError: the ambient mesh does not fit.
  """
  if axes is None:
    return x_BTD
  if whole_rows:
    axes.check(x_BTD.shape[0], None, x_BTD.shape[1])
  spec = axes.bt() if whole_rows else PartitionSpec(axes.batch)
  return jax.lax.with_sharding_constraint(x_BTD, spec)


def gathered(table_VD: Array, axes: ShardAxes | None) -> Array:
  """A table with its rows whole, to look them up."""
  if axes is None:
    return table_VD
  return jax.lax.with_sharding_constraint(
    table_VD, PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
  )


def tree_bytes(make: Callable[[], Any]) -> int:
  """Bytes of the arrays that `make` would return; makes none."""
  leaves = jax.tree.leaves(jax.eval_shape(make))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def refuse_time_axis(mixer: str, axes: ShardAxes | None, reason: str) -> None:
  """Raises NotImplementedError where `axes` splits time."""
  if axes is not None and axes.time is not None:
    raise NotImplementedError(f"{mixer} with axes.time={axes.time!r}: {reason}")


def depth_scaled(layers: int) -> float:
  """The standard deviation of a projection that ends a block (GPT-2's)."""
  return 0.02 * (2 * layers) ** -0.5


def one_of(config: object, name: str, *allowed: str) -> None:
  """Raises ValueError where a named field is none of the allowed values."""
  value = getattr(config, name)
  if value not in allowed:
    raise ValueError(
      f"{type(config).__name__}.{name}={value!r}: expected one of {allowed}"
    )


def positive(config: object, *names: str) -> None:
  """Raises ValueError where a named field is not an integer ≥ 1."""
  for name in names:
    value = getattr(config, name)
    if value is not None and (not _whole(value) or value < 1):
      raise ValueError(
        f"{type(config).__name__}.{name}={value!r}: expected an integer ≥ 1"
      )


def _whole(value: object) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)
