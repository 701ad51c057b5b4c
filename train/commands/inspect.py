"""`rebased inspect WHAT`: show a preset, a model, a run or a checkpoint."""

from collections.abc import Sequence
import dataclasses
import datetime
import os
from typing import TYPE_CHECKING, Annotated, Any

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text
import tyro

from rebased_jax import ModelConfig
from rebased_jax.presets import PUBLISHED_PARAMETERS, make_models
from train import stored_config
from train.commands import compare
from train.commands.parsing import parse
from train.config import RunConfig
from train.console import near, number, rows, say
from train.devices.mesh_config import MeshConfig
from train.presets import make_presets
from train.records import comparison
from train.records.run_folder import RunFolder

if TYPE_CHECKING:
  from rebased_jax import LM

_NOTHING = "{!r} is no preset, model, run folder or checkpoint"
_HINT = "--all shows every field and the shape of every parameter"


@dataclasses.dataclass(frozen=True)
class InspectArgs:
  """Show a preset, a model, a run, or a checkpoint RUN/checkpoints/STEP.

  A model is an exported one, or a model of the paper's tables, such as
  table-4-mamba-64. table-4 and table-9 show all models of a table, beside the
  paper's parameter counts. A folder of runs shows its runs side by side.
  `rebased inspect data PATH` shows a data set.
  """

  #: The name of a preset or of a model, or a folder. Several runs are shown
  #: side by side.
  what: Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WHAT …")
  ]
  #: Show every field, and the shape of every parameter.
  all: bool = False
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
    from train.commands import inspect_data

    return inspect_data.run(args[1:])
  parsed = parse(InspectArgs, "rebased inspect", args)
  if not parsed.what:
    raise ValueError(
      "expected what to inspect: a preset, a model or a folder, as in `rebased "
      "inspect mqar`"
    )
  console = Console()
  if _are_runs(parsed.what):
    folders = comparison.find_folders(parsed.what)
    compare.show(comparison.read(folders), console)
    return 0
  for what in parsed.what:
    _check_is_something(what)
  # Imported when the options are right: jax takes seconds.
  from train.devices import backend

  backend.devices()  # says so if there are none
  for what in parsed.what:
    _show(what, parsed, console)
  return 0


def _are_runs(what: Sequence[str]) -> bool:
  """Whether these are folders with two runs or more."""
  if not all(os.path.isdir(x) for x in what):
    return False
  try:
    return len(comparison.find_folders(what)) > 1
  except ValueError:  # one is another folder
    return False


def _tables(models: dict[str, ModelConfig]) -> set[str]:
  """Return the names of the paper's tables, such as table-4."""
  return {"-".join(name.split("-")[:2]) for name in models}


def _check_is_something(what: str) -> None:
  """Check that there is a preset, model, table or folder of a name.

  Raises:
    ValueError: there is none.
  """
  models = make_models()
  names = {*make_presets(), *models, *_tables(models)}
  # A step of a run that is there has a message of its kind.
  is_there = any(map(os.path.exists, (what, os.path.dirname(what))))
  if what not in names and "://" not in what and not is_there:
    raise ValueError(_NOTHING.format(what) + near(what, tuple(names)))


def _show(what: str, args: InspectArgs, console: Console) -> None:
  presets, models = make_presets(), make_models()
  tables = _tables(models)
  if what in presets:
    config = dataclasses.replace(presets[what], mesh=args.mesh)
    show_config(config, what, console, everything=args.all)
  elif what in models:
    show_model(models[what], what, console, everything=args.all)
    say(console, f"the paper counts {PUBLISHED_PARAMETERS[what]:,} parameters")
  elif what in tables:
    _show_table(what, models, console)
  else:
    show_folder(
      what, (*presets, *models), console, args.mesh, everything=args.all
    )


def _show_table(
  what: str, models: dict[str, ModelConfig], console: Console
) -> None:
  """Print the parameters of a table's models, beside the paper's counts."""
  from rebased_jax import parameter_count
  from train import compiled_steps

  table = Table(title=Text(what), title_justify="left")
  table.add_column("model")
  for column in ("paper's parameters", "ours", "difference"):
    table.add_column(column, justify="right")
  for name, config in models.items():
    if name.startswith(f"{what}-"):
      theirs = PUBLISHED_PARAMETERS[name]
      ours = parameter_count(compiled_steps.abstract_lm(config))
      table.add_row(name, f"{theirs:,}", f"{ours:,}", f"{ours - theirs:,}")
  console.print(table)


def show_config(
  config: RunConfig, title: str, console: Console, *, everything: bool = False
) -> None:
  """Print a run's config and the sizes of its parameters.

  Args:
    config: the run.
    title: the title of the table.
    console: where to print.
    everything: whether to print every field and the shape of every parameter.
  """
  if everything:
    console.print(rows(title, _flat(stored_config.to_dict(config))))
    _show_sizes(config.model, config.data.length, console)
  else:
    console.print(rows(title, _summary(config)))
    say(console, _HINT)
  if config.mesh != MeshConfig():
    _show_mesh(config, console)


def _summary(config: RunConfig) -> dict[str, str]:
  """Return what says most of a run, by label."""
  data, optimizer = config.data, config.optimizer
  batch = f"{config.batch:,} rows"
  if config.accumulate > 1:
    batch += f", {config.micro_batch:,} at a time"
  rate = f"{number(optimizer.learning_rate)}, {optimizer.schedule}"
  if optimizer.warmup_steps:
    rate += f" after {optimizer.warmup_steps:,} steps of warm-up"
  steps = f"{config.steps:,}"
  if config.stop_accuracy is not None:
    steps += f", or to a held-out accuracy above {config.stop_accuracy:g}"
  tokens = config.batch * data.length
  return {
    **_model_summary(config.model, data.length),
    "data": comparison.shown(data),
    "row": f"{data.length:,} tokens",
    "batch": f"{batch}, {tokens:,} tokens",
    "steps": steps,
    "optimizer": optimizer.name,
    "learning rate": rate,
    "evaluates, saves": f"every {config.eval_every:,} and "
    f"{config.save_every:,} steps",
  }


def _model_summary(config: ModelConfig, length: int | None) -> dict[str, str]:
  """Return what says most of a model, by label.

  Args:
    config: the model.
    length: the tokens of a row, for the size of a state. None: none is shown.
  """
  model = _abstract(config)
  from rebased_jax import parameter_count

  found = {
    "layers": f"{config.layers:,} of width {config.width:,}",
    "mixers": " and ".join(
      dict.fromkeys(map(comparison.shown, (config.first, config.second)))
    ),
    "vocabulary": f"{config.vocab_size:,}",
    "computes in": config.dtype,
    "parameters": f"{parameter_count(model):,}",
  }
  if length is not None:
    found["state of a sequence"] = f"{model.state_size(length):,} bytes"
  return found


def _abstract(config: ModelConfig) -> "LM":
  """Return a model whose parameters are shapes alone."""
  from train import compiled_steps

  return compiled_steps.abstract_lm(config)


def show_model(
  config: ModelConfig, title: str, console: Console, *, everything: bool = False
) -> None:
  """Print a model's config and the sizes of its parameters.

  Args:
    config: the model.
    title: the title of the table.
    console: where to print.
    everything: whether to print every field and the shape of every parameter.
  """
  if everything:
    console.print(rows(title, _flat(stored_config.to_dict(config))))
    _show_sizes(config, config.positions, console)
  else:
    console.print(rows(title, _model_summary(config, config.positions)))
    say(console, _HINT)


def show_folder(
  what: str,
  names: tuple[str, ...],
  console: Console,
  mesh: MeshConfig | None = None,
  *,
  everything: bool = False,
) -> None:
  """Print what a run folder, a checkpoint or an exported model holds.

  Args:
    what: the folder.
    names: of presets and models, for the message about a misspelt one.
    console: where to print.
    mesh: a mesh to show instead of the run's; None or the default for the
      run's.
    everything: whether to print every field and the shape of every parameter.

  Raises:
    ValueError: it is none of these.
  """
  from rebased_jax import model_files

  path = epath.Path(what)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    _show_checkpoint(path, console)
    return
  if model_files.is_exported(path):
    info = model_files.read_info(path)
    show_model(info.config, str(path), console, everything=everything)
    tokenizer = info.tokenizer
    shown = "none" if tokenizer is None else dataclasses.asdict(tokenizer)
    say(console, f"tokenizer: {shown}")
    return
  folder = RunFolder(path)
  if not folder.config_file.exists():
    raise ValueError(_NOTHING.format(what) + near(what, names))
  config = folder.read_config()
  if mesh is not None and mesh != MeshConfig():
    config = dataclasses.replace(config, mesh=mesh)
  show_config(config, str(path), console, everything=everything)
  _show_progress(folder, console, everything=everything)


def _show_sizes(
  config: ModelConfig, length: int | None, console: Console
) -> None:
  """Print each parameter's size, and the state's size for `length` tokens.

  With None the state is left out.
  """
  from flax import nnx
  import jax

  model = _abstract(config)
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
  from flax import nnx

  from train import compiled_steps
  from train.devices import mesh_report

  mesh = dataclasses.replace(config.mesh, data=config.mesh.data or 1)
  sizes = mesh.sizes(mesh.data * mesh.fsdp * mesh.context * mesh.tensor)
  model = compiled_steps.abstract_model(config)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  lines, table = mesh_report.describe(config, params, sizes)
  console.print(table)
  for line in lines:
    say(console, line)


def _show_progress(
  folder: RunFolder, console: Console, *, everything: bool
) -> None:
  """Print a run's last metrics and its newest checkpoint."""
  from train.checkpoint.checkpoints import NoCheckpointError, read_meta

  records = folder.read_metrics()
  for kind in ("train", "eval"):
    last = next((x for x in reversed(records) if x["kind"] == kind), None)
    if last is not None:
      shown = {
        name: number(value)
        for name, value in last.items()
        # Those of single layers are many.
        if name not in ("kind", "unix_time") and (everything or "/" not in name)
      }
      if "unix_time" in last:
        then = datetime.datetime.fromtimestamp(last["unix_time"])
        shown["time"] = f"{then:%Y-%m-%d %H:%M:%S}"
      console.print(rows(f"last {kind} record", shown))
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
  from train.checkpoint.checkpoints import read_meta

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
