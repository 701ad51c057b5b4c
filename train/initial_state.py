"""The state that a run starts from: restored, warm or fresh.

Before that, the run's data is tried: a run that cannot read its data is
refused before its folder is made.
"""

from typing import Any

import jax
import numpy as np

from train import compiled_steps, optimizer
from train.checkpoint.checkpoints import (
  Checkpoints,
  NoCheckpointError,
  Restored,
)
from train.compiled_steps import Built
from train.config import RunConfig
from train.data import batches as batches_lib
from train.data.checks import require
from train.data.config import check_batch
from train.data.in_vocabulary import check_tokens
from train.init_weights import source_weights
from train.records.run_folder import RunFolder, RunFolderError
from train.stored_config import (
  differences,
  from_dict,
  is_about_data,
  is_about_optimizer,
  is_about_paths,
  is_about_work,
)


def restore_or_create(
  config: RunConfig,
  built: Built,
  checkpoints: Checkpoints,
  folder: RunFolder,
  weights: tuple[Any, list[str]] | None,
  *,
  allow_data_change: bool = False,
  allow_optimizer_change: bool = False,
) -> tuple[Any, int, dict[str, Any], list[str]]:
  """Return the state that training starts from.

  Args:
    config: the run.
    built: the run on its devices.
    checkpoints: the checkpoints of the run.
    folder: the folder of the run.
    weights: what `source_weights` returned. None: it is called here, if
      `init_from` is set and there is no checkpoint.
    allow_data_change: restore although the data is not that of the checkpoint.
    allow_optimizer_change: restore although steps or optimiser are not those
      of the checkpoint.

  Returns:
    (state, step, meta, notes): the state, its step, what the checkpoint says
    of itself ({} without one), and lines for the user.

  Raises:
    RunFolderError: the checkpoint is of another config, is beyond the run's
      last step, or its data is not the run's.
    CheckpointError: no checkpoint is readable, or it does not fit the model.
  """
  as_dicts = compiled_steps.to_dicts(built.abstract)
  try:
    found = checkpoints.restore(as_dicts)
  except NoCheckpointError:
    if config.init_from is None:
      return compiled_steps.fresh_state(config, built), 0, {}, []
    params, notes = weights or source_weights(config, built)
    return compiled_steps.warm_state(params, built), 0, {}, notes
  if found.step > config.steps:
    raise RunFolderError(
      f"steps={config.steps}: expected at least {found.step}, the newest "
      f"checkpoint of {folder.path}. To train from an earlier one, delete the "
      "later ones with `rebased checkpoints`"
    )
  changes = config_changes(
    found.meta,
    config,
    folder,
    allow_data_change,
    allow_optimizer=allow_optimizer_change,
  )
  notes = [f"warning: {broken}" for broken in found.broken]
  notes += _newer_steps_that_are_gone(folder, found)
  notes += [
    f"from step {earlier.step}: {', '.join(earlier.changes)}"
    for earlier in folder.read_history()
    if earlier.step < found.step
  ]
  notes += [
    change if _is_free(change) else f"warning: {change}" for change in changes
  ]
  notes += _change_of_rate(found, config)
  notes.append(f"resuming at step {found.step}")
  state = compiled_steps.from_dicts(found.state, built.abstract)
  return state, found.step, found.meta, notes


def _change_of_rate(found: Restored, config: RunConfig) -> list[str]:
  """Return a line if the next step has another learning rate than it had."""
  saved = from_dict(found.meta["config"], "checkpoint")
  old, new = (
    float(optimizer.schedule(x.optimizer, x.steps, np)(found.step))
    for x in (saved, config)
  )
  if old == new:
    return []
  return [f"learning rate of step {found.step}: {old:.3g} → {new:.3g}"]


def _newer_steps_that_are_gone(folder: RunFolder, found: Restored) -> list[str]:
  newest = max([found.step, *(broken.step for broken in found.broken)])
  saved = folder.last_save()
  if saved is None or saved <= newest:
    return []
  return [f"warning: step {saved} was saved, and its checkpoint is gone"]


def config_changes(
  meta: dict[str, Any],
  config: RunConfig,
  folder: RunFolder,
  allow: bool,
  *,
  allow_optimizer: bool = False,
) -> list[str]:
  """Return how config and data differ from those of a checkpoint, a line each.

  Paths may differ if the data in them is the same. Steps and optimiser may
  differ as the folder's history says: a resume that was killed before its first
  save has written it.

  Args:
    meta: what the checkpoint says of itself.
    config: the run now.
    folder: its folder.
    allow: whether the data may differ.
    allow_optimizer: whether steps and optimiser may differ.

  Raises:
    RunFolderError: something differs that may not.
  """
  changed = changes_since(meta, config)
  noted = [_outcome(x) for past in folder.read_history() for x in past.changes]

  def may_change(change: str) -> bool:
    if is_about_optimizer(change):
      return allow_optimizer or _outcome(change) in noted
    return _is_free(change) or (allow and is_about_data(change))

  refused = [change for change in changed if not may_change(change)]
  if refused:
    only_optimizer = all(is_about_optimizer(x) for x in refused)
    hint = "; --allow-optimizer-change trains on with the new values"
    raise RunFolderError(
      f"{folder.path}: its checkpoint is of another config: "
      f"{'; '.join(refused)}{hint if only_optimizer else ''}"
    )
  return changed + data_changes(meta, config, folder, allow)


def changes_since(meta: dict[str, Any], config: RunConfig) -> list[str]:
  """Return how the config differs from that of a checkpoint, a line each.

  Args:
    meta: what the checkpoint says of itself; {} if there is none.
    config: the run now.
  """
  if not meta:
    return []
  saved = from_dict(meta["config"], "checkpoint").with_absolute_paths()
  return differences(saved, config)


def _outcome(change: str) -> tuple[str, str]:
  """Return the field of a change, and its new value."""
  return change.partition(":")[0], change.rpartition(" → ")[2]


def _is_free(change: str) -> bool:
  return is_about_work(change) or is_about_paths(change)


def check_optimizer_state(
  config: RunConfig, built: Built, folder: RunFolder
) -> None:
  """Check that the optimiser of a resumed run keeps the arrays of its state.

  Raises:
    RunFolderError: it does not.
  """
  if not folder.config_file.exists():
    return
  stored = folder.read_config()
  if stored.optimizer == config.optimizer:
    return
  tx = optimizer.make(stored.optimizer, stored.steps)
  before = jax.eval_shape(tx.init, built.abstract.params)

  def arrays(state: Any) -> list[Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(path, x.shape, x.dtype) for path, x in leaves]

  if arrays(before) != arrays(built.abstract.opt_state):
    changed = [x for x in differences(stored, config) if is_about_optimizer(x)]
    raise RunFolderError(
      f"{'; '.join(changed)}: expected a change that keeps the arrays of the "
      "optimiser's state. `rebased train --config "
      f"{folder.config_file} --init-from {folder.path}` starts a new run from "
      "the weights, with such options"
    )


def data_changes(
  meta: dict[str, Any], config: RunConfig, folder: RunFolder, allow: bool
) -> list[str]:
  """Return how the data's content differs from that of a checkpoint.

  Args:
    meta: what the checkpoint says of itself.
    config: the run now.
    folder: named in messages.
    allow: whether the data may differ.

  Raises:
    RunFolderError: the data differs and `allow` is False.
    ValueError: the data has tokens that the model does not know.
  """
  check_vocabulary(config)
  data = config.data.train_batches(config.batch, config.seed)
  held_out = config.data.eval_batches(config.micro_batch, config.seed)
  saved = [("", meta["data"], data)]
  if "held_out_data" in meta:  # not in checkpoints of before
    saved.append(("held out: ", meta["held_out_data"], held_out))
  changes = []
  for name, old, batches in saved:
    # What counts as recall may differ: it changes no row.
    new = {k: x for k, x in batches.fingerprint.items() if k != "recall_limit"}
    old = {k: x for k, x in old.items() if k != "recall_limit"}
    try:
      batches_lib.check_fingerprint(old, new)
    except ValueError as error:
      changes.append(f"{name}{error}")
  if changes and not allow:
    hint = "; --allow-data-change uses the new data"
    raise RunFolderError(f"{folder.path}: {changes[0]}{hint}")
  return changes


def try_data(config: RunConfig) -> None:
  """Make a training batch and a held-out batch, and drop them.

  Raises:
    ValueError: the data cannot be made, or does not fit the model.
  """
  check_vocabulary(config)
  data, micro_batch = config.data, config.micro_batch
  train = data.train_batches(config.batch, config.seed)
  batches_lib.check_storable(train)
  batch, V = train.read(0), config.model.vocab_size
  check_batch(batch, data.fields(config.batch), "train_batches")
  check_tokens(train, 0, 0, batch, V)
  held_out = data.eval_batches(micro_batch, config.seed)
  if held_out.num_batches is None:
    raise ValueError(
      f"{type(data).__name__}.eval_batches: num_batches is None: expected a "
      "number: held-out batches must end"
    )
  batches_lib.check_storable(held_out)
  batch = held_out.read(0)
  check_batch(batch, data.eval_fields(micro_batch), "eval_batches")
  check_tokens(held_out, 0, 0, batch, V)
  steps = range(held_out.num_batches)
  # The first batch has a target in all but strange cases, so one is read.
  some = any(held_out.read(step)["weights"].any() for step in steps)
  if not some:
    raise ValueError(
      f"{type(data).__name__}.eval_batches: every weight of its {len(steps)} "
      "batches is 0: expected held-out rows with a target"
    )


def check_vocabulary(config: RunConfig) -> None:
  """Check that the model has an embedding for every token of the data.

  Data that does not say its vocabulary is sampled. The rest is checked when a
  batch is read.

  Raises:
    ValueError: it does not.
  """
  needed = config.data.read_vocab_size()
  require(
    needed is None or config.model.vocab_size >= needed,
    "model.vocab_size",
    config.model.vocab_size,
    f"at least {needed}, the vocabulary of the data",
  )
  config.data.check_files(config.model.vocab_size)
