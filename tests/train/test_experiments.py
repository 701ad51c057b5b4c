"""The paper's experiments: their cells, tables, plots and command."""

import dataclasses
import itertools
import json
from pathlib import Path
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from rebased_jax import presets
from train import cli
from train.commands import run_cells
from train.experiments import (
  claims,
  drawings,
  page,
  paper,
  record as records,
  results,
)
from train.experiments.claims import Claim
from train.experiments.run_cell import run_cell
from train.experiments.sweep import Epoch

_EXPERIMENTS = paper.make_experiments()


def test_a_name_means_one_cell_in_all_experiments():
  keys = {}
  for experiment in _EXPERIMENTS.values():
    for name, cell in experiment.cells.items():
      assert keys.setdefault(name, records.key(cell)) == records.key(cell)
  assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("name", _EXPERIMENTS)
def test_names_say_what_the_cells_are(name):
  experiment = _EXPERIMENTS[name]
  for cell_name, cell in experiment.cells.items():
    where = results.place(cell_name)
    assert where.length == cell.run.data.length
    assert where.width == cell.run.model.width
    # One cosine over 64 epochs, stepped at each epoch, and no warm-up.
    assert cell.epochs == 64
    assert cell.run.optimizer.epoch_steps == cell.epoch_steps
    assert cell.precision == "highest" and cell.run.stop_accuracy == 0.99
  published = {results.place(each).length for each in experiment.published}
  lengths = {results.place(each).length for each in experiment.cells}
  assert published <= lengths
  for each in experiment.quick:
    small = paper.make_small(experiment.cells[each])
    assert small.run.data.length <= 32 and small.epochs == 2


def test_table_1_has_the_papers_means():
  published = _EXPERIMENTS["table-1"].published
  means = {
    (variant, length): np.mean(
      [
        published[f"ablation-{variant}-L{length}-d{width}"].mean
        for width in paper.TABLE_1_WIDTHS
      ]
    )
    for variant in ("based", "x2", "norm", "gamma", "gamma-beta", "rebased")
    for length in (256, 2048)
  }
  # The paper's column of means. Both it and the entries have two digits.
  printed = {
    256: (0.58, 0.54, 0.57, 0.51, 0.61, 0.63),
    2048: (0.51, 0.44, 0.58, 0.48, 0.60, 0.61),
  }
  for length, values in printed.items():
    mine = [mean for (_, at), mean in means.items() if at == length]
    np.testing.assert_allclose(mine, values, atol=0.01)


def test_expected_best_is_the_mean_over_all_draws():
  values = [0.3, 0.9, 0.1, 0.6]
  for n, (biased, unbiased) in enumerate(
    zip(
      results.expected_best(values),
      results.expected_best_unbiased(values),
      strict=True,
    ),
    start=1,
  ):
    with_replacement = itertools.product(values, repeat=n)
    without = itertools.combinations(values, n)
    assert biased == pytest.approx(np.mean([max(x) for x in with_replacement]))
    assert unbiased == pytest.approx(np.mean([max(x) for x in without]))


def _record(cell, name, accuracy):
  """A record of two epochs, as `record.make` returns it."""
  history = records.History.empty(cell)
  for field in jax.tree.leaves(history.arrays()):
    field[:2] = 1.0
  history.accuracy_ER[:2] = [[0.1] * len(cell.runs), accuracy]
  return records.make(cell, history, name=name, commit=None, seconds=1.0)


def test_a_table_has_ours_beside_the_papers(tmp_path):
  experiment = _EXPERIMENTS["figure-1"]
  name = "rebased-L256-d64"
  cell = experiment.cells[name]  # 4 rates × 2 seeds
  accuracy = [0.5, 0.7, 0.8, 0.6, 0.2, 0.2, 0.1, 0.1]
  record = _record(cell, name, accuracy)
  records.write(tmp_path / "cells" / f"{name}.json", record)
  page, picture = results.write(experiment, tmp_path)
  rows = {
    line.split(" | ")[0].strip("| "): line
    for line in page.read_text().splitlines()
  }
  # The rate with the best mean over seeds, 0.7, deviates by 0.1 · √2.
  ours = "0.7000 ± 0.1414 | 2 | 0.0005, **0.001**, 0.003, 0.01 | 2 of 64, "
  assert f"| ≈ 0.97 | {ours}" in rows[name]
  assert "not run" in rows["based-L256-d64"]
  assert "1 of 34 cells" in page.read_text()
  assert picture.read_bytes().startswith(b"\x89PNG")
  # One seed has no deviation, which is not 0.
  alone = dataclasses.replace(cell, seeds=cell.seeds[:1])
  assert results.ours(_record(alone, name, [0.5, 0.7, 0.8, 0.6])).startswith(
    "0.8000 | 1 | "
  )


def test_a_config_with_a_new_field_keeps_its_records(tmp_path):
  """A field that a config gets later has its default in earlier records."""
  experiment = _EXPERIMENTS["figure-1"]
  name = "conv-attention-L128-d64"
  cell = experiment.cells[name]
  record = _record(cell, name, [0.5] * 8)
  del record["run"]["model"]["scan_layers"]
  records.write(tmp_path / f"{name}.json", record)
  with pytest.raises(records.RecordError, match="expected '.*' for the config"):
    results.read_cells(experiment, tmp_path)
  record["key"] = records._key(record["run"], cell)
  records.write(tmp_path / f"{name}.json", record)
  assert results.read_cells(experiment, tmp_path) == {name: record}


def test_a_record_of_fewer_runs_is_shown_as_what_it_is(tmp_path, capsys):
  experiment = _EXPERIMENTS["table-1"]
  name = "ablation-based-L256-d32"
  whole = experiment.cells[name]
  cell = dataclasses.replace(whole, rates=(3e-3,), seeds=(42, 43))
  record = _record(cell, name, [0.8, 0.6])
  records.write(tmp_path / "cells" / f"{name}.json", record)
  page, _ = results.write(experiment, tmp_path)
  ours = "0.7000 ± 0.1414 | 2 | **0.003** | 2 of 64, 2 of 2 runs cut short"
  assert ours in page.read_text()
  # A run that ends by itself is not cut short.
  run = record["runs"][0]
  for ended in ({"finite": False}, {"best_accuracy": 1.0}, {"epochs": 64}):
    assert not records.is_cut(record, run | ended), ended
  with pytest.raises(records.RecordError, match="rates or seeds differ"):
    run_cell(name, whole, tmp_path / "cells")
  args = "table-1", "--only", name, "--out", str(tmp_path)
  code, out, _ = _command(capsys, *args)
  assert code == 0 and "left as it is" in out


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rates": ()}, r"^rates=\(\): expected at least one"),
    ({"rates": (0.1, 0.1)}, "expected different values"),
    ({"rates": (0.0,)}, r"^rates=\(0.0,\): expected positive"),
    ({"rates": (float("nan"),)}, "expected positive"),
    ({"seeds": (-1,)}, r"^seeds=\(-1,\): expected integers, 0"),
  ],
)
def test_a_wrong_grid_is_refused(change, message):
  cell = _EXPERIMENTS["table-1"].cells["ablation-based-L256-d32"]
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(cell, **change)


def test_the_page_is_what_the_records_say():
  """`rebased experiment page` has been run after the last change."""
  root = Path(__file__).parents[2]
  written = (root / "docs" / "results.md").read_text()
  assert page.text(root / "benchmarks/results/experiments") == written
  for picture in re.findall(r"\]\((figures/.*?)\)", written):
    assert (root / "docs" / picture).exists(), picture


def test_the_page_shows_gammas_and_expected_bests(tmp_path):
  name = "ablation-rebased-L256-d32"
  cell = _EXPERIMENTS["table-1"].cells[name]  # 3 rates × 5 seeds
  accuracy = [0.2] * 5 + [0.8] * 5 + [0.5] * 5
  records.write(tmp_path / f"cells/{name}.json", _record(cell, name, accuracy))
  (tmp_path / "parameters.json").write_text(
    json.dumps(dict.fromkeys(presets.make_models(), 7))
  )
  text = page.text(tmp_path)
  assert f"| {name} | 0.003 | 2 | 1.000 ± 1.000 |" in text
  # The mean of 0.2, 0.5 and 0.8 is that of one draw.
  assert f"| {name} | 5 | 0.500 | " in text
  assert f"- {name}: ours 0.800, the paper's 0.86 ± 0.08." in text
  # Three widths of ours were not run. 0.63 is the paper's mean.
  assert "| 0.80 ± 0.00 / 0.86 ± 0.08 | – / 0.99 ± 0.00 | – / 0.63 |" in text
  assert "2 of 64, 15 of 15 runs cut short" in text
  pictures = drawings.write(tmp_path, tmp_path / "figures")
  names = {"table-1", "figure-2", "figure-4", "figure-10"}
  assert {path.stem for path in pictures} == names
  assert all(path.stat().st_size > 10_000 for path in pictures)


def test_the_page_shows_ious_at_the_best_epoch(tmp_path):
  name = "iou-rebased-L128-d48"
  cell = _EXPERIMENTS["table-3"].cells[name]  # 2 rates × 3 seeds
  record = _record(cell, name, [0.2, 0.2, 0.2, 0.9, 0.8, 0.7])
  for run in record["runs"]:
    run["iou"]["soft"] = [0.0, run["best_accuracy"] / 10]
  records.write(tmp_path / f"cells/{name}.json", record)
  (tmp_path / "parameters.json").write_text(
    json.dumps(dict.fromkeys(presets.make_models(), 7))
  )
  row = f"| {name} | 0.173 | 0.080 ± 0.010 (1.000 ± 0.000) | "
  assert row in page.text(tmp_path)
  # Of the first seed at the best rate, which is the fourth of the six runs.
  found = record["attention"]
  assert (found["learning_rate"], found["seed"]) == (3e-3, 42)
  assert np.shape(found["right_columns"]) == (3, 32)
  found["weights"] = np.full((3, 32, 64), 0.75 / 63)
  rows, queries = np.indices((3, 32))
  found["weights"][rows, queries, found["right_columns"]] = 0.25
  found["weights"] = found["weights"].tolist()
  records.write(tmp_path / f"cells/{name}.json", record)
  text = page.text(tmp_path)
  assert f"| {name} | 0.250 | 0.750 | 63.0 of 63 |" in text
  pictures = drawings.write(tmp_path, tmp_path / "figures")
  names = {path.stem for path in pictures if path.stat().st_size > 10_000}
  assert {"figure-5", "figure-8", "figure-9"} <= names
  assert records.cell_of(record) == cell


def test_attention_is_that_of_the_best_epoch():
  cell = _EXPERIMENTS["table-3"].cells["iou-rebased-L128-d48"]
  cell = dataclasses.replace(cell, rates=(3e-3,), seeds=(42, 43))
  history = records.History.empty(cell)
  weights = np.ones((2, 3, 32, 64), np.float32)
  for number, accuracy in enumerate(([0.2, 0.5], [0.9, 0.4], [0.9, 0.1])):
    ones = np.ones(2, np.float32)
    epoch = Epoch(
      number=number,
      runs=(0, 1),
      active_R=np.ones(2, bool),
      finite_R=np.ones(2, bool),
      accuracy_R=np.asarray(accuracy, np.float32),
      loss_R=ones,
      train_loss_R=ones,
      metrics_SR={},
      affine_R2={},
      iou_R=dict.fromkeys(history.iou_ER, ones),
      attention_R=(number + 1) * weights,
      seconds=1.0,
    )
    history.add(epoch)
  stored = records.History.from_arrays(history.arrays())
  np.testing.assert_array_equal(stored.attention_R[0], 2 * weights[0])
  np.testing.assert_array_equal(stored.attention_R[1], weights[1])


def test_verdicts_of_claims():
  name = lambda system: f"ablation-{system}-L256-d48"
  cells = _EXPERIMENTS["table-1"].cells
  high = _record(cells[name("rebased")], "a", [0.9, 0.8, 0.7] * 3)
  low = _record(cells[name("x2")], "b", [0.3, 0.2, 0.1] * 3)
  found = {"high": high, "low": low}
  check = lambda above, below: claims.check(Claim("", above, below), found)
  better, worse, missing, number = (
    check("high", "low"),
    check("low", "high"),
    check("high", "other"),
    check(0.5, "low"),
  )
  assert better.verdict == number.verdict == "reproduced"
  assert worse.verdict == "not reproduced" and missing.verdict == "not run"
  # Welch: 0.6 / √(0.1² / 3 + 0.1² / 3) = 7.35 with four degrees of freedom.
  assert better.p == pytest.approx(0.00182, abs=1e-5)
  assert number.p is None and missing.p is None
  unclear = dataclasses.replace(better, p=0.2)
  assert unclear.verdict == "same order"
  assert claims.verdict([unclear, missing]) == "same order so far"
  assert claims.verdict([better, unclear]) == "partly"
  assert claims.verdict([better, number]) == "reproduced"
  assert claims.verdict([better, missing]) == "reproduced so far"
  assert claims.verdict([better, worse, missing]) == "partly"
  assert claims.verdict([worse]) == "not reproduced"
  assert claims.verdict([missing]) == claims.verdict([]) == "not run"


def test_a_record_of_another_cell_is_refused(tmp_path):
  experiment = _EXPERIMENTS["figure-1"]
  cell = experiment.cells["rebased-L128-d64"]
  record = _record(cell, "x", [0.5] * 8)
  records.write(tmp_path / "cells" / "rebased-L256-d64.json", record)
  with pytest.raises(records.RecordError, match="is of another cell"):
    results.write(experiment, tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "no readable record"),
    ("5", "version=None: expected"),
    ('["kind"]', "version=None: expected"),
    ("[]", "version=None: expected 2"),
    (json.dumps({"version": 1}), "version=1: expected 2"),
    (json.dumps({"kind": "text, 1"}), "is of a language model of Table 2"),
  ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, content, message):
  path = tmp_path / "cell.json"
  path.write_text(content)
  with pytest.raises(records.RecordError, match=message):
    records.read(path)


def _command(capsys, *args):
  with pytest.raises(SystemExit) as end:
    cli.main(["experiment", *args])
  out, err = capsys.readouterr()
  return end.value.code, out, err


def test_list_counts_what_was_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  cell = _EXPERIMENTS["figure-1"].cells["rebased-L128-d64"]
  record = _record(cell, "rebased-L128-d64", [0.5] * 8)
  records.write(tmp_path / "cells" / "rebased-L128-d64.json", record)
  code, out, _ = _command(capsys, "list", "--out", str(tmp_path))
  assert code == 0
  assert "1 of 34 cells" in out and "0 of 30 cells" in out
  assert "0.5000 ± 0.0000" in out and "8 runs, 2/64" in out
  assert "no records" not in out
  _, out, _ = _command(capsys, "list", "--out", str(tmp_path / "none"))
  assert "no records" in out and "benchmarks/results/experiments" in out


def test_a_cell_is_told_when_the_minutes_are_over(tmp_path, monkeypatch):
  now, told = [0.0], []

  def run_cell(name, cell, folder, *, stop, report):
    for now[0] in (59.0, 61.0):
      told.append(stop())

  monkeypatch.setattr(run_cells, "run_cell", run_cell)
  monkeypatch.setattr(run_cells.time, "monotonic", lambda: now[0])
  cell = _EXPERIMENTS["figure-1"].cells["rebased-L128-d64"]
  cells = dict.fromkeys(("first", "second"), cell)
  code = run_cells.run_cells(cells, {}, tmp_path, 1.0, Console(quiet=True))
  assert told == [False, True] and code == 0  # the second has not begun


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["figure-11"], "there is no experiment 'figure-11'; did you mean"),
    (["figure-1", "--only", "nothing*"], "--only nothing*: expected a pattern"),
    (["verify", "missing.json"], "missing.json: no readable record"),
  ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, args, message):
  if args[0] != "verify":
    args = [*args, "--out", str(tmp_path)]
  code, _, err = _command(capsys, *args)
  assert code == 2 and message in err
  assert not list(tmp_path.iterdir())
