"""Arguments that several verbs share: the preset, the run, the mesh."""

import dataclasses
import itertools
import os
from typing import Annotated, Any, Literal, TypeVar

from etils import epath
import tyro

from rebased_jax import ModelConfig
from rebased_jax.presets import SYSTEMS
from train.commands.parsing import naming_options, option_names, parse
from train.config import DataConfig, RunConfig, TextData
from train.presets import make_presets, with_system
from train.records.run_folder import RunFolder
from train.stored_config import ConfigError, from_json

#: A positional argument: the folder of a run.
RunArg = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

_MIXER = "--model.mixer"
#: The option `--model.mixer`, which names a system of `rebased_jax.presets`.
SystemArg = Annotated[
  Literal[
    "attention",
    "conv-attention",
    "rwkv",
    "conv-rwkv",
    "mamba",
    "based",
    "rebased",
    "double-based",
    "double-rebased",
    "hyena",
    "conv-hyena",
  ]
  | None,
  tyro.conf.arg(name=_MIXER.lstrip("-")),
]


#: The option `--step`; `train.best_checkpoint.find` gives the number.
StepArg = int | Literal["best"] | None


@dataclasses.dataclass(frozen=True)
class DataPlaces:
  """The places of a run's data, if it was moved."""

  #: The data sets, as many as the run has. Empty: where the run had them.
  path: tuple[str, ...] = ()
  #: The data sets to evaluate on, as many as the run has. Empty: where the run
  #: had them.
  eval_path: tuple[str, ...] = ()
  #: The folder of cached row plans. None: with resume the run's, with evaluate
  #: ~/.cache/rebased_jax/plans.
  cache_dir: str | None = None


_Args = TypeVar("_Args", bound=Any)


def parse_preset(
  kind: type[_Args], verb: str, args: list[str]
) -> tuple[str, _Args]:
  """Parse the arguments of a verb that takes a preset and changes its fields.

  Args:
    kind: a dataclass whose first field `run` is the RunConfig. It may have a
      field of the type `SystemArg`, too.
    verb: the name of the verb.
    args: the arguments after the verb. The command has found the preset, the
      first of them, in the catalogue. `--config FILE` stands instead of it.

  Returns:
    The name of the preset, or of the file's folder, and the parsed arguments.

  Raises:
    ValueError: an option is wrong, or the file is no config of a run.
  """
  presets = make_presets()
  if args[0].partition("=")[0] == "--config":
    if "=" in args[0]:
      args = ["--config", args[0].partition("=")[2], *args[1:]]
    if not args[1:]:
      raise ValueError("--config: expected a file, such as RUN/config.json")
    name, config = _read_config(args[1])
    words, args = f"--config {args[1]}", args[2:]
    if _last_value(args, _MIXER) is not None:
      raise ValueError(
        f"{_MIXER} with {words}: expected a preset, because a file names the "
        "mixers itself"
      )
  else:
    name = words = args[0]
    config, args = presets[name], args[1:]
    system = _last_value(args, _MIXER)
    if system in SYSTEMS:  # a wrong name is answered when all are parsed
      config = with_system(name, system)
  args = _with_layers(args, config.model)
  # A preset's beta2 is meant for the preset's rule, not for one without it.
  rule = config.optimizer.switched_to(
    _last_value(args, "--optimizer.name"),
    _last_value(args, "--optimizer.schedule"),
  )
  config = dataclasses.replace(config, optimizer=rule)

  def elsewhere(option: str) -> str:
    if option == "--config":
      return f" with {words}: expected `rebased {verb} --config FILE` instead"
    have = [x for x in presets if option in option_names(presets[x])]
    if not have:
      return ""
    shown = ", ".join(have[:3]) + (", …" if have[3:] else "")
    return f" with {words}: expected a preset such as {shown}"

  prog = f"rebased {verb} {words}"
  parsed = parse(kind, prog, args, kind(config), elsewhere)
  with naming_options(parsed.run):
    parsed.run.optimizer.check_unused()
  return name, parsed


def _last_value(args: list[str], option: str) -> str | None:
  """Return the value of an option that takes one; None if it is not given."""
  found = None
  for word, following in itertools.zip_longest(args, args[1:]):
    if word == option:
      found = following
    elif word.startswith(f"{option}="):
      found = word.partition("=")[2]
  return found


def _with_layers(args: list[str], model: ModelConfig) -> list[str]:
  """Return arguments with `--model.first.x` or `--model.second.x` alone.

  `--model.mixer.x` is option x of each layer of a pair that has the mixer.

  Args:
    args: the arguments.
    model: the model. The mixer is that of its second layer.
  """
  layers = ["second"]
  if type(model.first) is type(model.second):
    layers = ["first", "second"]
  starts = [i for i, x in enumerate(args) if i == 0 or x.startswith("--")]
  groups = [args[a:b] for a, b in itertools.pairwise([*starts, len(args)])]
  found = []
  for name, *values in groups:
    if name.startswith(f"{_MIXER}."):
      option = name.removeprefix(f"{_MIXER}.")
      for layer in layers:
        found += [f"--model.{layer}.{option}", *values]
    else:
      found += [name, *values]
  return found


def _read_config(file: str) -> tuple[str, RunConfig]:
  """Return the name of the folder of a run's config.json, and the config."""
  path = epath.Path(file)
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"--config {file}: {error}: expected the config.json of a run"
    ) from error
  try:
    return epath.Path(os.path.abspath(file)).parent.name, from_json(text)
  except ConfigError as error:
    raise ValueError(f"--config {file}: {error}") from error


def parse_run(
  kind: type[_Args], verb: str, args: list[str]
) -> tuple[_Args, RunConfig]:
  """Parse the arguments of a verb that takes a run and may change its mesh.

  Args:
    kind: a dataclass with the fields `run_dir`, first, `data` and `mesh`.
    verb: the name of the verb.
    args: the arguments after the verb.

  Returns:
    The parsed arguments, and the config of the run on the mesh and with the
    data that they name.

  Raises:
    ValueError: there is no such run, or its data is not there.
  """
  prog = f"rebased {verb}"
  run_dir = parse(kind, prog, args).run_dir
  config = RunFolder(run_dir).read_config()
  # Parse again with the run's mesh as the default, so that axes which the
  # command does not name stay as the run has them.
  default = kind(run_dir, mesh=config.mesh)
  parsed = parse(kind, prog, args, default)
  config = dataclasses.replace(
    config, data=moved(config.data, parsed.data), mesh=parsed.mesh
  )
  check_data_is_there(config.data)
  return parsed, config


def check_model_is_there(path: str) -> None:
  """Check that a folder may hold a model; no jax is imported for that.

  Args:
    path: the folder of a run or of an exported model. In a bucket nothing is
      checked.

  Raises:
    ValueError: there is no such folder, or nothing of a model is in it.
  """
  files = "config.json", "model.safetensors", "model.safetensors.index.json"
  some = any(os.path.exists(os.path.join(path, file)) for file in files)
  if "://" not in path and not some:
    RunFolder(path).read_config()  # says what is missing


def moved(data: DataConfig, places: DataPlaces) -> DataConfig:
  """Return the data of a run at the places that a command names.

  Args:
    data: the data of the run.
    places: what changes. Each field is one of the data.

  Raises:
    ValueError: the data has no such field, or another number of paths.
  """
  given = dataclasses.asdict(places).items()
  changes = {name: x for name, x in given if x is not None and x != ()}
  for name, value in changes.items():
    if not isinstance(data, TextData):
      kind = type(data).__name__
      raise ValueError(f"data.{name}={value!r}: expected none with {kind}")
    if name in ("path", "eval_path"):
      count = len(getattr(data, name))
      if len(value) != count:
        raise ValueError(
          f"data.{name}={value!r}: expected {count} paths, as the run has"
        )
  return dataclasses.replace(data, **changes) if changes else data


def check_data_is_there(data: DataConfig) -> None:
  """Check that text data lies where the config says.

  Raises:
    ValueError: it does not.
  """
  if not isinstance(data, TextData):
    return
  for name in ("path", "eval_path"):
    for path in getattr(data, name):
      if not os.path.exists(path):
        option = name.replace("_", "-")
        raise ValueError(
          f"data.{name}: {path} is not there: expected the run's data; "
          f"--data.{option} names the place where it is now"
        )
