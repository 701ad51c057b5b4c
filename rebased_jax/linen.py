"""Flax Linen versions of the same modules, with the same parameter names.

    lm = rebased_jax.linen.lm(config)
    params = lm.init(jax.random.key(0), tokens)["params"]
    logits = lm.apply({"params": params}, tokens)

A trained model is loaded as `lm, params = rebased_jax.linen.load(folder)`. The
parameters are those of the NNX modules, `nnx.to_pure_dict` of their state,
so that either kind of module can use what the other has trained.
"""

import os
from typing import Any

from flax import linen, nnx

from rebased_jax import model_files
from rebased_jax.config_checks import DType, Precision
from rebased_jax.mixers.base import Mixer, MixerConfig, Site
from rebased_jax.model import LM
from rebased_jax.model_config import ModelConfig
from rebased_jax.parameter_axes import name_parameter_axes


def lm(
  config: ModelConfig, *, partitioned: bool = False, name: str | None = None
) -> linen.Module:
  """Return the language model as a Linen module.

  Args:
    config: the model's config.
    partitioned: whether `init` returns each parameter in a
      `linen.LogicallyPartitioned` with the names of its axes, which
      `linen.get_partition_spec` reads. `rebased_jax.name_parameter_axes` has
      the names.
    name: name of the module in its parent. None: Linen chooses one.
  """
  return _to_linen(LM, config, partitioned=partitioned, name=name)


def load(
  folder: str | os.PathLike[str],
  step: int | None = None,
  *,
  sharding: model_files.Shardings | None = None,
) -> tuple[linen.Module, dict[str, Any]]:
  """Return the model of a folder as a Linen module, and its parameters.

  `module.apply({"params": params}, tokens)` gives its logits. Arguments and
  errors are those of `rebased_jax.load`.
  """
  model = model_files.load(folder, step, sharding=sharding)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return lm(model.config), params


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
) -> linen.Module:
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
    name: name of the module in its parent. None: Linen chooses one.
  """
  site = Site(
    width,
    dtype=param_dtype if dtype is None else dtype,
    precision=precision,
    param_dtype=param_dtype,
    kernel_init=kernel_init,
  )
  return _to_linen(_make, config, site, partitioned=partitioned, name=name)


def _make(config: MixerConfig, site: Site, *, rngs: nnx.Rngs) -> Mixer:
  return config.make(site, rngs=rngs)


def _to_linen(make, *arguments, partitioned: bool, name: str | None):
  """Return the module that `make` makes as a Linen module."""
  if not partitioned:
    return nnx.bridge.to_linen(make, *arguments, name=name)
  return nnx.bridge.to_linen(
    _make_named, make, *arguments, metadata_fn=_boxed, name=name
  )


def _make_named(make, *arguments, rngs: nnx.Rngs) -> nnx.Module:
  return name_parameter_axes(make(*arguments, rngs=rngs))


def _boxed(variable: nnx.Variable) -> Any:
  """Return a variable's value, in a box with the names of its axes."""
  names = variable.get_metadata().get("out_sharding")
  value = variable.get_value()
  return value if names is None else linen.LogicallyPartitioned(value, names)
