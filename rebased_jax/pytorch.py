"""Import checkpoints of PyTorch models.

    model = rebased_jax.pytorch.load("ckpt_best.pth", system="rebased")
    rebased_jax.save(model, "my_model")

Models of the ReBased paper's code and of Zoology are read whole, layers of
flash-linear-attention one by one. `pytorch_names.py` has the names.
"""

from collections.abc import Mapping
import importlib
import os
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rebased_jax import presets, tensor_files
from rebased_jax.mixers import Mixer, MixerConfig, Site
from rebased_jax.model import LM
from rebased_jax.model_files import abstract_lm, by_name
from rebased_jax.presets import System
from rebased_jax.pytorch_names import (
  Arrays,
  convert,
  convert_mixer,
  listed,
  without_wrappers,
)
from rebased_jax.pytorch_sizes import infer_config
from rebased_jax.tensor_files import WeightsError

#: The systems that `load` knows: those of the paper's tables.
SYSTEMS: dict[str, System] = {
  **{name: presets.hybrid(x) for name, x in presets.VARIANTS.items()},
  **presets.SYSTEMS,
}


def load(
  source: str | os.PathLike[str] | Arrays,
  *,
  system: str,
  heads: int | None = None,
) -> LM:
  """Return the model of a PyTorch checkpoint.

  Sizes are read off the arrays. `rebased_jax.save` writes the model.

  Args:
    source: a safetensors file; a folder with model.safetensors or its index; a
      file of `torch.save`, which needs torch and is read without unpickling
      code; or the arrays by name.
    system: the name of the model's mixers, one of `SYSTEMS`. Arrays do not say
      whether a model is Based or x², for example.
    heads: H of the mixers that have heads, which no array says. None: the
      default of the layout; 12, and 16 for FLA's ReBased.

  Raises:
    WeightsError: the file cannot be read, or its arrays are not those of the
      system: the message names the arrays.
    ValueError: there is no such system.
  """
  if system not in SYSTEMS:
    raise ValueError(
      f"system={system!r}: expected one of {tuple(sorted(SYSTEMS))}"
    )
  arrays = without_wrappers(read(source))
  config = infer_config(arrays, SYSTEMS[system], heads)
  graph, abstract = abstract_lm(config)
  params = _fit(convert(arrays, config), abstract)
  return nnx.merge(graph, params)


def load_mixer(
  source: str | os.PathLike[str] | Arrays,
  config: MixerConfig,
  *,
  width: int,
  prefix: str = "",
) -> Mixer:
  """Return one mixer of a PyTorch checkpoint.

  FLA's ReBased is `ReBasedConfig(heads=H, features=F, eps=1e-5,
  norm_scope="head")`.

  Args:
    source: a file, or the arrays by name, as for `load`.
    config: the mixer's config; its sizes must be those of the arrays.
    width: D.
    prefix: what the mixer's arrays begin with, as "layers.3.attn.". Others are
      not read.

  Raises:
    WeightsError: as for `load`.
  """
  arrays = {
    name.removeprefix(prefix): x
    for name, x in read(source).items()
    if name.startswith(prefix)
  }
  mixer = nnx.eval_shape(lambda: config.make(Site(width), rngs=nnx.Rngs(0)))
  graph, _ = nnx.split(mixer)
  abstract = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
  return nnx.merge(graph, _fit(convert_mixer(arrays, config, prefix), abstract))


def read(source: str | os.PathLike[str] | Arrays) -> dict[str, np.ndarray]:
  """Return the arrays of a file or folder by name; of a mapping, a dict.

  Raises:
    WeightsError: the file is missing, damaged, or holds something else, or
      torch is needed and not installed.
  """
  if isinstance(source, Mapping):
    return {name: np.asarray(x) for name, x in source.items()}
  path = Path(source)
  if path.is_dir():
    return tensor_files.read_all(path)
  if not path.is_file():
    raise WeightsError(
      f"{path} is no file: expected a .safetensors file, one of torch.save, or "
      "a folder of Hugging Face's form"
    )
  if path.suffix != ".safetensors":
    return _read_torch(path)
  try:
    return load_file(path)
  except (SafetensorError, OSError) as error:
    raise WeightsError(
      f"{path} cannot be read: {error}: expected a whole safetensors file"
    ) from error


def _fit(found: dict[str, np.ndarray], abstract: Any) -> Any:
  """Return the parameters as nested dicts of jax arrays in float32.

  Raises:
    WeightsError: they are not those of `abstract`, or are not finite.
  """
  wanted = {
    name.replace(".", "/"): x.shape for name, x in by_name(abstract).items()
  }
  faults = [f"{path} is missing" for path in wanted if path not in found]
  faults += [f"{path} is not expected" for path in found if path not in wanted]
  for path, shape in wanted.items():
    if path in found and found[path].shape != shape:
      faults.append(f"{path} has shape {found[path].shape}: expected {shape}")
  if faults:
    raise WeightsError(
      f"the arrays do not fit the model: {listed(faults, '; ')}; are system "
      "and heads those of the checkpoint?"
    )
  for path, x in found.items():
    if not np.isfinite(x).all():
      raise WeightsError(
        f"{path} has values that are not finite: expected finite numbers"
      )
  leaves = [jnp.asarray(np.asarray(found[p], np.float32)) for p in wanted]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
  try:
    torch: Any = importlib.import_module("torch")
  except ImportError as error:
    raise WeightsError(
      f"{path}: a file of torch.save needs the package torch: pip install "
      "torch, or convert it to .safetensors where torch is installed"
    ) from error
  try:
    found = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # noqa: BLE001  # torch raises many kinds
    # The rest of torch's message says how to run the code of the file.
    reason = str(error).partition(". ")[0]
    raise WeightsError(
      f"{path} cannot be read: {reason}: expected a file of "
      "torch.save(model.state_dict()); files with other Python objects are not "
      "read, because that could run their code"
    ) from error
  if isinstance(found, dict) and "state_dict" in found:
    found = found["state_dict"]
  if not isinstance(found, dict) or not all(
    isinstance(x, torch.Tensor) for x in found.values()
  ):
    raise WeightsError(
      f"{path} holds no state_dict: expected tensors by name; save "
      "model.state_dict()"
    )
  return {name: _numpy(torch, x) for name, x in found.items()}


def _numpy(torch: Any, x: Any) -> np.ndarray:
  """Return a tensor as an array; NumPy has no bfloat16."""
  x = x.detach()
  return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
