"""Exported models: a folder that holds a model, for any program.

    config.json            the model's config, and its tokenizer
    model.safetensors      the parameters, or several files; see tensor_files.py
    tokenizer.json         the tokenizer, if it is a file

A parameter's name in the files is its path with dots, as
`pairs.second.mixer.query_affine.gamma`. Parameters of pairs are stacked over
the pairs. docs/weights.md has all names.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from flax import nnx
import jax
from jax.sharding import Sharding

from rebased_jax import atomic, tensor_files
from rebased_jax.config_json import (
  ConfigError,
  from_dict,
  load_json,
  to_dict,
)
from rebased_jax.find_trainer import import_trainer
from rebased_jax.model import LM
from rebased_jax.model_config import ModelConfig
from rebased_jax.processes import failing_together, is_split
from rebased_jax.tensor_files import MAX_FILE_BYTES, WeightsError
from rebased_jax.which_weights import Weights

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
_FORMAT = "rebased-jax model"
_VERSION = 1
#: The sharding of each parameter, given its path with slashes and its shape
#: and dtype; or one sharding for all.
Shardings = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """The tokenizer of an exported model."""

  #: "bytes": UTF-8 bytes. "file": tokenizer.json in the folder.
  type: Literal["bytes", "file"]
  #: The token that ends a document. None: no token does.
  eos: int | None
  #: The SHA-256 of the file, in hexadecimal. None for bytes.
  sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelInfo:
  """The content of an exported model's config.json."""

  config: ModelConfig
  #: None: the model has no tokenizer.
  tokenizer: TokenizerInfo | None


def save(
  model: LM,
  folder: str | os.PathLike[str],
  *,
  tokenizer: str | os.PathLike[str] | None = None,
  eos: int | None = None,
  max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
  """Write a model to a new folder, which appears whole or not at all.

  If the model is split over several processes, all of them call the function.
  Process 0 writes. Each array is gathered on every device in turn.

  Args:
    model: the model. Its arrays may be split over devices.
    folder: a path where nothing is yet, or an empty folder.
    tokenizer: "bytes", or a tokenizer.json, which is copied. None: none.
    eos: the token that ends a document. None: no token does.
    max_file_bytes: the size above which the weights are several files.

  Raises:
    WeightsError: the folder exists, the tokenizer cannot be read, or the model
      cannot be written: it has other parameters than its config makes, values
      that are not finite, or variables that are no parameters.
    ConfigError: the model's config cannot be stored; it needs the classes of
      its mixers at the top of a module.
    OSError: the disk failed.
    OtherProcessFailed: another process raised one of these.
  """
  arrays = _parameters(model)
  together = is_split(arrays.values())
  is_writer = not together or jax.process_index() == 0
  with failing_together(together), contextlib.ExitStack() as files:
    temporary = None
    with failing_together(together):
      if is_writer:
        path = check_new(folder)
        text = None if tokenizer in (None, "bytes") else _read_bytes(tokenizer)
        info = _tokenizer_info(tokenizer, text, eos, model.config.vocab_size)
        data = {
          "format": _FORMAT,
          "version": _VERSION,
          "model": _stored(model.config),
          "tokenizer": None if info is None else dataclasses.asdict(info),
        }
        temporary = _new_folder(path, files)
    tensor_files.write(temporary, arrays, max_file_bytes)
    if temporary is not None:
      if text is not None:
        (temporary / TOKENIZER).write_bytes(text)
      (temporary / CONFIG).write_text(json.dumps(data, indent=2) + "\n")


def load(
  folder: str | os.PathLike[str],
  step: int | Literal["best"] | None = None,
  *,
  weights: Weights = "trained",
  sharding: Shardings | None = None,
) -> LM:
  """Return the model of a folder, in any working directory.

  Reading the config imports the modules of its mixers: load only what you
  trust. No code is in the folder itself.

  Args:
    folder: a folder of `save`, of `rebased export` or of `rebased import`, or
      the folder of a run.
    step: the step of a run's checkpoint. "best" takes the best by the run's
      `keep_best`, or else by the held-out loss. None takes the newest readable
      one.
    weights: "trained", or "ema" for the average that a run with `--ema` keeps.
    sharding: where the parameters go: a sharding for all of them, or a function
      of a parameter's path, as "pairs/second/mixer/project/q/kernel", and of
      its shape and dtype. Parts of an array go straight to their devices. None:
      to one device.

  Raises:
    ValueError: the folder is neither, its config cannot be read, its weights
      do not fit the config (`WeightsError`), or there is no such step.
    RuntimeError: no checkpoint is readable (`train.CheckpointError`).
  """
  if not is_exported(folder):
    with import_trainer() as trainer:
      return trainer.load(folder, step, weights=weights, sharding=sharding)
  for name, value, only in (
    ("step", step, None),
    ("weights", weights, "trained"),
  ):
    if value != only:
      raise ValueError(
        f"{name}={value}: {folder} is an exported model, which has one set of "
        f"weights: expected no {name}, or the folder of a run"
      )
  graph, abstract = abstract_lm(read_info(folder).config, sharding)
  return nnx.merge(graph, read_parameters(folder, abstract))


def check_new(folder: str | os.PathLike[str]) -> Path:
  """Return the path of a folder to write; check that nothing is in it.

  Raises:
    WeightsError: it holds files, is a file, or is not local.
  """
  path = _local(folder)
  if path.is_dir() and any(path.iterdir()):
    raise WeightsError(f"{path} is not empty: expected a new folder")
  if path.exists() and not path.is_dir():
    raise WeightsError(f"{path} is a file: expected a new folder")
  return path


def is_exported(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder is an exported model, and not that of a run."""
  if "://" in str(folder):
    return False
  path = Path(folder)
  try:
    data = json.loads((path / CONFIG).read_text())
  except (OSError, ValueError, RecursionError):
    return tensor_files.is_there(path)
  has_run = isinstance(data, dict) and "run" in data
  return not has_run and (
    tensor_files.is_there(path)
    or (isinstance(data, dict) and data.get("format") == _FORMAT)
  )


def read_info(folder: str | os.PathLike[str]) -> ModelInfo:
  """Return what an exported model's config.json says.

  Raises:
    WeightsError: the file is missing, or is not that of an exported model.
  """
  path = _local(folder) / CONFIG
  try:
    data = load_json(path.read_text())
    kind = data.get("format") if isinstance(data, dict) else None
    if kind != _FORMAT:
      raise ConfigError(
        f"format={kind!r}: expected {_FORMAT!r}, a folder of `rebased export` "
        "or `rebased_jax.save`"
      )
    version = data.get("version")
    if version != _VERSION:
      raise ConfigError(
        f"version={version!r}: expected {_VERSION}; a later rebased-jax may "
        "have written it"
      )
    config = from_dict(data.get("model"), "model")
    if not isinstance(config, ModelConfig):
      raise ConfigError(
        f"model is a {type(config).__name__}: expected rebased_jax:ModelConfig"
      )
    return ModelInfo(config, _read_tokenizer_info(data.get("tokenizer")))
  except (OSError, UnicodeDecodeError, ConfigError, RecursionError) as error:
    reason = getattr(error, "strerror", None) or error
    raise WeightsError(f"{path}: {reason}") from error


def read_parameters(
  folder: str | os.PathLike[str], abstract: Any
) -> dict[str, Any]:
  """Return the parameters of an exported model as nested dicts.

  Args:
    folder: the folder.
    abstract: nested dicts of `jax.ShapeDtypeStruct`, with a sharding or without
      one; see `tensor_files.read`.

  Raises:
    WeightsError: the weights cannot be read, or are not those of `abstract`.
  """
  wanted = by_name(abstract)
  found = tensor_files.read(_local(folder), wanted)
  leaves = [found[name] for name in wanted]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def read_tokenizer(folder: str | os.PathLike[str]) -> bytes:
  """Return the content of an exported model's tokenizer.json.

  Raises:
    WeightsError: it is missing, or is not the one that was exported.
  """
  path = _local(folder) / TOKENIZER
  info = read_info(folder).tokenizer
  text = _read_bytes(path)
  if info is None or hashlib.sha256(text).hexdigest() != info.sha256:
    raise WeightsError(
      f"{path}: it is not the tokenizer of {CONFIG}: expected the file that "
      "was exported with the weights"
    )
  return text


def abstract_lm(
  config: ModelConfig, sharding: Shardings | None = None
) -> tuple[nnx.GraphDef[LM], Any]:
  """Return a model's graph, and its parameters as shapes in nested dicts.

  Args:
    config: the model.
    sharding: that of each parameter; see `load`.
  """
  model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
  graph, _ = nnx.split(model)
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))

  def target(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    plain = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if sharding is None or isinstance(sharding, Sharding):
      placed = sharding
    else:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      placed = sharding(name, plain)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

  return graph, jax.tree_util.tree_map_with_path(target, state)


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shape and dtype of each parameter of a model, by name."""
  return by_name(abstract_lm(config)[1])


def by_name(params: Any) -> dict[str, Any]:
  """Return the leaves of nested dicts by their paths, joined by dots."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _parameters(model: LM) -> dict[str, Any]:
  """Return a model's parameters by name; check that its config makes them."""
  if not isinstance(model, LM):
    raise WeightsError(
      f"model is a {type(model).__name__}: expected a rebased_jax.LM"
    )
  # The keys of dropout are no part of what a model has learned.
  others = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))
  others = by_name(nnx.to_pure_dict(nnx.state(model, others)))
  if others:
    raise WeightsError(
      f"{next(iter(others))} is a variable but no nnx.Param: expected a model "
      "whose variables are all parameters; others are not written"
    )
  found = by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  wanted = parameter_shapes(model.config)
  for name in [*wanted, *found]:
    if name not in found or name not in wanted:
      problem = "is missing" if name not in found else "is not expected"
      raise WeightsError(
        f"{name} {problem}: expected the parameters that the model's config "
        "makes; was the model changed after it was made?"
      )
    if found[name].shape != wanted[name].shape:
      raise WeightsError(
        f"{name} has shape {found[name].shape}: expected {wanted[name].shape}, "
        "as the model's config makes it"
      )
  return found


def _stored(config: ModelConfig) -> Any:
  """Return a config as JSON data that is read back equal."""
  data = to_dict(config, "model")
  if from_dict(json.loads(json.dumps(data)), "model") != config:
    raise ConfigError(
      "model is not the same after it is stored and read: expected frozen "
      "dataclasses that compare their fields and do not change them"
    )
  return data


def _tokenizer_info(
  tokenizer: Any, text: bytes | None, eos: int | None, vocab_size: int
) -> TokenizerInfo | None:
  if tokenizer is None:
    if eos is not None:
      raise WeightsError(f"eos={eos}: expected None without a tokenizer")
    return None
  if eos is not None and not 0 <= eos < vocab_size:
    raise WeightsError(
      f"eos={eos}: expected a token of the model, 0 to {vocab_size - 1}"
    )
  if text is None:
    return TokenizerInfo("bytes", eos)
  return TokenizerInfo("file", eos, hashlib.sha256(text).hexdigest())


def _read_tokenizer_info(data: Any) -> TokenizerInfo | None:
  if data is None:
    return None
  names = [field.name for field in dataclasses.fields(TokenizerInfo)]
  if not isinstance(data, dict) or set(data) != set(names):
    raise ConfigError(f"tokenizer={data!r}: expected null or {names}")
  kind, eos, sha256 = (data[name] for name in names)
  if kind not in ("bytes", "file") or (kind == "file") != isinstance(
    sha256, str
  ):
    raise ConfigError(
      f"tokenizer={data!r}: expected the type 'bytes', or 'file' with a sha256"
    )
  if eos is not None and (type(eos) is not int or eos < 0):
    raise ConfigError(f"tokenizer.eos={eos!r}: expected an integer ≥ 0 or null")
  return TokenizerInfo(kind, eos, sha256)


def _read_bytes(path: Any) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise WeightsError(
      f"tokenizer={str(path)!r}: {error.strerror}: expected 'bytes' or a "
      "tokenizer.json"
    ) from error


def _local(folder: str | os.PathLike[str]) -> Path:
  if "://" in str(folder):
    raise WeightsError(
      f"{folder}: expected a local folder; copy exported models from and to a "
      "bucket"
    )
  return Path(os.path.abspath(folder))


def _new_folder(path: Path, files: contextlib.ExitStack) -> Path:
  """Return a temporary folder that becomes `path` when `files` is closed."""
  try:
    return files.enter_context(atomic.new_folder(path))
  except OSError as error:
    raise WeightsError(f"{path} cannot be made: {error}") from error
