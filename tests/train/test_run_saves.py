"""What must not keep a run from saving: numbers, data, evaluations, signals."""

import math
from pathlib import Path

import numpy as np
import pytest
from train_cases import Spoiled, run, tiny, trainer as trainer

from train import evaluate, metrics
from train.checkpoint.checkpoints import Checkpoints, read_meta
from train.config import MQARStreamData
from train.nonfinite_steps import TrainingFailed
from train.records.run_folder import RunFolder


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_stops_no_save(
  tmp_path: Path, monkeypatch, number: float
) -> None:
  folder, config = tmp_path / "run", tiny(steps=4, save_every=1, eval_every=1)
  found = dict(loss=number, accuracy=number, tokens=40.0)
  monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: found)
  make = MQARStreamData.train_batches
  with monkeypatch.context() as patch:
    patch.setattr(
      MQARStreamData, "train_batches", lambda *args: Spoiled(make(*args), 3)
    )
    with pytest.raises(TrainingFailed, match="step 3 is not finite"):
      run(config, folder)
  for checkpoints, step in (
    (folder / "checkpoints", 3),
    (folder / "failed-step-3" / "checkpoints", 3),
  ):
    saved, meta = read_meta(checkpoints)
    assert saved == step and repr(meta["held_out"]) == repr(found)
  outcome, _ = run(config, folder)
  assert outcome.reason == "finished"
  assert repr(outcome.held_out) == repr(found)
  records = RunFolder(folder).read_metrics()
  losses = [x["loss"] for x in records if x["kind"] == "eval"]
  assert repr(losses) == repr(4 * [number])


def test_every_number_of_meta_is_saved(tmp_path: Path) -> None:
  meta = dict(numbers=[math.inf, -math.inf, math.nan, 1e308, 5e-324, 2**70])
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {"a": np.ones(1)}, meta)
  assert repr(read_meta(tmp_path)) == repr((0, meta))


def test_a_derived_metric_is_a_plain_number(monkeypatch) -> None:
  square = metrics.DerivedMetric("square", "loss", np.float32)
  monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, square))
  found = metrics.with_derived(dict(loss=2.0), text=False)
  assert type(found["square"]) is float and found["square"] == 2
