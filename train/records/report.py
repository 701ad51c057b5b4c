"""The end of a run: pictures, a table; and the evaluation of a checkpoint."""

from flax import nnx
import jax
from jax.experimental import multihost_utils
from rich.console import Console

from rebased_jax import LM, parameter_count
from train import build, evaluate, start
from train.checkpoint.checkpoints import read_meta, restore_params
from train.config import MQARData, RunConfig
from train.console import rows
from train.devices import mesh as mesh_lib
from train.loop import Outcome
from train.records import metrics, plots
from train.records.run_folder import RunFolder


def finish(
  config: RunConfig, folder: RunFolder, outcome: Outcome, console: Console
) -> None:
  """Draws learning.png and attention.png and prints the run's table.

  Every process calls it; the first one draws and prints.
  """
  params = outcome.state["params"]
  if isinstance(config.data, MQARData):  # small: each process takes all of it
    params = multihost_utils.process_allgather(params, tiled=True)
  if jax.process_index() != 0:
    return
  graph, _ = nnx.split(build.abstract_model(config))
  model = nnx.merge(graph, params)
  records = folder.read_metrics()
  plots.learning(records, config, folder.path / "learning.png")
  attention = draw_attention(config, model, folder)
  reached = "stopped early: accuracy reached" * (outcome.reason == "accuracy")
  values = {
    "step": f"{outcome.step:,} of {config.steps:,}  {reached}".rstrip(),
    **_results(config, outcome.held_out, "held-out"),
    "parameters": f"{parameter_count(model):,}",
    "training time here": f"{outcome.seconds:.0f} s",
    "run folder": folder.path,
    "pictures": "learning.png" + ", attention.png" * attention,
  }
  console.print(rows("done", values))


def _results(
  config: RunConfig, found: dict[str, float], kind: str
) -> dict[str, str]:
  """Rows of a table: accuracy, loss and, of text, perplexity."""
  values = metrics.with_perplexity(found) if config.data.perplexity else found
  names = ("accuracy", "loss", *metrics.PERPLEXITIES, "ar_share")
  return {
    f"{kind} {metrics.LABELS.get(x, x)}": f"{values[x]:.4f}"
    for x in names
    if x in values
  }


def draw_attention(config: RunConfig, model: LM, folder: RunFolder) -> bool:
  """attention.png of an MQAR run over its first held-out row, if it has one."""
  if not isinstance(config.data, MQARData) or not model.has_attention_matrix:
    return False
  batch = config.data.eval_batches(1, config.seed).read(0)
  A_TT = model.attention_matrix(batch["tokens"])[0].mean(axis=0)
  plots.attention(jax.device_get(A_TT), batch, folder.path / "attention.png")
  return True


def evaluate_run(
  config: RunConfig,
  folder: RunFolder,
  step: int | None,
  console: Console,
  *,
  test: bool = False,
  allow_data_change: bool = False,
) -> int:
  """Prints the held-out, or the test, results of a run's checkpoint.

  Raises:
    ValueError: its data has no test split, or tokens that the model has not.
    RunFolderError: its data is not what it was, which is not allowed.
    CheckpointError: there is no such checkpoint.
  """
  mesh = mesh_lib.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    built = build.build(config, mesh)
    target = build.to_dicts(built.abstract)["params"]
    step, params = restore_params(folder.checkpoints, target, step)
    _, meta = read_meta(folder.checkpoints, step)
    changes = start.data_changes(meta, config, folder, allow_data_change)
    make = config.data.test_batches if test else config.data.eval_batches
    data = make(config.micro_batch, config.seed)
    found = evaluate.evaluate(built, params, data, timeout=config.data.timeout)
  values = {
    "step": f"{step:,}",
    **_results(config, found, "test" if test else "held-out"),
    "targets": f"{found['tokens']:,.0f}",
  }
  if jax.process_index() == 0:
    for change in changes:
      console.print(f"warning: {change}", highlight=False, soft_wrap=True)
    console.print(rows(str(folder.path), values))
  return 0
