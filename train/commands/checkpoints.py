"""`rebased checkpoints RUN`: list a run's checkpoints, or delete some."""

import dataclasses

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.commands.arguments import RunArg
from train.commands.parsing import parse
from train.console import say
from train.records.run_folder import RunFolder

#: Held-out metrics that fit a line; the metric of --keep-best comes too.
_SHOWN = ("loss", "accuracy", "perplexity", "ema_loss")


@dataclasses.dataclass(frozen=True)
class CheckpointsArgs:
  """List the checkpoints of a run, with the last held-out metrics of each.

  The best is marked. `rebased evaluate RUN --step N`, and `generate` and
  `export` likewise, take one of them, and `--step best` the best.
  """

  #: The run's folder.
  run_dir: RunArg
  #: Delete these steps, unless the run trains now. None: delete none.
  delete: tuple[int, ...] | None = None
  #: Delete them although no readable checkpoint is left. The run then starts
  #: again at step 0.
  force: bool = False


def run(args: list[str]) -> int:
  """Run the verb and return the exit code: 1 if a checkpoint is unreadable.

  Only the record of a checkpoint is read, not its arrays.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: there is no such run, its checkpoints are gone, or the steps
      cannot be deleted. Nothing was deleted.
    CheckpointError: the checkpoints cannot be listed, or a step not deleted.
  """
  parsed = parse(CheckpointsArgs, "rebased checkpoints", args)
  folder, console = RunFolder(parsed.run_dir), Console()
  config = folder.read_config()
  # Imported when the options are right: orbax takes seconds.
  from train import best_checkpoint
  from train.checkpoint.checkpoints import best_of

  folder.check_checkpoints()
  if parsed.delete == ():
    raise ValueError("--delete: expected the steps after it")
  if parsed.delete is not None:
    with folder.locked():
      _delete(folder, parsed.delete, console, force=parsed.force)
  elif parsed.force:
    raise ValueError("--force: expected the steps to --delete, too")
  found, damaged = _read(folder)
  if not found:
    say(console, "no checkpoint yet")
    return 0
  name = config.keep_best or best_checkpoint.DEFAULT
  score = best_checkpoint.score_by(name)
  best = best_of(
    {step: None if x is None else score(step, x) for step, x in found.items()}
  )
  console.print(_table(found, best, name))
  for message in damaged:
    say(console, message)
  return 1 if damaged else 0


def _read(folder: RunFolder) -> tuple[dict[int, dict | None], list[str]]:
  """Return the `meta` of each step, None if damaged, and what is damaged."""
  from train.checkpoint.checkpoints import (
    CheckpointError,
    read_meta,
    saved_steps,
  )

  run_id = folder.run_id()
  found, damaged = {}, []
  for step in saved_steps(folder.checkpoints):
    try:
      found[step] = read_meta(folder.checkpoints, step, run=run_id)[1]
    except CheckpointError as error:
      found[step] = None
      damaged.append(str(error))
  return found, damaged


def _delete(
  folder: RunFolder, steps: tuple[int, ...], console: Console, *, force: bool
) -> None:
  """Delete checkpoints of a locked run.

  Raises:
    ValueError: a step is not there, or no readable one would be left.
  """
  from train.checkpoint.checkpoints import delete

  found, _ = _read(folder)
  given = " ".join(map(str, steps))
  if missing := [x for x in steps if x not in found]:
    raise ValueError(
      f"--delete {given}: there is no step {missing[0]}: expected some of "
      f"{', '.join(map(str, found))}"
    )
  left = [step for step in found if step not in steps]
  if not force and all(found[step] is None for step in left):
    raise ValueError(
      f"--delete {given}: no readable checkpoint would be left, and the run "
      "would start again at step 0: expected fewer steps, or --force too"
    )
  # First, so that a kill in between leaves no step that seems to be lost.
  folder.forget_saves_after(max(left, default=None))
  for step in sorted(set(steps), reverse=True):
    delete(folder.checkpoints, step)
    say(console, f"deleted step {step}")


def _table(found: dict[int, dict | None], best: int | None, name: str) -> Table:
  """Return a table of checkpoints.

  Args:
    found: the `meta` of each by its step; None where it cannot be read.
    best: the step that is marked as the best; None for none.
    name: the held-out metric that it is the best by.
  """
  from train.metrics import table_labels  # imports jax

  metas = [meta.get("held_out", {}) for meta in found.values() if meta]
  measured = {x for held_out in metas for x in held_out}
  shown = [
    (x, label)
    for x, label in table_labels().items()
    if x in measured and x in (*_SHOWN, name)
  ]
  title = "checkpoints, and their held-out metrics"
  table = Table(title=title, title_justify="left")
  table.add_column("step", justify="right")
  for _, label in shown:
    table.add_column(label, justify="right")
  table.add_column("state", overflow="fold")
  for step, meta in found.items():
    held_out = {} if meta is None else meta.get("held_out", {})
    values = [f"{held_out[x]:.4f}" if x in held_out else "–" for x, _ in shown]
    if meta is None:
      state = "unreadable"
    else:
      state = meta.get("finished") or "can be resumed"
    if step == best:
      state = f"{state}, best by {name}"
    table.add_row(str(step), *values, Text(state))
  return table
