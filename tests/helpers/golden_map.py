"""The official models' parameter names, as paths and layouts of our `LM`."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rebased_jax import LM

# An official array → ours. Those of blocks gain the axis of the pairs.
_SAME = lambda x: x
_STACKED = lambda x: x[None]
_LINEAR = lambda x: x.T[None]  # (out, in) → (1, in, out)
_TAPS = lambda x: x[:, 0].T[None]  # (d, 1, 3) → (1, 3, d)

_CONV = "layers.0.sequence_mixer.mixer."
_MIXER = "layers.1.sequence_mixer.mixer."
TABLE = {
  "embeddings.word_embeddings.weight": ("token_embedding", _SAME),
  "embeddings.position_embeddings.weight": ("position_embedding", _SAME),
  "ln_f.weight": ("norm/scale", _SAME),
  "ln_f.bias": ("norm/bias", _SAME),
  _CONV + "projection.weight": ("pairs/first/mixer/gate/kernel", _LINEAR),
  _CONV + "projection.bias": ("pairs/first/mixer/gate/bias", _STACKED),
  _CONV + "conv.conv.weight": ("pairs/first/mixer/kernel", _TAPS),
  _CONV + "conv.conv.bias": ("pairs/first/mixer/bias", _STACKED),
}
for _layer, _block in ((0, "first"), (1, "second")):
  for _norm in ("norm1", "norm2"):
    _names = f"layers.{_layer}.{_norm}.", f"pairs/{_block}/{_norm}/"
    TABLE[_names[0] + "weight"] = (_names[1] + "scale", _STACKED)
    TABLE[_names[0] + "bias"] = (_names[1] + "bias", _STACKED)
for _x in "qkvo":
  TABLE[_MIXER + f"proj_{_x}.weight"] = (
    f"pairs/second/mixer/project/{_x}/kernel",
    _LINEAR,
  )
for _x, _side in (("q", "query"), ("k", "key")):
  _path = f"pairs/second/mixer/{_side}_affine/"
  # With a norm it is PyTorch's LayerNorm, without one a module of their own.
  TABLE[_MIXER + f"ln_{_x}.weight"] = (_path + "gamma", _STACKED)
  TABLE[_MIXER + f"ln_{_x}.bias"] = (_path + "beta", _STACKED)
  TABLE[_MIXER + f"ln_{_x}.gamma"] = (_path + "gamma", _STACKED)
  TABLE[_MIXER + f"ln_{_x}.beta"] = (_path + "beta", _STACKED)
# Where both layers have the same mixer, its names have no ".mixer".
for _prefix, _block in (
  ("layers.0.sequence_mixer.", "first"),
  ("layers.1.sequence_mixer.", "second"),
  (_MIXER, "second"),
):
  for _name, _path in (("Wqkv.", "qkv/"), ("out_proj.", "out_proj/")):
    _path = f"pairs/{_block}/mixer/{_path}"
    TABLE[_prefix + _name + "weight"] = (_path + "kernel", _LINEAR)
    TABLE[_prefix + _name + "bias"] = (_path + "bias", _STACKED)


def ours(golden: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
  """The arrays "kind/NAME" of a golden file, by our paths, in our layout."""
  found = {}
  for key, value in golden.items():
    if key.startswith(f"{kind}/backbone."):
      path, layout = TABLE[key.removeprefix(f"{kind}/backbone.")]
      assert path not in found
      found[path] = layout(value)
  return found


def flat(params) -> dict[str, jax.Array]:
  """The arrays of an `nnx.State`, or a gradient of one, by path."""
  pairs = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf for path, leaf in pairs}


def load(model: LM, arrays: dict[str, np.ndarray], dtype: str):
  """(graph, params) of the model with these arrays as its parameters."""
  graph, params = nnx.split(model)
  before = flat(params)
  assert before.keys() == arrays.keys()
  for path, value in arrays.items():
    assert before[path].shape == value.shape, path
  leaves = [jnp.asarray(arrays[path], dtype) for path in before]
  return graph, jax.tree.unflatten(jax.tree.structure(params), leaves)
