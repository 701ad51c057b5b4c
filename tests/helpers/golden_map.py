"""The official models' parameter names, as paths and layouts of our `LM`."""

from collections.abc import Callable
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rebased_jax import LM

Layout = Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _linear(x: np.ndarray) -> np.ndarray:
  return x.T  # (out, in) → (in, out)


def _taps(x: np.ndarray) -> np.ndarray:
  return x[:, 0].T  # (D, 1, K) → (K, D)


def _flat(x: np.ndarray) -> np.ndarray:
  return x.reshape(-1)  # (1, 1, D) → (D,)


def _first(x: np.ndarray) -> np.ndarray:
  return x[0]  # (1, …) → (…)


def _weight_and_bias(official: str, path: str) -> dict[str, tuple[str, Layout]]:
  return {
    f"{official}.weight": (f"{path}/kernel", _linear),
    f"{official}.bias": (f"{path}/bias", _same),
  }


#: Outside of the layers: official name → our path and layout.
_MODEL: dict[str, tuple[str, Layout]] = {
  "embeddings.word_embeddings.weight": ("token_embedding", _same),
  "embeddings.position_embeddings.weight": ("position_embedding", _same),
  "ln_f.weight": ("norm/scale", _same),
  "ln_f.bias": ("norm/bias", _same),
}

#: Inside a layer: official name without `_LAYER` → our path in a block, and
#: layout.
_BLOCK: dict[str, tuple[str, Layout]] = {
  "norm1.weight": ("norm1/scale", _same),
  "norm1.bias": ("norm1/bias", _same),
  "norm2.weight": ("norm2/scale", _same),
  "norm2.bias": ("norm2/bias", _same),
  "norm.weight": ("norm1/scale", _same),  # Mamba's block has one norm
  # The short convolution.
  **_weight_and_bias("projection", "mixer/gate"),
  "conv.conv.weight": ("mixer/kernel", _taps),
  "conv.conv.bias": ("mixer/bias", _same),
  # Based and ReBased. With a norm, γ and β are those of PyTorch's LayerNorm,
  # else of a module that the official code has for them.
  **{
    f"proj_{x}.weight": (f"mixer/project/{x}/kernel", _linear) for x in "qkvo"
  },
  "ln_q.weight": ("mixer/query_affine/gamma", _same),
  "ln_q.bias": ("mixer/query_affine/beta", _same),
  "ln_q.gamma": ("mixer/query_affine/gamma", _same),
  "ln_q.beta": ("mixer/query_affine/beta", _same),
  "ln_k.weight": ("mixer/key_affine/gamma", _same),
  "ln_k.bias": ("mixer/key_affine/beta", _same),
  "ln_k.gamma": ("mixer/key_affine/gamma", _same),
  "ln_k.beta": ("mixer/key_affine/beta", _same),
  # Softmax attention.
  **_weight_and_bias("Wqkv", "mixer/qkv"),
  # Softmax attention, Mamba and Hyena.
  **_weight_and_bias("out_proj", "mixer/out_proj"),
  # RWKV.
  "time_decay": ("mixer/decay", _same),
  "time_first": ("mixer/first", _same),
  **{f"time_mix_{x}": (f"mixer/mix_{x}", _flat) for x in "kvr"},
  "key.weight": ("mixer/k/kernel", _linear),
  "value.weight": ("mixer/v/kernel", _linear),
  "receptance.weight": ("mixer/r/kernel", _linear),
  "output.weight": ("mixer/o/kernel", _linear),
  # Mamba, whose in_proj `ours` splits in two.
  "A_log": ("mixer/A_log", _same),
  "D": ("mixer/D", _same),
  "conv1d.weight": ("mixer/conv/kernel", _taps),
  "conv1d.bias": ("mixer/conv/bias", _same),
  "x_proj.weight": ("mixer/x_proj/kernel", _linear),
  **_weight_and_bias("dt_proj", "mixer/dt_proj"),
  # Hyena.
  **_weight_and_bias("in_proj", "mixer/in_proj"),
  "short_filter.weight": ("mixer/conv/kernel", _taps),
  "short_filter.bias": ("mixer/conv/bias", _same),
  "filter_fn.bias": ("mixer/bias", _same),
  "filter_fn.pos_emb.z": ("mixer/filter/z", _first),
  "filter_fn.implicit_filter.1.freq": ("mixer/filter/frequency", _first),
  **_weight_and_bias("filter_fn.implicit_filter.0", "mixer/filter/layers/0"),
  **_weight_and_bias("filter_fn.implicit_filter.2", "mixer/filter/layers/1"),
  **_weight_and_bias("filter_fn.implicit_filter.4", "mixer/filter/layers/2"),
  "filter_fn.implicit_filter.6.weight": (
    "mixer/filter/layers/3/kernel",
    _linear,
  ),
}

#: "layers.0.sequence_mixer.mixer." and its shorter forms, before the names of a
#: layer's norms and mixer.
_LAYER = re.compile(r"^layers\.([01])\.((sequence_)?mixer\.)?(mixer\.)?")


def ours(golden: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
  """Return the arrays "kind/NAME" of a golden file, by our paths and layouts.

  Args:
    golden: the arrays of the file.
    kind: "param" or "grad".
  """
  found: dict[str, np.ndarray] = {}
  prefix = f"{kind}/backbone."
  for key, value in golden.items():
    if key.startswith(prefix):
      for path, x in _ours(key.removeprefix(prefix), value):
        assert path not in found
        found[path] = x
  return found


def _ours(name: str, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """Return our paths of an official array, and the arrays."""
  if name in _MODEL:
    path, layout = _MODEL[name]
    return [(path, layout(x))]
  match = _LAYER.match(name)
  assert match is not None, name
  pair = "pairs/" + ("first", "second")[int(match[1])]
  if match[3] is None and match[2] and name.endswith(".in_proj.weight"):
    # Mamba projects x and its gate z at once.
    x_rows, z_rows = np.split(x, 2)
    return [
      (f"{pair}/mixer/in_proj/kernel", _linear(x_rows)[None]),
      (f"{pair}/mixer/gate_proj/kernel", _linear(z_rows)[None]),
    ]
  path, layout = _BLOCK[name[match.end() :]]
  return [(f"{pair}/{path}", layout(x)[None])]  # [None]: one pair


def unused_names(names: set[str]) -> set[str]:
  """Return the names of the tables that are not among official names."""
  short = {_LAYER.sub("", name) for name in names}
  return (_MODEL.keys() | _BLOCK.keys()) - short


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
