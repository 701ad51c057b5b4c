"""How a run starts: its data tried, its state restored, warm or fresh."""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax

from train import build as build_lib
from train.build import Built
from train.checkpoint.checkpoints import (
  CheckpointError,
  Checkpoints,
  NoCheckpointError,
  restore_params,
)
from train.config import (
  RunConfig,
  differences,
  from_dict,
  of_data,
  of_mesh,
)
from train.data import batches as batches_lib
from train.devices import processes
from train.records.run_folder import RunFolder, RunFolderError


def source_weights(config: RunConfig, built: Built) -> tuple[Any, str]:
  """The parameters of the run `init_from`, and a note of where they are from.

  Raises:
    RunFolderError: it is no run, has no checkpoint, or another model's.
  """
  source = RunFolder(config.init_from)
  source.read_config()
  target = build_lib.to_dicts(built.abstract)["params"]
  try:
    step, params = restore_params(source.checkpoints, target)
  except CheckpointError as error:
    raise RunFolderError(f"init_from={config.init_from}: {error}") from error
  return params, f"weights of {source.path}, step {step}; fresh optimiser"


def initial(
  config: RunConfig,
  built: Built,
  checkpoints: Checkpoints,
  folder: RunFolder,
  weights: tuple[Any, str] | None,
  *,
  allow_data_change: bool = False,
) -> tuple[Any, int, dict[str, Any], list[str]]:
  """(state, step, meta, notes): restored, warm or fresh.

  Raises:
    RunFolderError: the data of the checkpoint is not the run's.
    CheckpointError: no checkpoint is readable, or it does not fit.
  """
  as_dicts = build_lib.to_dicts(built.abstract)
  try:
    found = checkpoints.restore(as_dicts)
  except NoCheckpointError:
    if config.init_from is None:
      return build_lib.fresh_state(config, built), 0, {}, []
    params, note = weights or source_weights(config, built)
    return build_lib.warm_state(params, built), 0, {}, [note]
  changes = changes_since(found.meta, config, folder, allow_data_change)
  notes = [f"warning: {broken}" for broken in found.broken]
  notes += [
    change if of_mesh(change) else f"warning: {change}" for change in changes
  ]
  notes.append(f"resuming at step {found.step}")
  state = build_lib.from_dicts(found.state, built.abstract)
  return state, found.step, found.meta, notes


@contextlib.contextmanager
def claimed(
  folder: RunFolder, config: RunConfig, *, allow_data_change: bool = False
) -> Iterator[None]:
  """The folder, opened and locked by the first process for all of them.

  Raises:
    RunFolderError: it cannot be used, or another run is training in it.
  """
  failure = None
  processes.all_processes(True)  # each has seen what was there before
  with contextlib.ExitStack() as locks:
    if jax.process_index() == 0:
      try:
        folder.open(config, allow_data_change=allow_data_change)
        locks.enter_context(folder.locked())
      except RunFolderError as error:
        failure = error
    if not processes.all_processes(failure is None):
      raise failure or RunFolderError(f"{folder.path}: refused by process 0")
    yield


def changes_since(
  meta: dict[str, Any], config: RunConfig, folder: RunFolder, allow: bool
) -> list[str]:
  """What of data and mesh is not as it was when a checkpoint was saved.

  Raises:
    RunFolderError: the data is not, and `allow` is not given; or something
      else of the run is not.
  """
  saved = from_dict(meta["config"], "checkpoint")
  changed = differences(saved, config)
  refused = [x for x in changed if not (of_mesh(x) or (allow and of_data(x)))]
  if refused:
    raise RunFolderError(
      f"{folder.path}: its checkpoint is of another config: "
      f"{'; '.join(refused)}"
    )
  return changed + data_changes(meta, config, folder, allow)


def data_changes(
  meta: dict[str, Any], config: RunConfig, folder: RunFolder, allow: bool
) -> list[str]:
  """What of the data is not as it was when a checkpoint was saved.

  Raises:
    RunFolderError: something is not, and `allow` is not given.
    ValueError: the model does not know all of its tokens.
  """
  check_vocabulary(config)
  data = config.data.train_batches(config.batch, config.seed)
  try:
    batches_lib.check_fingerprint(meta["data"], data.fingerprint)
  except ValueError as error:
    if not allow:
      hint = "; --allow-data-change goes on with it"
      raise RunFolderError(f"{folder.path}: {error}{hint}") from error
    return [str(error)]
  return []


def try_data(config: RunConfig) -> None:
  """Makes a batch of both kinds; ValueError where the data cannot be made."""
  check_vocabulary(config)
  config.data.train_batches(config.batch, config.seed).read(0)
  config.data.eval_batches(config.micro_batch, config.seed).read(0)


def check_vocabulary(config: RunConfig) -> None:
  """Raises ValueError where the data has tokens that the model has not."""
  needed = config.data.read_vocab_size()
  batches_lib.require(
    needed is None or config.model.vocab_size >= needed,
    "model.vocab_size",
    config.model.vocab_size,
    f"at least {needed}, the vocabulary of the data",
  )
