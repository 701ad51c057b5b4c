"""`rebased inspect`: what a preset, a run or a checkpoint is."""

import dataclasses
from typing import Any

from etils import epath
from flax import nnx
import jax
from rich.console import Console
from rich.table import Table

from rebased_jax import ModelConfig
from train import build, config as config_lib
from train.checkpoint.checkpoints import NoCheckpointError, read_meta
from train.config import RunConfig
from train.console import near, rows
from train.devices import mesh_report
from train.devices.mesh import MeshConfig
from train.records.run_folder import RunFolder


def show_config(config: RunConfig, title: str, console: Console) -> None:
  """The config's fields, and the parameters by group."""
  console.print(rows(title, _flat(config_lib.to_dict(config))))
  _show_sizes(config.model, config.data.length, console)
  if config.mesh != MeshConfig():
    _show_mesh(config, console)


def show_model(config: ModelConfig, title: str, console: Console) -> None:
  """The same of a model of the paper's tables, which has positions."""
  console.print(rows(title, _flat(config_lib.to_dict(config))))
  _show_sizes(config, config.positions, console)


def _show_sizes(config: ModelConfig, length: int, console: Console) -> None:
  """The parameters by group, and the state of a sequence of this length."""
  model = build.abstract_lm(config)
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
    table.add_row(name, str(leaf.shape), f"{leaf.size:,}")
    total += leaf.size
  table.add_section()
  table.add_row("all", "", f"{total:,}")
  console.print(table)
  state = model.state_size(length)
  console.print(f"state of a sequence: {state:,} bytes", highlight=False)


def _show_mesh(config: RunConfig, console: Console) -> None:
  """What parameters get of the mesh, whatever devices there are."""
  mesh = dataclasses.replace(config.mesh, data=config.mesh.data or 1)
  sizes = mesh.sizes(mesh.data * mesh.fsdp * mesh.context * mesh.tensor)
  model = build.abstract_model(config)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  lines, table = mesh_report.describe(config, params, sizes)
  console.print(table)
  for line in lines:
    console.print(line, highlight=False, soft_wrap=True)


def show_folder(
  what: str,
  presets: tuple[str, ...],
  console: Console,
  mesh: MeshConfig | None = None,
) -> int:
  """A run folder, or one checkpoint in it.

  Raises:
    ValueError: it is neither.
  """
  path = epath.Path(what)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    _show_checkpoint(path, console)
    return 0
  folder = RunFolder(path)
  if not folder.config_file.exists():
    raise ValueError(
      f"{what!r} is no preset, model, run folder or checkpoint"
      + near(what, presets)
    )
  config = folder.read_config()
  if mesh is not None and mesh != MeshConfig():
    config = dataclasses.replace(config, mesh=mesh)
  show_config(config, str(path), console)
  _show_progress(folder, console)
  return 0


def _show_progress(folder: RunFolder, console: Console) -> None:
  records = folder.read_metrics()
  for kind in ("train", "eval"):
    last = next((x for x in reversed(records) if x["kind"] == kind), None)
    if last is not None:
      console.print(rows(f"last {kind} record", _flat(last)))
  try:
    step, meta = read_meta(folder.checkpoints)
  except NoCheckpointError:
    console.print("no checkpoint yet")
    return
  finished = meta.get("finished") or "can be resumed"
  console.print(f"newest checkpoint: step {step}, {finished}", highlight=False)


def _show_checkpoint(path: epath.Path, console: Console) -> None:
  step, meta = read_meta(path.parent, int(path.name))
  config = meta.pop("config")
  console.print(rows(str(path), {"step": step, **_flat(meta)}))
  console.print(rows("config", _flat(config)))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one, with dotted names."""
  result = {}
  for name, value in data.items():
    if isinstance(value, dict):
      result |= _flat(value, f"{prefix}{name}.")
    else:
      result[prefix + name] = value
  return result
