"""Test `rebased compare`: the table and the plot of several runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from train_cases import call as call, tiny, trainer as trainer

from rebased_jax import BaseConvConfig, MixerConfig
from train.records.run_folder import RunFolder


def _run(
  folder: Path,
  *records: dict[str, Any],
  mixer: MixerConfig | None = None,
  **changes: Any,
) -> str:
  folder.mkdir(parents=True)
  run, config = RunFolder(folder), tiny(**changes)
  if mixer is not None:
    model = dataclasses.replace(config.model, second=mixer)
    config = dataclasses.replace(config, model=model)
  run.open(config)
  run.metrics_file.write_text("".join(json.dumps(x) + "\n" for x in records))
  return str(folder)


def _eval(step: int, loss: float, accuracy: float) -> dict[str, Any]:
  return dict(kind="eval", step=step, loss=loss, accuracy=accuracy)


def _train(step: int, loss: float, rate: float) -> dict[str, Any]:
  return dict(kind="train", step=step, loss=loss, tokens_per_second=rate)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
  """A folder of four runs: two whole ones, a killed one, one that is new."""
  folder = tmp_path / "runs"
  _run(
    folder / "first",
    _train(2, 3.0, 10.0),
    _eval(2, 2.5, 0.25),
    _train(4, 1.0, 30.0),
    _eval(4, 2.75, 0.5),
    steps=4,
  )
  _run(
    folder / "second", _eval(4, float("nan"), 0.125), steps=4, batch=16, seed=3
  )
  killed = _run(folder / "killed", _train(2, 12345.678, 20.0), steps=4)
  with open(Path(killed, "metrics.jsonl"), "a") as file:
    file.write('{"kind": "eval", "st')
  _run(folder / "new", steps=4)
  return folder


def _table(out: str) -> dict[str, list[str]]:
  """Return the values of each row; the columns are split by two spaces."""
  rows = {}
  for line in out.splitlines():
    label, *values = line.strip().split("  ")
    rows.setdefault(label, []).extend(x.strip() for x in values if x.strip())
  return rows


def test_runs_side_by_side(call, runs: Path, tmp_path: Path) -> None:
  names = ("first", "second", "killed", "new")
  paths = [str(runs / x) for x in names]
  code, out, err = call("compare", *paths, "--out", str(tmp_path / "p.png"))
  assert (code, err) == (0, "")
  rows = _table(out)
  assert rows["run"] == list(names)
  default = tiny(steps=4)
  first = [str(default.batch), str(default.seed)]
  assert rows["batch"] == [first[0], "16", first[0], first[0]]
  assert rows["seed"] == [first[1], "3", first[1], first[1]]
  assert rows["step"] == ["4, finished", "4, finished", "2 of 4", "0 of 4"]
  assert rows["training loss"] == ["1", "–", "12,346", "–"]
  assert rows["held-out loss"] == ["2.75", "nan", "–", "–"]
  assert rows["best loss"] == ["2.5 at 2", "–", "–", "–"]
  assert rows["best accuracy"] == ["0.5 at 4", "0.125 at 4", "–", "–"]
  assert rows["tokens/s, median"] == ["20", "–", "20", "–"]
  for same in ("steps", "model.second", "held-out perplexity", "MFU, median"):
    assert same not in rows
  assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_runs_and_other_mixers(call, runs: Path) -> None:
  _run(runs / "zconv", mixer=BaseConvConfig(taps=5), steps=8)
  code, out, _ = call("compare", str(runs), "--out", "none")
  assert code == 0 and list(Path.cwd().glob("*.png")) == []
  rows = _table(out)
  assert rows["run"] == ["first", "killed", "new", "second", "zconv"]
  assert rows["model.second"][-1] == "BaseConv(taps=5)"
  assert rows["model.second"][0].startswith("ReBased(heads=2")
  assert "model.second.taps" not in rows
  assert rows["steps"] == ["4", "4", "4", "4", "8"]


def test_inspect_of_several_runs_compares_them(call, runs: Path) -> None:
  for words in ([str(runs)], [str(runs / "first"), str(runs / "new")]):
    code, out, _ = call("inspect", *words)
    assert code == 0 and _table(out)["run"][:1] == ["first"]
    assert "held-out loss" in out and list(Path.cwd().glob("*.png")) == []


def test_names_are_as_long_as_they_must_be(call, tmp_path: Path) -> None:
  paths = [_run(tmp_path / x / "run", steps=4) for x in ("one", "two")]
  _, out, _ = call("compare", *paths, "--out", "none")
  assert _table(out)["run"] == ["one/run", "two/run"]


def test_the_best_of_averaged_weights(call, tmp_path: Path) -> None:
  records = [
    {**_eval(step, 1.0, 0.5), "ema_accuracy": x, "ema_ar_share": 0.5}
    for step, x in ((2, 0.75), (4, 0.25))
  ]
  first = _run(tmp_path / "first", *records, steps=4)
  new = _run(tmp_path / "new", steps=4)
  code, out, _ = call("compare", first, new, "--out", "none")
  rows = _table(out)
  assert code == 0
  assert rows["best accuracy, averaged weights"][:1] == ["0.75 at 2"]
  # The share belongs to the data, so the average has no second row for it.
  assert "AR share of targets, averaged weights" not in out


def test_a_run_that_reached_its_accuracy_says_so(call, tmp_path: Path) -> None:
  paths = [
    _run(tmp_path / name, _eval(2, 1.0, x), steps=4, stop_accuracy=0.5)
    for name, x in (("above", 0.75), ("equal", 0.5))
  ]
  _, out, _ = call("compare", *paths, "--out", "none")
  assert _table(out)["step"] == ["2 of 4, accuracy reached", "2 of 4"]


def test_what_cannot_be_compared(call, runs: Path, tmp_path: Path) -> None:
  first = str(runs / "first")
  for words, expected in (
    ([], "found 0 run: expected two or more"),
    ([first, first], "found 1 run: expected two or more"),
    ([first, str(tmp_path / "none")], "none: expected the folder of a run"),
    ([str(runs), "--out", "no/x.png"], "--out no/x.png: expected a folder"),
  ):
    code, out, err = call("compare", *words)
    assert code == 2 and expected in err and out == ""
