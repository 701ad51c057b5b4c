"""`rebased inspect WHAT`: show a preset, a model, a run or a checkpoint."""

import dataclasses
import os
from typing import Annotated, Any

from etils import epath
from flax import nnx
import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text
import tyro

from rebased_jax import ModelConfig, model_files
from rebased_jax.presets import make_models
from train import compiled_steps, stored_config
from train.checkpoint.checkpoints import NoCheckpointError, read_meta
from train.commands import inspect_data
from train.commands.parsing import parse
from train.config import RunConfig
from train.console import near, rows, say
from train.devices import backend, mesh_report
from train.devices.mesh import MeshConfig
from train.presets import make_presets
from train.records.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class InspectArgs:
  """Show a preset, a model, a run, or a checkpoint RUN/checkpoints/STEP.

  A model is one that was exported, or one of the paper's.

  The paper's are those whose parameters it counts, such as table-4-mamba-64.
  `rebased inspect data PATH` shows a data set.
  """

  #: The name of a preset or of a model, or a folder.
  what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
  #: Show how this mesh would split the parameters.
  mesh: MeshConfig = MeshConfig()


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: there is nothing of this name, or it cannot be read.
  """
  # `inspect data` alone means a run folder of that name, if there is one.
  if args[:1] == ["data"] and (len(args) > 1 or not os.path.isdir("data")):
    return inspect_data.run(args[1:])
  parsed = parse(InspectArgs, "rebased inspect", args)
  backend.devices()  # says so if there are none
  what, mesh, console = parsed.what, parsed.mesh, Console()
  presets, models = make_presets(), make_models()
  if what in presets:
    config = dataclasses.replace(presets[what], mesh=mesh)
    show_config(config, what, console)
  elif what in models:
    show_model(models[what], what, console)
  else:
    show_folder(what, (*presets, *models), console, mesh)
  return 0


def show_config(config: RunConfig, title: str, console: Console) -> None:
  """Print a run's fields and the sizes of its parameters.

  Args:
    config: the run.
    title: the title of the table.
    console: where to print.
  """
  console.print(rows(title, _flat(stored_config.to_dict(config))))
  _show_sizes(config.model, config.data.length, console)
  if config.mesh != MeshConfig():
    _show_mesh(config, console)


def show_model(config: ModelConfig, title: str, console: Console) -> None:
  """Print the fields of a model and the sizes of its parameters.

  Args:
    config: the model.
    title: the title of the table.
    console: where to print.
  """
  console.print(rows(title, _flat(stored_config.to_dict(config))))
  _show_sizes(config, config.positions, console)


def show_folder(
  what: str,
  names: tuple[str, ...],
  console: Console,
  mesh: MeshConfig | None = None,
) -> None:
  """Print what a run folder, a checkpoint or an exported model holds.

  Args:
    what: the folder.
    names: of presets and models, for the message about a misspelt one.
    console: where to print.
    mesh: a mesh to show instead of the run's; None or the default for the
      run's.

  Raises:
    ValueError: it is none of these.
  """
  path = epath.Path(what)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    _show_checkpoint(path, console)
    return
  if model_files.is_exported(path):
    info = model_files.read_info(path)
    show_model(info.config, str(path), console)
    tokenizer = info.tokenizer
    shown = "none" if tokenizer is None else dataclasses.asdict(tokenizer)
    say(console, f"tokenizer: {shown}")
    return
  folder = RunFolder(path)
  if not folder.config_file.exists():
    raise ValueError(
      f"{what!r} is no preset, model, run folder or checkpoint"
      + near(what, names)
    )
  config = folder.read_config()
  if mesh is not None and mesh != MeshConfig():
    config = dataclasses.replace(config, mesh=mesh)
  show_config(config, str(path), console)
  _show_progress(folder, console)


def _show_sizes(
  config: ModelConfig, length: int | None, console: Console
) -> None:
  """Print each parameter's size, and the state's size for `length` tokens.

  With None the state is left out.
  """
  model = compiled_steps.abstract_lm(config)
  table = Table(title="parameters", title_justify="left")
  table.add_column("group")
  table.add_column("shape")
  table.add_column("count", justify="right")
  total = 0
  leaves = jax.tree_util.tree_leaves_with_path(
    nnx.to_pure_dict(nnx.state(model, nnx.Param))
  )
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    table.add_row(Text(name), str(leaf.shape), f"{leaf.size:,}")
    total += leaf.size
  table.add_section()
  table.add_row("all", "", f"{total:,}")
  console.print(table)
  if length is not None:
    state = model.state_size(length)
    say(console, f"state of a sequence: {state:,} bytes")


def _show_mesh(config: RunConfig, console: Console) -> None:
  """Print how the mesh splits the parameters, whatever devices there are."""
  mesh = dataclasses.replace(config.mesh, data=config.mesh.data or 1)
  sizes = mesh.sizes(mesh.data * mesh.fsdp * mesh.context * mesh.tensor)
  model = compiled_steps.abstract_model(config)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  lines, table = mesh_report.describe(config, params, sizes)
  console.print(table)
  for line in lines:
    say(console, line)


def _show_progress(folder: RunFolder, console: Console) -> None:
  """Print a run's last metrics and its newest checkpoint."""
  records = folder.read_metrics()
  for kind in ("train", "eval"):
    last = next((x for x in reversed(records) if x["kind"] == kind), None)
    if last is not None:
      console.print(rows(f"last {kind} record", _flat(last)))
  folder.check_checkpoints()
  try:
    step, meta = read_meta(folder.checkpoints, run=folder.run_id())
  except NoCheckpointError:
    say(console, "no checkpoint yet")
    return
  finished = meta.get("finished") or "can be resumed"
  say(console, f"newest checkpoint: step {step}, {finished}")


def _show_checkpoint(path: epath.Path, console: Console) -> None:
  """Print the record of a checkpoint."""
  folder = RunFolder(path.parent.parent)
  run_id = folder.run_id() if folder.config_file.exists() else None
  step, meta = read_meta(path.parent, int(path.name), run=run_id)
  config = meta.pop("config")
  console.print(rows(str(path), {"step": step, **_flat(meta)}))
  console.print(rows("config", _flat(config)))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return nested dicts as one dict with dotted names."""
  result = {}
  for name, value in data.items():
    if isinstance(value, dict):
      result |= _flat(value, f"{prefix}{name}.")
    else:
      result[prefix + name] = value
  return result
