"""Read the config of a model off the arrays of a PyTorch checkpoint.

Arrays say the width, the number of layers and most sizes. They do not say how
many heads there are, nor which similarity they are for.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from rebased_jax.mixers import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  MixerConfig,
  ReBasedConfig,
)
from rebased_jax.mixers.polynomial import PolynomialConfig
from rebased_jax.model_config import ModelConfig
from rebased_jax.presets import System
from rebased_jax.pytorch_names import FILTER, LAYER, MIXER, Arrays
from rebased_jax.tensor_files import WeightsError

# FLA's defaults. Its ReBased normalises each head. The kernel that runs its
# Based by default adds 1e-6.
FLA_HEADS = {ReBasedConfig: 16, BasedConfig: 12}
FLA_EPS = {ReBasedConfig: 1e-5, BasedConfig: 1e-6}


def infer_config(
  arrays: Arrays, system: System, heads: int | None = None
) -> ModelConfig:
  """Return the config of the model whose arrays these are.

  Args:
    arrays: the arrays by name, without what wrappers put before the names.
    system: the mixers, whose sizes are read off the arrays.
    heads: H of the mixers that have heads. None: the layout's default.

  Raises:
    WeightsError: the arrays are not those of such a model.
  """
  table = arrays.get("embeddings.word_embeddings.weight")
  if table is None or table.ndim != 2:
    raise WeightsError(
      "backbone.embeddings.word_embeddings.weight is missing: expected the "
      "state_dict of a language model of the official code or of Zoology; "
      "rebased_jax.pytorch.load_mixer reads single layers"
    )
  vocab_size, width = table.shape
  positions = arrays.get("embeddings.position_embeddings.weight")
  layers = {int(m[1]) for m in map(LAYER.match, arrays) if m}
  count = len(layers)
  if layers != set(range(count)) or count == 0 or count % 2:
    raise WeightsError(
      f"the arrays have the layers {sorted(layers)}: expected an even number, "
      "from 0 on, because mixers come in pairs"
    )
  hidden = arrays.get("layers.0.state_mixer.fc1.weight")
  length = None if positions is None else positions.shape[0]
  first, second = (
    _sized(mixer, _mixer_arrays(arrays, layer), width, heads, length)
    for layer, mixer in enumerate((system.first, system.second))
  )
  return ModelConfig(
    first=first,
    second=second,
    vocab_size=vocab_size,
    width=width,
    pairs=count // 2,
    positions=length,
    mlp_width=None if hidden is None else hidden.shape[0],
    dropout=0.0 if system.block == "mamba" else 0.1,
    block=system.block,
  )


def _mixer_arrays(arrays: Arrays, layer: int) -> dict[str, np.ndarray]:
  """Return the arrays of a layer's mixer by their names inside it."""
  prefix = f"layers.{layer}."
  names = [x.removeprefix(prefix) for x in arrays if x.startswith(prefix)]
  return {
    MIXER.sub("", name): arrays[prefix + name]
    for name in names
    if MIXER.match(name)
  }


def _sized(
  mixer: MixerConfig,
  arrays: Arrays,
  width: int,
  heads: int | None,
  positions: int | None,
) -> MixerConfig:
  """Return a mixer's config with the sizes of the arrays.

  An array that is missing leaves the config as it is; `_fit` names it later.
  """

  def size(name: str, axis: int) -> int | None:
    x = arrays.get(name)
    return x.shape[axis] if x is not None and x.ndim > axis else None

  changes: dict[str, int | str | float | bool | None] = {}
  if isinstance(mixer, PolynomialConfig):
    changes = _polynomial_sizes(mixer, size, width, heads)
  elif isinstance(mixer, AttentionConfig):
    changes = {"heads": heads, "use_bias": "Wqkv.bias" in arrays}
  elif isinstance(mixer, BaseConvConfig):
    changes = {"taps": size("conv.conv.weight", 2)}
  elif isinstance(mixer, MambaConfig):
    rows = size("A_log", 0)
    changes = {
      "state": size("A_log", 1),
      "taps": size("conv1d.weight", 2),
      "expand": None if rows is None else max(rows // width, 1),
    }
  elif isinstance(mixer, HyenaConfig):
    lags = size("filter_fn.pos_emb.z", 1)
    changes = {
      "length": None if lags == positions else lags,
      "taps": size("short_filter.weight", 2),
      "filter_width": size(f"{FILTER}.1.freq", 1),
    }
  given = {name: x for name, x in changes.items() if x is not None}
  return dataclasses.replace(mixer, **given)


def _polynomial_sizes(
  mixer: PolynomialConfig,
  size: Callable[[str, int], int | None],
  width: int,
  heads: int | None,
) -> dict[str, Any]:
  is_fla = size("q_proj.weight", 0) is not None
  H = heads or (FLA_HEADS[type(mixer)] if is_fla else mixer.heads)
  queries, values = (
    size(f"{x}_proj.weight" if is_fla else f"proj_{x}.weight", 0) for x in "qv"
  )
  for name, rows in (("queries", queries), ("values", values)):
    if rows is not None and rows % H:
      raise WeightsError(
        f"heads={H}: the {name} have {rows} features: expected a divisor"
      )
  changes: dict[str, Any] = {"heads": H}
  if queries is not None:
    changes["features"] = queries // H
  # Where the heads do not divide the width, the floor is what the arrays have.
  # The mixer needs no warning of it then.
  is_default = values == width or (not is_fla and values == width // H * H)
  if values is not None and not is_default:
    changes["value_features"] = values // H
  if is_fla:
    changes["eps"] = FLA_EPS[type(mixer)]
    if isinstance(mixer, ReBasedConfig):
      changes["norm_scope"] = "head"
  return changes
