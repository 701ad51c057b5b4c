"""`rebased sweep`: its grid, its table and plot, and its errors."""

import jax
import pytest

from rebased_jax import AttentionConfig
from train import cli
from train.commands import run_cells
from train.experiments import own_sweep, record as records

_SMALL = (
  *("--data.vocab-size", "64", "--data.length", "16", "--data.pairs", "2"),
  *("--data.examples", "128", "--data.epochs", "2", "--batch", "64"),
  *("--steps", "4", "--optimizer.epoch-steps", "2"),
  *("--model.vocab-size", "64", "--model.positions", "16"),
)
_GRID = ("--rates", "1e-3", "1e-2", "--seeds", "1", "2", "--widths", "12", "24")
_PRESET = "mqar-paper-based-128"


def _sweep(capsys, *args):
  with pytest.raises(SystemExit) as end:
    cli.main(["sweep", *args])
  out, err = capsys.readouterr()
  return end.value.code, out + err


def _train(cells):
  """Return a `run_cell` that trains nothing and keeps the cells."""

  def run_cell(name, cell, folder, **_):
    cells[name] = cell
    history = records.History.empty(cell)
    for field in jax.tree.leaves(history.arrays()):
      field[:] = 1.0
    history.accuracy_ER[:] = [0.1, 0.3, 0.4, 0.8]
    record = records.make(cell, history, name=name, commit=None, seconds=7.0)
    records.write(folder / f"{name}.json", record)
    return record

  return run_cell


def test_a_sweep_is_a_cell_a_width(tmp_path, capsys, monkeypatch):
  cells = {}
  monkeypatch.setattr(run_cells, "run_cell", _train(cells))
  monkeypatch.chdir(tmp_path)
  code, out = _sweep(capsys, _PRESET, *_SMALL, *_GRID)
  assert code == 0 and "0.6000 ± 0.2828 over 2 seeds at rate 0.01" in out
  assert list(cells) == [f"{_PRESET}-d12", f"{_PRESET}-d24"]
  for width, cell in zip((12, 24), cells.values(), strict=True):
    assert cell.run.model.width == width
    assert (cell.rates, cell.seeds) == ((1e-3, 1e-2), (1, 2))
    assert (cell.epochs, cell.epoch_steps) == (2, 2)
  folder = tmp_path / "sweeps" / _PRESET
  page = (folder / "sweep.md").read_text()
  assert "| 24 | 0.001 | 0.2000 ± 0.1414 | 2 | 2 of 2 | 0 |" in page
  assert "| 12 | **0.01** | 0.6000 ± 0.2828 | 2 | 2 of 2 | 0 |" in page
  assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

  # Another system has its own folder.
  other = ("--model.mixer", "attention", "--model.mixer.heads", "2")
  with monkeypatch.context() as patch:
    patch.setattr(own_sweep, "write", lambda name, *_: [name])
    code, out = _sweep(capsys, _PRESET, *_SMALL, *_GRID[:6], *other)
  assert f"wrote {_PRESET}-attention" in out
  assert code == 0 and list(cells)[2:] == [f"{_PRESET}-attention-d64"]
  second = cells[f"{_PRESET}-attention-d64"].run.model.second
  assert isinstance(second, AttentionConfig) and second.heads == 2

  # Another grid in the same folder leaves the records as they are.
  cells.clear()
  code, out = _sweep(capsys, _PRESET, *_SMALL, "--rates", "0.1", *_GRID[-3:])
  assert code == 0 and not cells and out.count("left as it is") == 2
  assert (folder / "sweep.md").read_text() == page


def test_a_wrong_sweep_is_an_error_that_names_it(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for args, expected in (
    (["lm-tiny"], "the data is TextData: expected MQAR"),
    (["mqar", "--steps", "170"], "--steps=170: expected a multiple"),
    (["mqr"], "did you mean"),
    ([_PRESET, "--steps", "5"], "--steps=5: expected a multiple"),
    ([_PRESET, "--rates", "0"], "--rates=(0.0,): expected positive"),
    (
      [_PRESET, "--model.mixer", "x"],
      "--model.mixer='x': expected None or one",
    ),
    ([_PRESET, "--seeds", "1", "1"], "--seeds=(1, 1): expected different"),
    ([_PRESET, "--init-from", "x"], "--init-from='x': expected None"),
    ([_PRESET, "--widths", "0"], "--widths=(0,): expected integers"),
  ):
    code, out = _sweep(capsys, *args)
    assert code == 2 and expected in out, out
  assert not list(tmp_path.iterdir())
