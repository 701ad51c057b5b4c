"""The golden arrays of the official models, as parameters of our `LM`."""

import functools
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rebased_jax import LM, ModelConfig, pytorch_names

# The golden files of the paper's kernels, which follow the short convolution,
# and the names of these kernels among the presets.
KERNELS = {
  "rebased": "rebased",
  "rebased_gx": "gamma",
  "rebased_gxb": "gamma-beta",
  "rebased_x2": "x2",
  "based": "based",
}
# The golden files of other systems, and their names among the presets.
SYSTEMS = {
  "attention": "attention",
  "conv_attention": "conv-attention",
  "rwkv": "rwkv",
  "conv_rwkv": "conv-rwkv",
  "mamba": "mamba",
  "hyena": "hyena",
  "double_based": "double-based",
  "double_rebased": "double-rebased",
}
_DIRECTORY = Path(__file__).parents[1] / "golden"


@functools.cache
def read(name: str) -> dict[str, np.ndarray]:
  """Return the arrays of a golden file by name; do not change them."""
  with np.load(_DIRECTORY / f"{name}.npz") as file:
    return dict(file)


def ours(
  golden: dict[str, np.ndarray], kind: str, config: ModelConfig
) -> dict[str, np.ndarray]:
  """Return the arrays "kind/NAME" of a golden file, by our paths and layouts.

  Args:
    golden: the arrays of the file.
    kind: "param" or "grad".
    config: the model.
  """
  return pytorch_names.convert(official(golden, kind), config)


def official(golden: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
  """Return the arrays "kind/NAME" of a golden file by their official names.

  (γx)² has a β that it never uses. In the official code it stays 0; in the
  golden file it was moved like all other parameters, so it is left out.
  """
  names = {x.removeprefix(f"{kind}/") for x in golden if x.startswith(kind)}
  has_norm = any(".ln_q.weight" in name for name in names)
  unused = {
    name
    for name in names
    if not has_norm and ".beta" in name and not golden[f"grad/{name}"].any()
  }
  return {name: golden[f"{kind}/{name}"] for name in sorted(names - unused)}


def flat(params) -> dict[str, jax.Array]:
  """Return the arrays of an `nnx.State`, or of a gradient of one, by path."""
  pairs = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf for path, leaf in pairs}


def load(model: LM, arrays: dict[str, np.ndarray], dtype: str):
  """Return (graph, params) of the model with these arrays as its parameters."""
  graph, params = nnx.split(model)
  before = flat(params)
  assert before.keys() == arrays.keys()
  for path, value in arrays.items():
    assert before[path].shape == value.shape, path
  leaves = [jnp.asarray(arrays[path], dtype) for path in before]
  return graph, jax.tree.unflatten(jax.tree.structure(params), leaves)
