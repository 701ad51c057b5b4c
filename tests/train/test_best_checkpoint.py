"""The checkpoints that stay, and the best of them."""

import io
import math
from pathlib import Path

from checkpoint_cases import names
import jax.numpy as jnp
import pytest
from rich.console import Console
from train_cases import call as call, tiny, trainer as trainer

from train import best_checkpoint, metrics, stored_config
from train.checkpoint import checkpoints as checkpoints_lib, orbax_storage
from train.checkpoint.checkpoints import Checkpoints, saved_steps
from train.commands import checkpoints as checkpoints_command
from train.records.run_folder import RunFolder

_LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 4.0, 12: 5.0, 14: 6.0}
_CONFIG = tiny(steps=14, keep_best="loss")


def _meta(step: int, loss: float, **others) -> dict:
  config = stored_config.to_dict(_CONFIG)
  held_out = dict(loss=loss, accuracy=loss / 10)
  rest = dict(held_out=held_out, held_out_step=step, finished=None)
  return dict(config=config, **rest | others)


def _save(
  directory: Path, losses: dict, run: str | None = None, **kept
) -> None:
  with Checkpoints(directory, run=run, **kept) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(step, {"params": {"x": jnp.ones(2)}}, _meta(step, loss))


def test_the_newest_every_nth_and_the_best_stay(tmp_path: Path) -> None:
  kept = dict(keep=1, keep_every=6, score=best_checkpoint.score_by("loss"))
  first, rest = dict(list(_LOSSES.items())[:3]), dict(list(_LOSSES.items())[3:])
  _save(tmp_path, first, **kept)
  assert saved_steps(tmp_path) == [4, 6]
  # The scores of before are read, and of equal ones the newest is best.
  _save(tmp_path, {10: 4.0}, **kept)
  assert saved_steps(tmp_path) == [4, 6, 10]
  _save(tmp_path, {x: rest[x] for x in (12, 14)} | {16: 1.0, 18: 2.0}, **kept)
  assert saved_steps(tmp_path) == [6, 12, 16, 18]
  assert names(tmp_path) == {"6", "12", "16", "18"}


def test_a_damaged_best_step_does_not_stay(tmp_path: Path) -> None:
  kept = dict(keep=1, score=best_checkpoint.score_by("loss"))
  _save(tmp_path, {2: 1.0, 4: 3.0}, **kept)
  (record,) = (tmp_path / "2" / "record").glob("*.json")
  record.write_text("{}")
  _save(tmp_path, {6: 2.0, 8: 3.0}, **kept)
  assert saved_steps(tmp_path) == [6, 8]


def test_metrics_of_another_step_do_not_count() -> None:
  score = best_checkpoint.score_by("loss")
  assert score(4, _meta(4, 0.5)) == 0.5
  assert best_checkpoint.score_by("accuracy")(4, _meta(4, 0.5)) == -0.05
  assert score(4, _meta(4, 0.5, held_out_step=2)) is None
  assert score(4, _meta(4, math.nan)) is None
  assert best_checkpoint.score_by("perplexity")(4, _meta(4, 0.5)) is None
  # Runs of before do not say the step: it evaluates every 2 of 14.
  for step, due, expected in (
    (4, False, 0.5),
    (5, False, None),
    (4, True, None),
  ):
    meta = _meta(step, 0.5, evaluation_due=due)
    del meta["held_out_step"]
    assert score(step, meta) == expected


def test_only_metrics_of_the_run_rank_its_checkpoints() -> None:
  best_checkpoint.check(_CONFIG)
  for name in ("perplexity", "ar_loss", "grad_norm", "ema_loss", "los"):
    with pytest.raises(ValueError, match=f"keep_best='{name}': .*loss, accura"):
      best_checkpoint.check(tiny(keep_best=name))
  best_checkpoint.check(tiny(keep_best="ema_loss", ema=0.9))
  assert metrics.better("ema_accuracy") == "higher"
  text = metrics.ranking(text=True, recall=True, averaged=False)
  assert {"perplexity", "ar_perplexity", "non_ar_loss"} < {*text}
  few = metrics.ranking(text=True, recall=False, averaged=False)
  assert few == ["loss", "accuracy", "perplexity"]


@pytest.mark.parametrize(
  "changes, expected",
  [
    (dict(keep_every=3), "keep_every=3: expected a multiple of save_every=2"),
    (dict(keep_every=0), "keep_every=0: expected None or an integer ≥ 1"),
    (dict(keep_best=2), "keep_best=2: expected None or the name of"),
    (dict(keep_best="loss", eval_every=4), "save_every=2: expected a multiple"),
  ],
)
def test_what_never_stays_is_refused(changes: dict, expected: str) -> None:
  with pytest.raises(ValueError) as error:
    tiny(**changes)
  assert expected in str(error.value)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
  """Return a run with checkpoints at the steps of `_LOSSES` up to 8."""
  folder = RunFolder(tmp_path / "run")
  folder.open(_CONFIG)
  losses = {step: x for step, x in _LOSSES.items() if step <= 8}
  _save(folder.checkpoints, losses, run=folder.run_id(), keep=9)
  folder.note_save(8)
  return folder


def test_the_best_is_marked_and_found(run: RunFolder, call) -> None:
  code, out, _ = call("checkpoints", str(run.path))
  assert code == 0
  assert [x.split()[1] for x in out.splitlines() if "best by loss" in x] == [
    "8"
  ]
  assert best_checkpoint.find(run.path, "best") == 8
  assert best_checkpoint.find(run.path, 4) == 4
  assert best_checkpoint.find(run.path, None) is None
  for verb in ("evaluate", "generate", "export"):
    words = {"generate": ["--prompt", "x"], "export": ["--out", "o"]}.get(
      verb, []
    )
    code, _, err = call(verb, str(run.path), *words, "--step", "bets")
    assert code == 2 and "--step='bets': expected None, an integer or be" in err
  exported = run.path / "exported"
  exported.mkdir()
  (exported / "config.json").write_text('{"format": "rebased_jax", "model": 1}')
  (exported / "model.safetensors").touch()
  with pytest.raises(ValueError, match="exported model, which has no steps"):
    best_checkpoint.find(exported, "best")
  with run.locked():
    run.update(tiny(steps=14, keep_best="perplexity"))
  with pytest.raises(
    ValueError, match="no checkpoint of .* has a held-out perp"
  ):
    best_checkpoint.find(run.path, "best")


def test_steps_are_deleted_unless_none_is_left(run: RunFolder, call) -> None:
  path, steps = str(run.path), lambda: saved_steps(run.checkpoints)
  for words, expected in (
    (("--delete", "3"), "there is no step 3: expected some of 2, 4, 6, 8"),
    (("--delete", "2", "4", "6", "8"), "no readable checkpoint would be left"),
    (("--delete",), "--delete: expected the steps after it"),
    (("--delete", "x"), "--delete='x': expected None or integers"),
    (("--force",), "--force: expected the steps to --delete, too"),
  ):
    code, _, err = call("checkpoints", path, *words)
    assert code == 2 and expected in err and steps() == [2, 4, 6, 8]
  with run.locked():
    code, _, err = call("checkpoints", path, "--delete", "2")
  assert code == 2 and "another process is training" in err and 2 in steps()
  (record,) = (run.checkpoints / "4" / "record").glob("*.json")
  record.write_text("{}")
  code, _, err = call("checkpoints", path, "--delete", "2", "6", "8")
  assert code == 2 and "no readable checkpoint would be left" in err
  code, out, _ = call("checkpoints", path, "--delete", "4", "8")
  assert code == 0 and "deleted step 8\ndeleted step 4" in out
  assert steps() == [2, 6] and run.last_save() == 6
  code, out, _ = call("checkpoints", path, "--delete", "2", "6", "--force")
  assert code == 0 and "no checkpoint yet" in out
  assert steps() == [] and run.last_save() is None
  run.check_checkpoints()


def test_a_kill_while_a_step_is_deleted_leaves_no_half_step(
  run: RunFolder, monkeypatch
) -> None:
  class Killed(BaseException):
    pass

  def rmtree(path) -> None:
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(type(run.path), "rmtree", rmtree)
    with pytest.raises(Killed):
      checkpoints_lib.delete(run.checkpoints, 8)
  assert saved_steps(run.checkpoints) == [2, 4, 6]
  assert len(names(run.checkpoints)) == 4
  _save(run.checkpoints, {10: 1.0}, run=run.run_id(), keep=9)
  assert names(run.checkpoints) == {"2", "4", "6", "10"}
  with pytest.raises(orbax_storage.CheckpointError, match="cannot be deleted"):
    checkpoints_lib.delete(run.checkpoints, 8)


def test_the_table_of_checkpoints_fits_a_terminal() -> None:
  """Text with averaged weights has more metrics than 80 columns hold."""
  held_out = dict.fromkeys(metrics.table_labels(), 1.5)
  found = {10: {"held_out": held_out}, 20: {}, 30: None}
  table = checkpoints_command._table(found, 10, "ar_perplexity")
  console = Console(width=80, file=io.StringIO())
  console.print(table)
  text = console.file.getvalue()
  assert "…" not in text and text.count("1.5000") == 5
  for word in ("accuracy", "averaged", "best by", "unreadable"):
    assert word in text
