"""The weights that a run starts from, if `init_from` names a model.

`init_from` is a run or an exported model. Its weights must fit the run's model,
and mean the same there: the mixers must be of the same classes.
"""

from typing import Any

import jax

from rebased_jax import ModelConfig, WeightsError, model_files
from rebased_jax.config_json import to_dict
from train import compiled_steps
from train.checkpoint.checkpoints import CheckpointError, restore_params
from train.compiled_steps import Built
from train.config import RunConfig
from train.devices import processes
from train.records.run_folder import RunFolder, RunFolderError
from train.trained_model import part_of_state

# Fields that change how the model is computed, or trained, but not what its
# weights mean.
_HARMLESS = (
  *("dropout", "dtype", "param_dtype", "scan_layers", "remat", "precision"),
)
_HARMLESS_IN_MIXER = ("implementation", "initialization", "dropout")


def source_weights(config: RunConfig, built: Built) -> tuple[Any, list[str]]:
  """Return the parameters of `init_from`, and lines about them.

  Args:
    config: the run.
    built: the run on its devices; the parameters go where it has them.

  Raises:
    RunFolderError: `init_from` is neither a run nor an exported model, has no
      checkpoint, has lost its checkpoints, cannot be read, or holds another
      model's parameters.
  """
  source = config.init_from
  assert source is not None
  target = built.abstract.params
  if model_files.is_exported(source):
    return _exported(source, config, target)
  folder = RunFolder(source)
  stored = folder.read_config()
  folder.check_checkpoints()
  notes = compare(source, stored.model, config.model)
  try:
    part = part_of_state(stored, config.init_weights)
    as_stored = _with_dtypes_of(stored.model, target)
    step, params = restore_params(
      folder.checkpoints,
      compiled_steps.to_dicts(as_stored),
      run=folder.run_id(),
      part=part,
    )
  except (CheckpointError, ValueError) as error:
    raise RunFolderError(f"init_from={source}: {error}") from error
  which = f"{config.init_weights} weights" if stored.ema else "weights"
  first = f"{which} of {folder.path}, step {step}; fresh optimiser"
  if stored.ema and config.init_weights == "trained":
    first += "; --init-weights ema takes their average"
  params = compiled_steps.from_dicts(params, as_stored)
  return _cast(params, target), [first, *notes]


def compare(source: str, old: ModelConfig, new: ModelConfig) -> list[str]:
  """Return how two models differ whose weights may fit each other.

  Args:
    source: the name of the old model in messages.
    old: the model that the weights are of.
    new: the model of the run.

  Raises:
    RunFolderError: the models differ in their sizes or classes.
  """
  before, after = _fields(old), _fields(new)
  changed = [
    name
    for name in {**before, **after}
    if before.get(name) != after.get(name) and not _is_harmless(name)
  ]
  if not changed:
    return []
  # Other fields of another class say nothing more.
  others = {x.removesuffix("class") for x in changed if x.endswith(".class")}
  changed = [
    name
    for name in changed
    if name.endswith(".class") or not name.startswith(tuple(others))
  ]
  listed = "; ".join(
    f"{name} is {after.get(name)!r}: expected {before.get(name)!r}"
    for name in changed
  )
  if _mean_the_same(old, new):
    return [f"warning: init_from={source} is of another model: {listed}"]
  options = " ".join(
    f"--{name.replace('_', '-')} {before[name]}"
    for name in changed
    if name in before and not name.endswith(".class")
  )
  raise RunFolderError(
    f"init_from={source} has the weights of another model: {listed}; choose "
    f"the preset of its mixers{options and ', and add ' + options}"
  )


def _exported(
  source: str, config: RunConfig, target: Any
) -> tuple[Any, list[str]]:
  notes, params = [], None
  with processes.all_or_none():
    if config.init_weights != "trained":
      raise RunFolderError(
        f"init_weights={config.init_weights}: {source} is an exported model, "
        "which has one set of weights: expected init_weights=trained, or the "
        "folder of a run in init_from"
      )
    try:
      stored = model_files.read_info(source).config
      notes = compare(source, stored, config.model)
      as_stored = _with_dtypes_of(stored, target)
      params = _cast(model_files.read_parameters(source, as_stored), target)
    except WeightsError as error:
      raise RunFolderError(f"init_from={source}: {error}") from error
  return params, [f"weights of {source}; fresh optimiser", *notes]


def _with_dtypes_of(config: ModelConfig, target: Any) -> Any:
  """Return `target`, a tree of shapes, with the dtypes of a model's weights."""
  return jax.tree.map(
    lambda x, stored: jax.ShapeDtypeStruct(
      x.shape, stored.dtype, sharding=x.sharding
    ),
    target,
    model_files.abstract_lm(config)[1],
  )


def _cast(params: Any, target: Any) -> Any:
  """Return parameters in the dtypes of `target`, where they are."""
  return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), params, target)


def _fields(config: ModelConfig) -> dict[str, Any]:
  """Return the fields of a model's config, and of its mixers' configs."""
  fields = {}
  for name, value in to_dict(config, "model").items():
    inner = value if isinstance(value, dict) else None
    parts = {"": value} if inner is None else {f".{k}": inner[k] for k in inner}
    fields |= {f"model.{name}{part}": x for part, x in parts.items()}
  return fields


def _is_harmless(name: str) -> bool:
  parts = name.split(".")
  return parts[-1] in (_HARMLESS if len(parts) == 2 else _HARMLESS_IN_MIXER)


def _mean_the_same(old: ModelConfig, new: ModelConfig) -> bool:
  """Whether the mixers are of the same classes, and all shapes the same."""
  classes = [(type(x.first), type(x.second), x.block) for x in (old, new)]
  shapes = [
    {name: x.shape for name, x in model_files.parameter_shapes(config).items()}
    for config in (old, new)
  ]
  return classes[0] == classes[1] and shapes[0] == shapes[1]
