"""`rebased checkpoints RUN`: list a run's checkpoints, newest last."""

import dataclasses

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.commands.arguments import RunArg
from train.commands.parsing import parse
from train.console import say
from train.records.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class CheckpointsArgs:
  """List the checkpoints of a run, with the last held-out metrics of each.

  `rebased evaluate RUN --step N` and `rebased generate RUN --step N` take one.
  """

  #: The run's folder.
  run_dir: RunArg


def run(args: list[str]) -> int:
  """Run the verb and return the exit code: 1 if a checkpoint is unreadable.

  Only the record of a checkpoint is read, not its arrays.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: there is no such run, or its checkpoints are gone.
  """
  parsed = parse(CheckpointsArgs, "rebased checkpoints", args)
  folder, console = RunFolder(parsed.run_dir), Console()
  folder.read_config()  # says so if it is no run
  # Imported when the options are right: orbax takes seconds.
  from train.checkpoint.checkpoints import (
    CheckpointError,
    read_meta,
    saved_steps,
  )

  folder.check_checkpoints()
  run_id = folder.run_id()
  steps = saved_steps(folder.checkpoints)
  if not steps:
    say(console, "no checkpoint yet")
    return 0
  found, damaged = {}, []
  for step in steps:
    try:
      found[step] = read_meta(folder.checkpoints, step, run=run_id)[1]
    except CheckpointError as error:
      found[step] = None
      damaged.append(str(error))
  console.print(_table(found))
  for message in damaged:
    say(console, message)
  return 1 if damaged else 0


def _table(found: dict[int, dict | None]) -> Table:
  """Return a table of checkpoints.

  Args:
    found: the `meta` of each by its step; None where it cannot be read.
  """
  from train.metrics import table_labels  # imports jax

  shown = [
    (name, label)
    for name, label in table_labels().items()
    if any(name in meta.get("held_out", {}) for meta in found.values() if meta)
  ]
  table = Table(title="checkpoints", title_justify="left")
  table.add_column("step", justify="right")
  for _, label in shown:
    table.add_column(f"held-out {label}", justify="right")
  table.add_column("state")
  for step, meta in found.items():
    held_out = {} if meta is None else meta.get("held_out", {})
    values = [
      f"{held_out[name]:.4f}" if name in held_out else "–" for name, _ in shown
    ]
    if meta is None:
      state = "unreadable"
    else:
      state = meta.get("finished") or "can be resumed"
    table.add_row(str(step), *values, Text(state))
  return table
