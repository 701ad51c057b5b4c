"""The end of a run: pictures and a table; and the table of an evaluation."""

import itertools

from flax import nnx
import jax
from jax.experimental import multihost_utils
from rich.console import Console

from rebased_jax import LM, parameter_count
from rebased_jax.which_weights import Weights
from train import (
  compiled_steps,
  evaluate,
  initial_state,
  metrics,
  presets,
  same_run,
)
from train.checkpoint.checkpoints import read_meta, restore_params
from train.config import MQARData, RunConfig
from train.console import rows, say
from train.data.in_vocabulary import InVocabulary
from train.devices import mesh as mesh_lib, processes
from train.loop import Outcome
from train.records import plots
from train.records.run_folder import RunFolder
from train.trained_model import part_of_state
from train.watchdog import Watchdog


def finish(
  config: RunConfig, folder: RunFolder, outcome: Outcome, console: Console
) -> None:
  """Draw learning.png and attention.png, and print the run's table.

  Every process calls this function; the first one draws and prints.

  Args:
    config: the run.
    folder: its folder.
    outcome: how it ended.
    console: where the table goes.
  """
  params = outcome.state.params
  if isinstance(config.data, MQARData):  # small: each process takes all of it
    params = multihost_utils.process_allgather(params, tiled=True)
  if jax.process_index() != 0:
    return
  graph, _ = nnx.split(compiled_steps.abstract_model(config))
  model = nnx.merge(graph, params)
  records = folder.read_metrics()
  title = f"{_name(folder)}: {presets.describe_model(config)}"
  plots.learning(records, config, folder.path / "learning.png", title)
  pictures = ["learning.png"]
  if draw_attention(config, model, folder):
    pictures.append("attention.png")
  step = f"{outcome.step:,} of {config.steps:,}"
  if outcome.reason == "accuracy":
    step += "  stopped early: accuracy reached"
  values = {
    "step": step,
    **_table_rows(config, outcome.held_out, "held-out"),
    "parameters": f"{parameter_count(model):,}",
    "training time here": f"{outcome.seconds:.0f} s",
    "run folder": folder.path,
    "pictures": ", ".join(pictures),
  }
  console.print(rows("done", values))
  promise = _promise(config, outcome)
  if promise is not None:
    say(console, promise)


def _name(folder: RunFolder) -> str:
  """Return the name of a run's folder, also where the path is `.`."""
  return folder.path.name or folder.path.resolve().name


def _promise(config: RunConfig, outcome: Outcome) -> str | None:
  """Return whether a run reached its accuracy; None if it has no such goal."""
  goal, found = config.stop_accuracy, outcome.held_out.get("accuracy")
  if goal is None or found is None:
    return None
  words = "reached" if found > goal else "not reached"
  return f"goal {words}: held-out accuracy {found:.4f}, goal above {goal:g}"


def _table_rows(
  config: RunConfig, found: dict[str, float], kind: str
) -> dict[str, str]:
  """Return the metrics that have a label, as rows of a table."""
  values = metrics.with_derived(found, text=config.data.perplexity)
  return {
    f"{kind} {label}": f"{values[name]:.4f}"
    for name, label in metrics.table_labels().items()
    if name in values
  }


def draw_attention(config: RunConfig, model: LM, folder: RunFolder) -> bool:
  """Draw attention.png over the first held-out row; return whether it exists.

  It does for MQAR runs whose last mixer has an attention matrix.
  """
  if not isinstance(config.data, MQARData) or not model.has_attention_matrix:
    return False
  batch = config.data.eval_batches(1, config.seed).read(0)
  A_TT = model.attention_matrix(batch["tokens"])[0].mean(axis=0)
  title = (
    f"{_name(folder)}: {presets.describe_model(config)}\n"
    f"layer {config.model.layers - 1}, mean over heads; held-out row 0"
  )
  path = folder.path / "attention.png"
  plots.attention(jax.device_get(A_TT), batch, path, title)
  return True


def evaluate_run(
  config: RunConfig,
  folder: RunFolder,
  step: int | None,
  console: Console,
  *,
  weights: Weights = "trained",
  test: bool = False,
  allow_data_change: bool = False,
  watch: Watchdog | None = None,
) -> int:
  """Print the held-out metrics of a run's checkpoint, and return 0.

  Args:
    config: the run.
    folder: its folder.
    step: the checkpoint's step. None takes the newest readable checkpoint.
    console: where the table goes.
    weights: "trained", or "ema" for the average of a run that keeps one.
    test: evaluate on the test split instead of the held-out rows.
    allow_data_change: evaluate although the data has changed.
    watch: is told of every batch. None: nothing is.

  Raises:
    ValueError: the data has no test split, or tokens that the model lacks, or
      the run keeps no average.
    RunFolderError: the data has changed, which is not allowed, or the run's
      checkpoints are gone.
    CheckpointError: there is no such checkpoint.
    PeerLost: another process of the evaluation has ended.
  """
  part = part_of_state(config, weights)
  folder.check_checkpoints()
  same_run.check(
    config,
    folder,
    step=step,
    weights=weights,
    test=test,
    allow_data_change=allow_data_change,
  )
  watch = watch or Watchdog()
  watch.beat("reading the checkpoint")
  mesh = mesh_lib.make_mesh(config.mesh)
  with processes.naming_lost_peers(), jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    target = built.abstract.params
    run_id = folder.run_id()
    step, params = restore_params(
      folder.checkpoints,
      compiled_steps.to_dicts(target),
      step,
      run=run_id,
      part=part,
    )
    params = compiled_steps.from_dicts(params, target)
    _, meta = read_meta(folder.checkpoints, step, run=run_id)
    changes = initial_state.data_changes(
      meta, config, folder, allow_data_change
    )
    make = config.data.test_batches if test else config.data.eval_batches
    data = make(config.micro_batch, config.seed)
    data = InVocabulary(data, config.model.vocab_size)

    batches = itertools.count(1)

    def no_interrupt() -> bool:
      watch.beat(
        "evaluation", part=f"batch {next(batches)} of {data.num_batches}"
      )
      return False

    found = evaluate.evaluate(
      built,
      params,
      data,
      timeout=config.data.timeout,
      interrupted=no_interrupt,
    )
  values = {
    "step": f"{step:,}",
    "weights": weights,
    **_table_rows(config, found, "test" if test else "held-out"),
    "targets": f"{found['tokens']:,.0f}",
  }
  if jax.process_index() == 0:
    for change in changes:
      say(console, f"warning: {change}")
    console.print(rows(str(folder.path), values))
  return 0
