"""What ReBased's γ and β are, layer by layer, as in the paper's Figure 10."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np


def statistics(params: Any) -> dict[str, Array]:
  """Mean and standard deviation of every γ and β, (pairs,) each.

  Keys are the parameter's path under `pairs`, a colon, and mean or std.
  """
  found = {}
  for path, x_NE in jax.tree_util.tree_leaves_with_path(
    params.get("pairs", {})
  ):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith(("/gamma", "/beta")):
      found[f"{name}:mean"] = x_NE.mean(axis=1)
      found[f"{name}:std"] = jnp.std(x_NE, axis=1)
  return found


def by_layer(metrics: dict[str, np.ndarray]) -> dict[str, float]:
  """Metrics as plain numbers, those of `statistics` by layer.

  `mixer/mixer/query_affine/gamma:mean` (pairs,) becomes
  `layer1/query_gamma_mean`, `layer3/query_gamma_mean`, …: layers count from 0,
  and a pair has two.
  """
  flat = {}
  for name, value in metrics.items():
    path, _, kind = name.partition(":")
    if not kind:
      flat[name] = float(value)
      continue
    block, *_, side, which = path.split("/")
    label = f"{side.removesuffix('_affine')}_{which}_{kind}"
    for pair, x in enumerate(value):
      flat[f"layer{2 * pair + (block == 'mixer')}/{label}"] = float(x)
  return flat
