"""The names of PyTorch's arrays, and what they are among our parameters.

    convolution   (D, 1, K)    →   (K, D)
    linear layer  (out, in)    →   (in, out)

Two layouts are known. The official one is that of the ReBased paper's code
(corl-team/rebased) and of Zoology, which it was made from. FLA's is that of the
layers ReBased and Based of flash-linear-attention. Their names differ, so one
table holds both:

    backbone.layers.1.sequence_mixer.mixer.proj_q.weight
             ⎣ LAYER ⎦⎣       MIXER      ⎦ ⎣  a row    ⎦

is pairs/second/mixer/project/q/kernel, at the first pair.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import re
from typing import NamedTuple

import numpy as np

from rebased_jax.mixers import (
  AttentionConfig,
  BaseConvConfig,
  HyenaConfig,
  MambaConfig,
  MixerConfig,
  ReBasedConfig,
  RWKVConfig,
)
from rebased_jax.mixers.hyena import FAST, SLOW, TARGET
from rebased_jax.mixers.polynomial import PolynomialConfig
from rebased_jax.model_config import ModelConfig
from rebased_jax.tensor_files import WeightsError

Arrays = Mapping[str, np.ndarray]


def _same(x: np.ndarray, heads: int) -> list[np.ndarray]:
  del heads
  return [x]


def _linear(x: np.ndarray, heads: int) -> list[np.ndarray]:
  del heads
  return [x.T]  # (out, in) → (in, out)


def _two_linear(x: np.ndarray, heads: int) -> list[np.ndarray]:
  del heads
  return np.split(x.T, 2, axis=-1)  # one product for two projections


def _taps(x: np.ndarray, heads: int) -> list[np.ndarray]:
  del heads
  return [x[:, 0].T]  # (D, 1, K) → (K, D)


def _flat(x: np.ndarray, heads: int) -> list[np.ndarray]:
  del heads
  return [x.reshape(-1)]  # (1, 1, D) → (D,)


def _first(x: np.ndarray, heads: int) -> list[np.ndarray]:
  del heads
  return [x[0]]  # (1, …) → (…)


def _each_head(x: np.ndarray, heads: int) -> list[np.ndarray]:
  repeated = np.tile(x, heads)  # (F,) → (H·F,)
  return [repeated, repeated]  # for queries and for keys


class Row(NamedTuple):
  """A row of the table: one array of PyTorch, and what becomes of it."""

  #: The name in PyTorch, inside its layer.
  name: str
  #: The paths of our parameters, inside the block or the mixer.
  paths: tuple[str, ...]
  #: Makes an array for each path, given the array and the number of heads.
  layout: Callable[[np.ndarray, int], Sequence[np.ndarray]] = _same


class Repeat(NamedTuple):
  """An array that must be equal to another one."""

  name: str
  of: str


class Constant(NamedTuple):
  """An array that is no parameter of ours: it must have these values."""

  name: str
  make: Callable[[int], np.ndarray]  # from the length of the last axis but one


def _layer(name: str, path: str) -> tuple[Row, Row]:
  """Return the rows of a linear layer with a bias."""
  return (
    Row(f"{name}.weight", (f"{path}/kernel",), _linear),
    Row(f"{name}.bias", (f"{path}/bias",)),
  )


#: Arrays outside the layers, after "backbone.".
MODEL = (
  Row("embeddings.word_embeddings.weight", ("token_embedding",)),
  Row("embeddings.position_embeddings.weight", ("position_embedding",)),
  Row("ln_f.weight", ("norm/scale",)),
  Row("ln_f.bias", ("norm/bias",)),
  Repeat("lm_head.weight", "embeddings.word_embeddings.weight"),
)

#: Arrays of a block outside its mixer, after "layers.N.".
BLOCK = (
  Row("norm1.weight", ("norm1/scale",)),
  Row("norm1.bias", ("norm1/bias",)),
  Row("norm2.weight", ("norm2/scale",)),
  Row("norm2.bias", ("norm2/bias",)),
  Row("norm.weight", ("norm1/scale",)),  # Mamba's block has one norm
  *_layer("state_mixer.fc1", "mlp/up"),
  *_layer("state_mixer.fc2", "mlp/down"),
)

FILTER = "filter_fn.implicit_filter"
#: Arrays of each mixer, after "sequence_mixer.", "mixer." or both.
MIXERS: dict[type[MixerConfig], tuple[Row | Repeat | Constant, ...]] = {
  BaseConvConfig: (
    *_layer("projection", "gate"),
    Row("conv.conv.weight", ("kernel",), _taps),
    Row("conv.conv.bias", ("bias",)),
  ),
  PolynomialConfig: (
    *(
      Row(f"proj_{x}.weight", (f"project/{x}/kernel",), _linear) for x in "qkvo"
    ),
    # With a norm γ and β are PyTorch's LayerNorm, else a module of the code.
    Row("ln_q.weight", ("query_affine/gamma",)),
    Row("ln_q.bias", ("query_affine/beta",)),
    Row("ln_q.gamma", ("query_affine/gamma",)),
    Row("ln_q.beta", ("query_affine/beta",)),
    Row("ln_k.weight", ("key_affine/gamma",)),
    Row("ln_k.bias", ("key_affine/beta",)),
    Row("ln_k.gamma", ("key_affine/gamma",)),
    Row("ln_k.beta", ("key_affine/beta",)),
    # FLA: one γ and β for queries, keys and all heads.
    *(
      Row(f"{x}_proj.weight", (f"project/{x}/kernel",), _linear) for x in "qkvo"
    ),
    Row(
      "feature_map.gamma",
      ("query_affine/gamma", "key_affine/gamma"),
      _each_head,
    ),
    Row(
      "feature_map.beta", ("query_affine/beta", "key_affine/beta"), _each_head
    ),
  ),
  AttentionConfig: (*_layer("Wqkv", "qkv"), *_layer("out_proj", "out_proj")),
  RWKVConfig: (
    Row("time_decay", ("decay",)),
    Row("time_first", ("first",)),
    *(Row(f"time_mix_{x}", (f"mix_{x}",), _flat) for x in "kvr"),
    Row("key.weight", ("k/kernel",), _linear),
    Row("value.weight", ("v/kernel",), _linear),
    Row("receptance.weight", ("r/kernel",), _linear),
    Row("output.weight", ("o/kernel",), _linear),
  ),
  MambaConfig: (
    # The input and its gate are projected at once.
    Row("in_proj.weight", ("in_proj/kernel", "gate_proj/kernel"), _two_linear),
    Row("A_log", ("A_log",)),
    Row("D", ("D",)),
    Row("conv1d.weight", ("conv/kernel",), _taps),
    Row("conv1d.bias", ("conv/bias",)),
    Row("x_proj.weight", ("x_proj/kernel",), _linear),
    *_layer("dt_proj", "dt_proj"),
    Row("out_proj.weight", ("out_proj/kernel",), _linear),
  ),
  HyenaConfig: (
    *_layer("in_proj", "in_proj"),
    *_layer("out_proj", "out_proj"),
    Row("short_filter.weight", ("conv/kernel",), _taps),
    Row("short_filter.bias", ("conv/bias",)),
    Row("filter_fn.bias", ("bias",)),
    Row("filter_fn.pos_emb.z", ("filter/z",), _first),
    *_layer(f"{FILTER}.0", "filter/layers/0"),
    *_layer(f"{FILTER}.2", "filter/layers/1"),
    *_layer(f"{FILTER}.4", "filter/layers/2"),
    Row(f"{FILTER}.6.weight", ("filter/layers/3/kernel",), _linear),
    # One frequency serves three layers.
    Row(f"{FILTER}.1.freq", ("filter/frequency",), _first),
    Repeat(f"{FILTER}.3.freq", f"{FILTER}.1.freq"),
    Repeat(f"{FILTER}.5.freq", f"{FILTER}.1.freq"),
    Constant("filter_fn.pos_emb.t", lambda size: np.linspace(0, 1, size)),
    Constant(
      "filter_fn.modulation.deltas",
      lambda size: np.linspace(
        math.log(TARGET) / SLOW, math.log(TARGET) / FAST, size
      ),
    ),
  ),
}

# What wrappers and containers put before the names.
WRAPPERS = re.compile(r"^((module|_orig_mod|model)\.)*(backbone\.)?")
LAYER = re.compile(r"^layers\.(\d+)\.")
MIXER = re.compile(r"^(sequence_mixer\.|mixer\.)(mixer\.)?")
_MOST_LISTED = 8


def convert(arrays: Arrays, config: ModelConfig) -> dict[str, np.ndarray]:
  """Return our parameters by path, in our layouts and the arrays' dtypes.

  It also converts gradients. Shapes are not compared with the config's.

  Args:
    arrays: arrays by their PyTorch names.
    config: the model.

  Raises:
    WeightsError: an array has no place in the model, or an array that must be
      equal to another one, or to a constant, is not.
  """
  outside, layers = {}, {}
  for name, x in without_wrappers(arrays).items():
    match = LAYER.match(name)
    if match is None:
      outside[name] = x
    else:
      layers.setdefault(int(match[1]), {})[name[match.end() :]] = x
  if set(layers) != set(range(config.layers)):
    raise WeightsError(
      f"the arrays have the layers {sorted(layers)}: expected 0 to "
      f"{config.layers - 1}"
    )
  found = _apply(MODEL, outside, "")
  stacks: dict[str, list[np.ndarray]] = {}
  for layer in range(config.layers):
    place = "second" if layer % 2 else "first"
    for path, x in _convert_layer(
      layers[layer], getattr(config, place), f"layers.{layer}."
    ).items():
      stacks.setdefault(f"pairs/{place}/{path}", []).append(x)
  for path, parts in stacks.items():
    shapes = {x.shape for x in parts}
    if len(parts) != config.pairs or len(shapes) > 1:
      raise WeightsError(
        f"{path} is in {len(parts)} layers, with the shapes {shapes}: expected "
        f"one shape in all {config.pairs}"
      )
    found[path] = np.stack(parts)
  return found


def convert_mixer(
  arrays: Arrays, config: MixerConfig, prefix: str = ""
) -> dict[str, np.ndarray]:
  """Return a mixer's parameters by path, as `convert` does for a model.

  Args:
    arrays: arrays by their PyTorch names inside the layer.
    config: the mixer.
    prefix: what messages put before the names.
  """
  rows = next((r for kind, r in MIXERS.items() if isinstance(config, kind)), ())
  used = {
    name: x
    for name, x in arrays.items()
    if not _is_unused(name, x, config, prefix)
  }
  return _apply(rows, used, prefix, getattr(config, "heads", 1))


def _convert_layer(
  arrays: Arrays, mixer: MixerConfig, prefix: str
) -> dict[str, np.ndarray]:
  inside = {name: x for name, x in arrays.items() if MIXER.match(name)}
  block = {name: x for name, x in arrays.items() if name not in inside}
  short = {MIXER.sub("", name): x for name, x in inside.items()}
  found = convert_mixer(short, mixer, prefix)
  return {
    **_apply(BLOCK, block, prefix),
    **{f"mixer/{path}": x for path, x in found.items()},
  }


def _is_unused(
  name: str, x: np.ndarray, config: MixerConfig, prefix: str
) -> bool:
  """Whether an array is the β that the official (γx)² has and never uses."""
  if name not in ("ln_q.beta", "ln_k.beta"):
    return False
  if not isinstance(config, ReBasedConfig) or config.use_beta:
    return False
  if x.any():
    raise WeightsError(
      f"{prefix}{name} is not 0: expected 0, because the system has no β; is "
      "it gamma-beta?"
    )
  return True


def _apply(
  rows: Iterable[Row | Repeat | Constant],
  arrays: Arrays,
  prefix: str,
  heads: int = 1,
) -> dict[str, np.ndarray]:
  """Return the parameters that the rows make of arrays, by path."""
  by_row = {row.name: row for row in rows}
  unknown = [name for name in arrays if name not in by_row]
  if unknown:
    raise WeightsError(
      f"{listed(prefix + name for name in unknown)}: not expected: the model "
      "has no such array; is it of another system?"
    )
  found: dict[str, np.ndarray] = {}
  for name, x in arrays.items():
    row = by_row[name]
    if isinstance(row, Repeat):
      _check_repeat(arrays, row, prefix)
      continue
    if isinstance(row, Constant):
      _check_constant(x, row, prefix)
      continue
    try:
      made = row.layout(x, heads)
    except (IndexError, ValueError) as error:
      raise WeightsError(
        f"{prefix}{name} has shape {x.shape}: {error}: expected the layout of "
        "PyTorch's layers"
      ) from error
    for path, y in zip(row.paths, made, strict=True):
      if path in found:
        raise WeightsError(
          f"{prefix}{name}: there is another array for {path}: expected the "
          "names of one layout"
        )
      found[path] = y
  return found


def _check_repeat(arrays: Arrays, row: Repeat, prefix: str) -> None:
  other = arrays.get(row.of)
  if other is None or not np.array_equal(arrays[row.name], other):
    raise WeightsError(
      f"{prefix}{row.name} differs from {row.of}: expected the same array, "
      "which the model uses for both"
    )


def _check_constant(x: np.ndarray, row: Constant, prefix: str) -> None:
  # float32 numbers of PyTorch's linspace.
  if not np.allclose(x.reshape(-1), row.make(x.size), rtol=1e-5, atol=1e-6):
    raise WeightsError(
      f"{prefix}{row.name} has other values than our Hyena's constants: "
      "expected those of the official code"
    )


def without_wrappers(arrays: Arrays) -> dict[str, np.ndarray]:
  """Return arrays by names without "module.", "backbone." and the like."""
  found: dict[str, np.ndarray] = {}
  for name, x in arrays.items():
    short = WRAPPERS.sub("", name)
    if short in found:
      raise WeightsError(f"{name}: there are two arrays of the name {short}")
    found[short] = x
  return found


def listed(texts: Iterable[str], separator: str = ", ") -> str:
  """Return texts joined; of many, the first ones and how many more."""
  texts = list(texts)
  more = len(texts) - _MOST_LISTED
  listed = separator.join(texts[:_MOST_LISTED])
  return listed + (f"{separator}and {more} more" if more > 0 else "")
