"""Flax Linen versions of the same modules, with the same parameter names.

    lm = rebased_jax.linen.lm(config)
    params = lm.init(jax.random.key(0), tokens)["params"]
    logits = lm.apply({"params": params}, tokens)

They decode by `apply(…, method="init_state")`, `"prefill"` and `"step"`, whose
arguments are those of the NNX modules.

A trained model is loaded as `lm, params = rebased_jax.linen.load(folder)`. The
parameters are those of the NNX modules, `nnx.to_pure_dict` of their state,
so that either kind of module can use what the other has trained.
"""

import os
from typing import Any

from flax import linen, nnx
from jax import Array

from pallas_kernels import ShardAxes
from rebased_jax import model, model_files
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.decoding import LMState
from rebased_jax.mixers.base import MixerConfig, MixerState, Site
from rebased_jax.model_config import ModelConfig
from rebased_jax.parameter_axes import name_parameter_axes


class _FromNNX(linen.Module):
  """Abstract: a Linen module whose calls are those of an NNX module.

  The NNX module is made for each call, of shapes alone, and gets the parameters
  of the Linen module.
  """

  def _make(self, rngs: nnx.Rngs) -> nnx.Module:
    """Return the NNX module with fresh parameters."""
    raise NotImplementedError

  def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
    """Return what a method of the NNX module returns."""
    if self.is_initializing() and "params" not in self.variables:
      self._draw_parameters()
    graph, state = nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))
    params = linen.unbox(self.variables.get("params", {}))
    self._check_parameters(params, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return getattr(nnx.merge(graph, state), method)(*arguments, **options)

  def _draw_parameters(self) -> None:
    made = self._make(nnx.Rngs(params=self.make_rng("params")))
    boxed = self.partitioned  # pyrefly: ignore[missing-attribute] a subclass's
    if boxed:
      made = name_parameter_axes(made)
    state = nnx.state(made, nnx.Param)
    params = nnx.map_state(
      lambda path, x: _boxed(x) if boxed else x.get_value(), state
    )
    for name, value in nnx.to_pure_dict(params).items():
      self.put_variable("params", name, value)

  def _check_parameters(self, found: Any, expected: Any) -> None:
    """Check the names and shapes of parameters.

    Raises:
      ValueError: a parameter is missing, is not expected, or has another shape.
    """
    here, wanted = model_files.by_name(found), model_files.by_name(expected)
    for name in [*wanted, *here]:
      if name not in here:
        problem = "is missing"
      elif name not in wanted:
        problem = "is not expected"
      elif here[name].shape != wanted[name].shape:
        problem = f"has shape {here[name].shape}, not {wanted[name].shape}"
      else:
        continue
      raise ValueError(
        f"{type(self).__name__}: parameter {name} {problem}: expected those of "
        "this module's init, or of an NNX module with the same config"
      )


class LM(_FromNNX):
  """The language model; its methods are those of `rebased_jax.LM`."""

  #: The model's config.
  config: ModelConfig
  #: Whether `init` boxes each parameter with the names of its axes.
  partitioned: bool = False

  def _make(self, rngs: nnx.Rngs) -> model.LM:
    return model.LM(self.config, rngs=rngs)

  @explain_unknown_names
  def __call__(
    self,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions_to_predict: Array | None = None,
    axes: ShardAxes | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Return logits (B, T, V), as a call of `rebased_jax.LM` does."""
    return self._call(
      "__call__",
      tokens,
      segment_ids=segment_ids,
      positions_to_predict=positions_to_predict,
      axes=axes,
      dropout_key=dropout_key,
    )

  @explain_unknown_names
  def init_state(self, batch: int) -> LMState:
    """Return the state of `batch` rows before their first token."""
    return self._call("init_state", batch)

  @explain_unknown_names
  def prefill(
    self,
    tokens: Array,
    state: LMState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    all_positions: bool = False,
  ) -> tuple[Array, LMState]:
    """Return the logits after T more tokens, and the state there."""
    return self._call(
      "prefill",
      tokens,
      state,
      segment_ids=segment_ids,
      axes=axes,
      all_positions=all_positions,
    )

  @explain_unknown_names
  def step(self, tokens: Array, state: LMState) -> tuple[Array, LMState]:
    """Return the logits (B, V) after one more token a row, and the state."""
    return self._call("step", tokens, state)


class Mixer(_FromNNX):
  """A mixer; its methods are those of `rebased_jax.Mixer`."""

  #: The mixer's config.
  config: MixerConfig
  #: The width, the dtypes and the other options that the mixer is made with.
  site: Site
  #: Whether `init` boxes each parameter with the names of its axes.
  partitioned: bool = False

  def _make(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.config.make(self.site, rngs=rngs)

  @explain_unknown_names
  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
    dropout_key: Array | None = None,
  ) -> Array:
    """Return y (B, T, D), as a call of `rebased_jax.Mixer` does."""
    return self._call(
      "__call__",
      x_BTD,
      segment_ids=segment_ids,
      axes=axes,
      query_positions=query_positions,
      dropout_key=dropout_key,
    )

  @explain_unknown_names
  def init_state(self, batch: int) -> MixerState:
    """Return the state of `batch` rows before a document's first token."""
    return self._call("init_state", batch)

  @explain_unknown_names
  def prefill(
    self,
    x_BTD: Array,
    state: MixerState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, MixerState]:
    """Return y (B, T, D) of T more tokens, and the state after them."""
    return self._call(
      "prefill", x_BTD, state, segment_ids=segment_ids, axes=axes
    )

  @explain_unknown_names
  def step(self, x_BD: Array, state: MixerState) -> tuple[Array, MixerState]:
    """Return y (B, D) of one more token a row, and the state after it."""
    return self._call("step", x_BD, state)


@explain_unknown_names
def lm(
  config: ModelConfig, *, partitioned: bool = False, name: str | None = None
) -> LM:
  """Return the language model as a Linen module.

  Args:
    config: the model's config.
    partitioned: whether `init` returns each parameter in a
      `linen.LogicallyPartitioned` with the names of its axes, which
      `linen.get_partition_spec` reads. `rebased_jax.name_parameter_axes` has
      the names.
    name: name of the module in its parent. None: Linen chooses one, as `LM_0`.
  """
  return LM(config, partitioned=partitioned, name=name)


def load(
  folder: str | os.PathLike[str],
  step: int | None = None,
  *,
  sharding: model_files.Shardings | None = None,
) -> tuple[LM, dict[str, Any]]:
  """Return the model of a folder as a Linen module, and its parameters.

  `module.apply({"params": params}, tokens)` gives its logits. Arguments and
  errors are those of `rebased_jax.load`.
  """
  loaded = model_files.load(folder, step, sharding=sharding)
  params = nnx.to_pure_dict(nnx.state(loaded, nnx.Param))
  return lm(loaded.config), params


@explain_unknown_names
def mixer(
  config: MixerConfig,
  width: int,
  *,
  dtype: DType | None = "float32",
  param_dtype: DType = "float32",
  precision: Precision | None = None,
  kernel_init: nnx.Initializer | None = None,
  partitioned: bool = False,
  name: str | None = None,
) -> Mixer:
  """Return a mixer as a Linen module, to use inside your own modules.

  Args:
    config: the mixer's config.
    width: D, the width of its input and output.
    dtype: the compute dtype. None: `param_dtype`.
    param_dtype: dtype of the parameters.
    precision: of float32 products: "default", "high", "highest" or a
      jax.lax.Precision. None: jax's setting.
    kernel_init: draws the initial kernels of all linear layers. None: the
      distributions of the config.
    partitioned: as in `lm`.
    name: name of the module in its parent. None: Linen chooses one, as
      `Mixer_0`.
  """
  site = Site(
    width,
    dtype=param_dtype if dtype is None else dtype,
    precision=precision,
    param_dtype=param_dtype,
    kernel_init=kernel_init,
  )
  return Mixer(config, site, partitioned=partitioned, name=name)


def _boxed(variable: nnx.Variable) -> Any:
  """Return a variable's value, in a box with the names of its axes."""
  names = variable.get_metadata().get("out_sharding")
  value = variable.get_value()
  return value if names is None else linen.LogicallyPartitioned(value, names)
