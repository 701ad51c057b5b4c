"""Documents agree with the records in `benchmarks/results`."""

import json
from pathlib import Path

from benchmarks.scaling import run as scaling
from benchmarks.training import gradient_error, paired_runs

_DOC = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def test_the_tables_are_those_of_the_record() -> None:
  rows = json.loads(scaling.PATH.read_text())
  assert scaling.tables(rows) in _DOC
  assert "the compiler's" in _DOC.splitlines()[2]


def test_a_row_is_of_its_command() -> None:
  rows = json.loads(scaling.PATH.read_text())
  assert set(rows) <= set(scaling.CASES)
  for name, row in rows.items():
    case = scaling.CASES[name]
    assert row["command"] == case.command, name
    config = scaling.config_of(case)
    assert row["rows"] * row["length"] == row["tokens"]
    assert row["accumulate"] == config.accumulate
    assert (row["found"] is None) == (row["reason"] is not None)
    if row["found"] is not None:
      parts = ("arguments", "temporary", "code")
      assert row["memory"] == sum(row["found"][x] for x in parts)


def test_recorded_kills_end_in_the_same_bits() -> None:
  record = json.loads((scaling.PATH.parent / "kills.json").read_text())
  trials = record["trials"].values()
  assert record["trials"].keys() == {"mqar", "lm-tiny"}
  assert sum(len(x["each"]) for x in trials) >= 30
  for trial in trials:
    assert trial["same_bits"] and trial["arrays"] > 60
    assert all(trial["fell_in"].values())  # none of the moments is missing


def test_recorded_faults_end_with_a_name_and_in_the_same_bits() -> None:
  record = json.loads((scaling.PATH.parent / "faults.json").read_text())
  assert len(record["trials"]) >= 13
  for name, trial in record["trials"].items():
    assert trial["ok"] and trial["same_bits"], name
    assert trial["seconds"] < record["limit_s"], name


def test_recorded_verdicts_are_those_of_todays_conditions() -> None:
  read = lambda name: json.loads((scaling.PATH.parent / name).read_text())
  record = read("paired_runs.json")
  again = "judge it again with `--judge`"
  assert record["verdict"] == paired_runs.judge(record["runs"]), again
  record = read("gradient_error.json")
  assert record["verdict"] == gradient_error.judge(record["points"]), again
