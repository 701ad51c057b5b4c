"""`docs/scaling.md` says what `benchmarks/results/scaling.json` does."""

import json
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling

_DOC = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()


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
