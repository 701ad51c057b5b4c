"""The interface of every sequence mixer.

A mixer maps x (B, T, D) to y (B, T, D). It is causal: y_t depends on x_s for
s ≤ t alone. To write one, subclass `MixerConfig` and `Mixer` in one file:

    @dataclasses.dataclass(frozen=True)
    class MineConfig(MixerConfig):
      decay: float = 0.9

      def make(self, site, *, rngs):
        return Mine(site.width, self, dtype=site.dtype, rngs=rngs)

    class Mine(Mixer):
      config_type = MineConfig

      def __init__(self, width, config, *, dtype="float32", rngs):
        super().__init__(width, config, dtype=dtype)
        ...  # parameters

      def init_state(self, batch): ...
      def _prefill(self, x_BTD, state, *, segment_ids, axes): ...

`Mixer` checks the arguments of every call before `_prefill` sees them, and the
shapes of what `_prefill` returns. It makes the whole-row call and the one-token
step from `_prefill` unless the subclass has its own, faster `_mix` and `_step`.

The state summarises the past of one document. It is a pytree of arrays whose
first axis is the batch. An incoming state belongs to the document of the first
token. A returned state belongs to the document of the last token. A row that
begins a new document starts from `init_state`.
"""

import abc
from collections.abc import Callable
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes
from pallas_kernels.arguments import (
  check_integers,
  check_not_cut,
  name_type,
)
from rebased_jax.config_checks import (
  DType,
  compute_dtype,
  is_positive_integer,
)
from rebased_jax.dropout import DropsInTraining, draws_own_key
from rebased_jax.explicit_mesh import layouts, method_on_any_mesh
from rebased_jax.integers import to_int32
from rebased_jax.mixer_configs import MixerConfig as MixerConfig, Site as Site

MixerState = Any


def _mix_outputs(arguments: dict[str, Any]) -> str:
  """Return the axes of y: chosen positions are not split."""
  return "B" if arguments.get("query_positions") is not None else "BTD"


def _rows(state: MixerState) -> Any:
  """Return the axes of a state: its rows are split as those of x."""
  return jax.tree.map(lambda x: "B", state)


class Mixer(DropsInTraining):
  """Abstract: a causal map of x (B, T, D) to y (B, T, D), with a state.

  A subclass defines `init_state` and `_prefill`, and may define `_mix`,
  `_step`, `state_size` and `attention_matrix`. It must not override `__call__`,
  `prefill` and `step`: they check their arguments and the shapes of their
  results. A wrong argument raises ValueError; a request that the mixer cannot
  serve raises NotImplementedError.
  """

  #: The class of config that the subclass is made from; each subclass sets it.
  #: `__init__` refuses a config of another class.
  config_type: ClassVar[type[MixerConfig]] = MixerConfig
  #: Why the mixer cannot split time over devices. None: it can.
  no_time_axis: ClassVar[str | None] = "it does not split time over devices"
  #: Why the mixer cannot keep documents apart. None: it can.
  no_segment_ids: ClassVar[str | None] = None
  #: How `rebased_jax.memory` adds states. "sum": a state is a sum over tokens.
  #: "window": it has a text's last tokens, and a result has that of a text's
  #: beginning. None: states cannot be added.
  state_rule: ClassVar[Literal["sum", "window"] | None] = None

  #: Whether the mixer has a dropout: its `_mix` then gets `dropout_key`, a PRNG
  #: key, or None where nothing is dropped.
  takes_dropout_key: bool = False
  #: How many heads a mesh may split. None: the mixer has none.
  heads_to_split: int | None = None
  #: Tokens of the longest row that the mixer takes. None: any number.
  longest_row: int | None = None
  #: D.
  width: int
  #: Dtype of the computation and of y.
  dtype: jnp.dtype
  #: Dtype of the parameters.
  param_dtype: jnp.dtype

  def __init__(
    self,
    width: int,
    config: MixerConfig,
    *,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
  ) -> None:
    """Check the arguments that all mixers have, and keep all but the config.

    The rule for dtypes is that of Flax's layers: x and the parameters are cast
    to `dtype`, and y has it, whatever dtype x has.

    Args:
      width: D.
      config: the mixer's config.
      dtype: the compute dtype: a name, or anything that jax takes for a dtype.
        None: `param_dtype`. The dtype of x decides nothing, because a state has
        its dtype before the first x.
      param_dtype: dtype of the parameters.

    Raises:
      TypeError: the subclass does not set `config_type`.
      ValueError: `config` is not of `config_type`, `width` is not an integer
        ≥ 1, or nothing computes in `dtype` or `param_dtype`.
    """
    if self.config_type is MixerConfig:
      raise TypeError(
        f"{self._name}.config_type is not set: expected the class of its "
        f"config; write `config_type = {type(config).__name__}` in the class"
      )
    if not isinstance(config, self.config_type):
      raise ValueError(
        f"config is a {type(config).__name__}: expected a "
        f"{self.config_type.__name__}"
      )
    if not is_positive_integer(width):
      raise ValueError(f"width={width!r}: expected an integer ≥ 1")
    self.width = width
    self.param_dtype = compute_dtype(param_dtype, "param_dtype")
    self.dtype = compute_dtype(param_dtype if dtype is None else dtype)

  if not TYPE_CHECKING:

    def __getattr__(self, name: str) -> Any:
      # Python calls this only for an attribute that is missing.
      if name in ("width", "dtype"):
        raise AttributeError(
          f"{self._name}.{name} is not set: `__init__` must first call "
          "super().__init__(width, config, dtype=dtype)",
          name=name,
          obj=self,
        )
      return super().__getattribute__(name)  # raises the usual error

  @final
  @draws_own_key
  @method_on_any_mesh("BTD", _mix_outputs)
  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Return y (B, T, D) of whole rows, or (B, M, D) at chosen positions.

    Args:
      x_BTD: floats (B, T, D).
      segment_ids: integers (B, T). A document is a run of equal ids, and its
        tokens see only that document. None: each row is one document.
      axes: the mesh axes that split batch, heads and time. None: no mesh.
      query_positions: integers (B, M), each in [0, T). A position outside has
        NaN. None: all positions.
      dropout_key: a PRNG key, which switches the mixer's dropout on. None: no
        dropout, except after train(), when the mixer draws a key.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or there is no key in
        training mode.
      NotImplementedError: the mixer cannot split time or keep documents apart.
    """
    self._check_row(x_BTD, segment_ids, axes)
    if query_positions is not None:
      self._check_positions(x_BTD, query_positions)
      query_positions = to_int32(query_positions)
    # Most mixers have no dropout, and their `_mix` takes no key.
    options = {"dropout_key": dropout_key} if self.takes_dropout_key else {}
    y = self._mix(
      x_BTD,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
      **options,
    )
    shape = x_BTD.shape
    if query_positions is not None:
      shape = (*query_positions.shape, self.width)
    self._check_output("_mix", y, shape)
    return y

  @final
  @method_on_any_mesh("BTD", lambda given: ("BTD", _rows(given["state"])))
  def prefill(
    self,
    x_BTD: Array,
    state: MixerState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, MixerState]:
    """Return y (B, T, D) of T more tokens, and the state after them.

    Args:
      x_BTD: floats (B, T, D).
      state: the state after the tokens before, or `init_state(B)`.
      segment_ids: integers (B, T), as in a call.
      axes: the mesh axes that split batch, heads and time. None: no mesh.

    Raises:
      ValueError: an argument has a wrong shape or dtype.
      NotImplementedError: the mixer cannot split time or keep documents apart.
    """
    self._check_row(x_BTD, segment_ids, axes)
    self._check_state(x_BTD.shape[0], state)
    return self._checked_prefill(
      x_BTD, state, segment_ids=segment_ids, axes=axes
    )

  @final
  @method_on_any_mesh("BD", lambda given: ("BD", layouts(given["state"])))
  def step(self, x_BD: Array, state: MixerState) -> tuple[Array, MixerState]:
    """Return y (B, D) of one more token a row, and the state after it.

    Args:
      x_BD: floats (B, D).
      state: the state after the tokens before, or `init_state(B)`.

    Raises:
      ValueError: an argument has a wrong shape or dtype.
    """
    self._check_tokens(x_BD, "(B, D)")
    self._check_state(x_BD.shape[0], state)
    y_BD, state = self._take_two("_step", self._step(x_BD, state))
    self._check_output("_step", y_BD, x_BD.shape)
    self._check_returned_state("_step", x_BD.shape[0], state)
    return y_BD, state

  @abc.abstractmethod
  def init_state(self, batch: int) -> MixerState:
    """Return the state of `batch` rows before a document's first token."""

  @abc.abstractmethod
  def _prefill(
    self,
    x_BTD: Array,
    state: MixerState,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, MixerState]:
    """Compute `prefill`; the arguments are checked."""

  def _mix(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
    query_positions: Array | None,
  ) -> Array:
    """Compute `__call__`; the arguments are checked."""
    state = self.init_state(x_BTD.shape[0])
    y_BTD, _ = self._checked_prefill(
      x_BTD, state, segment_ids=segment_ids, axes=axes
    )
    return take_positions(y_BTD, query_positions)

  def _step(self, x_BD: Array, state: MixerState) -> tuple[Array, MixerState]:
    """Compute `step`; the arguments are checked."""
    y_B1D, state = self._checked_prefill(
      x_BD[:, None], state, segment_ids=None, axes=None
    )
    return y_B1D[:, 0], state

  def state_size(self, length: int) -> int:
    """Return the bytes of state that a row of `length` tokens holds."""
    del length  # the state of most mixers does not grow
    return tree_bytes(lambda: self.init_state(1))

  def attention_matrix(self, x_BTD: Array) -> Array:
    """Return the weights A (B, H, T, T) between tokens, to look at.

    Time and memory are quadratic in T.

    Raises:
      NotImplementedError: the mixer has no such weights.
    """
    del x_BTD
    raise NotImplementedError(f"{self._name} has no attention matrix")

  @property
  def has_dropout(self) -> bool:
    """Whether the mixer has a dropout."""
    return self.takes_dropout_key

  @property
  def has_attention_matrix(self) -> bool:
    """Whether `attention_matrix` returns something."""
    return type(self).attention_matrix is not Mixer.attention_matrix

  @property
  def _name(self) -> str:
    return type(self).__name__

  def _check_row(
    self, x_BTD: Array, segment_ids: Array | None, axes: ShardAxes | None
  ) -> None:
    self._check_tokens(x_BTD, "(B, T, D)")
    if axes is not None and axes.time is not None and self.no_time_axis:
      raise NotImplementedError(
        f"{self._name} with axes.time={axes.time!r}: {self.no_time_axis}"
      )
    if segment_ids is None:
      return
    if self.no_segment_ids:
      raise NotImplementedError(
        f"{self._name} with segment_ids: {self.no_segment_ids}"
      )
    B, T = x_BTD.shape[:2]
    check_integers(f"{self._name}: segment_ids", segment_ids)
    check_not_cut(f"{self._name}: segment_ids", segment_ids)
    if segment_ids.shape != (B, T):
      raise self._wrong_shape("segment_ids", segment_ids, f"(B, T) = {(B, T)}")

  def _check_tokens(self, x: Array, form: str) -> None:
    rank = form.count(",") + 1
    if not hasattr(x, "dtype"):
      raise ValueError(
        f"{self._name}: x is {name_type(x)}: expected an array {form}"
      )
    if x.ndim != rank or 0 in x.shape or x.shape[-1] != self.width:
      raise self._wrong_shape("x", x, f"{form}, none 0, with D = {self.width}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{self._name}: x is {x.dtype}: expected floats")

  def _check_positions(self, x_BTD: Array, query_positions: Array) -> None:
    check_integers(f"{self._name}: query_positions", query_positions)
    B, shape = x_BTD.shape[0], query_positions.shape
    if len(shape) != 2 or shape[0] != B or shape[1] == 0:
      raise self._wrong_shape(
        "query_positions", query_positions, f"(B, M), B = {B} and M ≥ 1"
      )

  def _check_state(self, rows: int, state: MixerState) -> None:
    """Check the number of rows of a state. Its other sizes are not checked."""
    for leaf in jax.tree.leaves(state):
      if leaf.shape[0] != rows:
        raise self._wrong_shape("state", leaf, f"{rows} rows, as x has")

  def _checked_prefill(
    self,
    x_BTD: Array,
    state: MixerState,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, MixerState]:
    """Return what `_prefill` returns, with its shapes checked.

    A mixer of a user may return too few tokens. Without the check it would
    train all the same, because a gather at `query_positions` clips.
    """
    y_BTD, state = self._take_two(
      "_prefill",
      self._prefill(x_BTD, state, segment_ids=segment_ids, axes=axes),
    )
    self._check_output("_prefill", y_BTD, x_BTD.shape)
    self._check_returned_state("_prefill", x_BTD.shape[0], state)
    return y_BTD, state

  def _take_two(self, method: str, returned: Any) -> tuple[Array, MixerState]:
    """Check that a method returned a tuple of y and the state."""
    if isinstance(returned, tuple) and len(returned) == 2:
      return returned
    found = name_type(returned)
    if isinstance(returned, tuple):
      found = f"{len(returned)} values"
    raise TypeError(
      f"{self._name}.{method} returned {found}: expected (y, state)"
    )

  def _check_output(
    self, method: str, y: Array, shape: tuple[int, ...]
  ) -> None:
    if jnp.shape(y) != shape:
      raise ValueError(
        f"{self._name}.{method} returned y of shape {jnp.shape(y)}: expected "
        f"{shape}"
      )

  def _check_returned_state(
    self, method: str, rows: int, state: MixerState
  ) -> None:
    """Check that a state is a tree of the arrays that `init_state` makes."""
    expected = jax.eval_shape(lambda: self.init_state(rows))
    if jax.tree.structure(state) != jax.tree.structure(expected):
      raise ValueError(
        f"{self._name}.{method} returned a state with the structure "
        f"{jax.tree.structure(state)}: expected that of init_state, "
        f"{jax.tree.structure(expected)}"
      )
    wanted = jax.tree_util.tree_leaves_with_path(expected)
    for leaf, (path, other) in zip(jax.tree.leaves(state), wanted, strict=True):
      found = jnp.shape(leaf), jnp.result_type(leaf)
      if found != (other.shape, other.dtype):
        raise ValueError(
          f"{self._name}.{method} returned state{jax.tree_util.keystr(path)} "
          f"of {_array_type(*found)}: expected "
          f"{_array_type(other.shape, other.dtype)}, as init_state makes it"
        )

  def _wrong_shape(self, name: str, x: Array, expected: str) -> ValueError:
    return ValueError(
      f"{self._name}: {name} has shape {x.shape}: expected {expected}"
    )


def take_positions(x_BTD: Array, positions_BM: Array | None) -> Array:
  """Return x (B, M, D) at chosen positions of each row.

  Args:
    x_BTD: (B, T, D).
    positions_BM: integers (B, M). A position outside [0, T) has NaN. None: x
      itself is returned.
  """
  if positions_BM is None:
    return x_BTD
  positions_BM = to_int32(positions_BM)
  inside_BM = (positions_BM >= 0) & (positions_BM < x_BTD.shape[1])
  x_BMD = jnp.take_along_axis(
    x_BTD, positions_BM[:, :, None], axis=1, mode="clip"
  )
  return jnp.where(inside_BM[..., None], x_BMD, jnp.nan)


def _array_type(shape: tuple[int, ...], dtype: jnp.dtype) -> str:
  return f"{dtype}{list(shape)}"


def tree_bytes(make: Callable[[], Any]) -> int:
  """Return the bytes of the arrays that `make` would return, making none."""
  leaves = jax.tree.leaves(jax.eval_shape(make))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
