"""Test the command line: errors, help, and the output of the verbs."""

import json
from pathlib import Path
import re
import shutil
import subprocess
import sys

import jax
import pytest
from train_cases import (
  ROOT,
  built_once as built_once,
  call as call,
  environment,
  files,
  flags,
  run,
  tiny,
  trainer as trainer,
)

import rebased_jax
from rebased_jax import parameter_count
from train import compiled_steps
from train.records.run_folder import RunFolder
from train.stored_config import to_json

pytestmark = pytest.mark.usefixtures("built_once")

_TINY = flags(tiny())


def _train(*options: str) -> tuple[str, ...]:
  return ("train", "mqar", *_TINY, *options)


_REFUSED = {
  "unknown command": (("trian",), ["command 'trian'", "mean 'train'? Known"]),
  "unknown preset": (("train", "mqarr"), ["preset 'mqarr'", "mean mqar"]),
  "no preset": (("train",), ["expected a preset", "rebased train mqar"]),
  "unknown option": (_train("--step", "3"), ["--step", "--steps"]),
  "not a number": (_train("--steps", "many"), ["--steps", "many"]),
  "steps": (_train("--steps", "0"), ["steps=0"]),
  "warm-up": (
    _train("--steps", "2"),
    ["--optimizer.warmup-steps=2", "below --steps=2"],
  ),
  "odd length": (_train("--data.length", "15"), ["length=15", "even"]),
  "too many pairs": (
    _train("--data.pairs", "5"),
    ["--data.pairs=5", "at most length/4=4"],
  ),
  "positions": (
    _train("--data.length", "18"),
    ["--model.positions=16", "at least --data.length=18"],
  ),
  "vocabulary": (
    _train("--data.vocab-size", "64"),
    ["--model.vocab-size=32", "at least --data.vocab-size=64"],
  ),
  "accumulate": (
    _train("--accumulate", "3"),
    ["batch=8", "=3; --accumulate 4 would fit"],
  ),
  "devices": (
    _train("--batch", "12"),
    ["batch=12", "=1; --batch 8 or --batch 16 would fit"],
  ),
  "devices and micro-batches": (
    _train("--accumulate", "2"),
    [
      "batch=8",
      "8 devices × --accumulate=2; --accumulate 1 or --batch 16 would fit",
    ],
  ),
  "mesh": (
    _train("--mesh.fsdp", "3"),
    ["mesh='fsdp 3 × context 1 × tensor 1'", "divides the 8 devices"],
  ),
  "context": (
    _train("--mesh.context", "8", "--data.length", "12", "--batch", "8"),
    ["data.length=12", "a multiple of --mesh.context=8"],
  ),
  "distributed": (
    _train("--distributed", "yes"),
    ["distributed='yes'", "auto"],
  ),
  # The other processes are joined before jax is asked for them.
  "distributed, best step": (
    ("evaluate", "gs://no/run", "--step", "best", "--distributed", "yes"),
    ["distributed='yes'", "auto"],
  ),
  "too many steps": (
    ("train", "mqar-paper-rebased-128", "--steps", "12545"),
    ["steps=12545", "12544 batches"],
  ),
  "too many rows": (
    ("train", "mqar-paper-rebased-512", "--batch", "131072"),
    ["rows=131072", "at most examples=100000 with drop_last"],
  ),
  "init-from": (
    _train("--init-from", "none"),
    ["none does not exist: expected"],
  ),
  "resume": (("resume", "none"), ["none does not exist: expected"]),
  "evaluate": (("evaluate", "none"), ["none does not exist: expected"]),
  "inspect": (
    ("inspect", "mqar-papr-rebased-128"),
    ["no preset, model, run folder", "mean 'mqar-paper-rebased-128'"],
  ),
  "doctor": (("doctor", "--all"), ["no options", "--all"]),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_a_wrong_argument_is_an_error_that_names_it(call, name: str) -> None:
  args, expected = _REFUSED[name]
  code, out, err = call(*args)
  assert code == 2
  for text in expected:
    assert text in out + err
  assert "Traceback" not in err
  assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("word", ["--version", "version", "-V"])
def test_version(call, word: str) -> None:
  assert call(word) == (0, f"rebased {rebased_jax.__version__}\n", "")


def test_no_command(call) -> None:
  code, out, _ = call()
  assert code == 2 and "rebased train PRESET" in out


@pytest.mark.quick
def test_help(call) -> None:
  for args in (["--help"], ["-h"], ["help"], ["train", "--help"]):
    code, out, err = call(*args)
    assert (code, err) == (0, "") and "rebased train PRESET" in out
  for args, option in (
    (["train", "mqar", "--help"], "--optimizer.learning-rate"),
    (["resume", "--help"], "The run's folder"),
    (["evaluate", "--help"], "--step"),
    (["inspect", "--help"], "The name of a preset or of a model, or a folder."),
    (["compare", "--help"], "Folders of runs"),
  ):
    code, out, _ = call(*args)
    assert code == 0 and option in out
  assert list(Path.cwd().iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("run") / "finished"
  run(tiny(), folder)
  return folder


def test_train_refuses_a_folder_of_another_config(call, finished: Path) -> None:
  before = files(finished)
  options = ("--model.width", "32", "--seed", "3", "--run-dir", str(finished))
  code, _, err = call(*_train(*options))
  assert code == 2
  assert "model.width: 16 → 32" in err and "seed: 0 → 3" in err
  assert str(finished) in err and "steps" not in err
  assert files(finished) == before


def test_a_folder_of_other_files_is_left_alone(call, tmp_path: Path) -> None:
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("chapter 1")
  before = files(tmp_path / "mine")
  for args in (
    _train("--run-dir", str(tmp_path / "mine")),
    _train("--init-from", str(tmp_path / "mine")),
    ("resume", str(tmp_path / "mine")),
    ("evaluate", str(tmp_path / "mine")),
    ("inspect", str(tmp_path / "mine")),
  ):
    code, _, err = call(*args)
    assert code == 2 and str(tmp_path / "mine") in err
    assert files(tmp_path / "mine") == before
    assert list(Path.cwd().iterdir()) == []


def _changed(change) -> str:
  data = json.loads(to_json(tiny()))
  change(data)
  return json.dumps(data)


_CORRUPT = {
  "empty": ("", "not JSON"),
  "cut": (_changed(lambda x: None)[:-9], "not JSON"),
  "not text": ("\udcff", "decode"),
  "a list": ("[]", "version=None: expected 2"),
  "version 1": (
    _changed(lambda x: x.update(version=1)),
    "version=1: expected 2",
  ),
  "version": (_changed(lambda x: x.update(version=3)), "version=3: expected 2"),
  "no run": (
    _changed(lambda x: x.update(run=3)),
    "run has type int: expected train:RunConfig",
  ),
  "type": (
    _changed(lambda x: x["run"]["model"]["second"].update({"class": "Mamba"})),
    "run.model.second.class='Mamba'",
  ),
  "field": (
    _changed(lambda x: x["run"]["optimizer"].update(momentum=1)),
    "run.optimizer: ",
  ),
  "value": (_changed(lambda x: x["run"].update(batch=-8)), "batch=-8"),
}


@pytest.mark.parametrize("name", _CORRUPT)
def test_a_config_that_cannot_be_read(call, tmp_path: Path, name: str) -> None:
  text, expected = _CORRUPT[name]
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
  before = files(folder)
  for args in (
    _train("--run-dir", str(folder)),
    ("resume", str(folder)),
    ("evaluate", str(folder)),
    ("inspect", str(folder)),
  ):
    code, _, err = call(*args)
    assert code == 2 and "Traceback" not in err
    assert str(folder / "config.json") in err and expected in err
    if name == "field":
      assert "momentum" in err
  assert files(folder) == before


def test_evaluate_prints_the_recorded_numbers(call, finished: Path) -> None:
  records = {
    x["step"]: x
    for x in RunFolder(finished).read_metrics()
    if x["kind"] == "eval"
  }
  before = files(finished)
  for step, args in ((6, ()), (2, ("--step", "2"))):
    code, out, _ = call("evaluate", str(finished), *args)
    assert code == 0
    numbers = dict(re.findall(r"│ ([\w -]+?) +│ +([\d.,]+) │", out))
    assert numbers == {
      "step": f"{step}",
      "held-out accuracy": f"{records[step]['accuracy']:.4f}",
      "held-out loss": f"{records[step]['loss']:.4f}",
      "targets": "40",
    }
  assert records[2]["loss"] != records[6]["loss"]
  assert files(finished) == before
  code, _, err = call("evaluate", str(finished), "--step", "3")
  assert code == 2 and "no step 3, only [2, 4, 6]" in err


def test_inspect_shows_presets_runs_and_checkpoints(
  call, finished: Path
) -> None:
  count = parameter_count(compiled_steps.abstract_model(tiny()))
  code, out, _ = call("inspect", "mqar-paper-rebased-2048", "--all")
  assert code == 0
  for name, value in (
    ("steps", "12480"),
    ("accumulate", "8"),
    ("data.length", "2048"),
    ("model.second.eps", "1e-12"),
  ):
    assert re.search(rf"│ {name} +│ +{value} │", out), name
  code, out, _ = call("inspect", "mqar-paper-rebased-2048")
  for name, value in (
    ("mixers", r"BaseConv and ReBased\(eps=1e-12\)"),
    ("parameters", "693,440"),
    ("batch", "512 rows, 64 at a time, 1,048,576 tokens"),
    ("steps", "12,480, or to a held-out accuracy above 0.99"),
  ):
    assert re.search(rf"│ {name} +│ +{value} │", out), name
  code, out, _ = call("inspect", str(finished))
  assert code == 0 and re.search(rf"│ parameters +│ +{count:,} │", out)
  assert len(out.splitlines()) < 60 and "layer1/" not in out
  code, out, _ = call("inspect", str(finished), "--all")
  assert code == 0 and re.search(rf"│ all +│ +│ +{count:,} │", out)
  assert "layer1/query_gamma_mean" in out
  assert re.search(r"│ token_embedding +│ +\(32, 16\) +│ +512 │", out)
  size = compiled_steps.abstract_model(tiny()).state_size(16)
  assert f"state of a sequence: {size:,} bytes" in out
  loss = RunFolder(finished).read_metrics()[-1]["loss"]
  assert re.search(rf"│ loss +│ +{loss:.4g} │", out)
  assert "newest checkpoint: step 6, finished" in out
  code, out, _ = call("inspect", str(finished / "checkpoints" / "4"))
  assert code == 0 and re.search(r"│ step +│ +4 │", out)
  assert re.search(r"│ data.length +│ +16 │", out)
  assert re.search(r"│ finished +│ +None │", out)
  code, out, _ = call("inspect", "mqar", "--mesh.fsdp", "4")
  assert code == 0 and "mesh: fsdp 4" in out and "model.second.heads" not in out
  assert re.search(r"token_embedding +│ \(256, 64\) +│ –, fsdp +│ +4,096", out)
  code, out, _ = call("inspect", str(finished), "--mesh.tensor", "5")
  assert code == 0 and re.search(
    "heads=2 is not a multiple of mesh.tensor=5", out
  )
  assert "token_embedding: tensor: 32 is not a multiple of 5" in out
  code, _, err = call("inspect", str(finished / "checkpoints" / "5"))
  assert code == 2 and "no step 5" in err


def test_checkpoints_are_listed_with_their_metrics(
  call, finished: Path, tmp_path: Path
) -> None:
  losses = {
    x["step"]: x["loss"]
    for x in RunFolder(finished).read_metrics()
    if x["kind"] == "eval"
  }
  before = files(finished)
  code, out, _ = call("checkpoints", str(finished))
  assert code == 0 and "their held-out metrics" in out
  for step, state in ((2, "can be resumed"), (4, "can be"), (6, "finished")):
    row = next(x for x in out.splitlines() if x.startswith(f"│    {step} │"))
    assert f" {losses[step]:.4f} " in row and state in row
  assert files(finished) == before

  copy = tmp_path / "copy"
  shutil.copytree(finished, copy)
  shutil.rmtree(copy / "checkpoints" / "4" / "record")
  code, out, _ = call("checkpoints", str(copy))
  assert code == 1 and re.search(r"│ +4 │ +– │ +– │ unreadable", out)
  assert "checkpoint: step 4: " in out and "finished" in out

  code, _, err = call("checkpoints", str(tmp_path))
  assert code == 2 and "no run folder" in err


def test_doctor_shows_versions_and_devices(call) -> None:
  code, out, _ = call("doctor")
  assert code == 0
  assert re.search(rf"│ jax +│ +{re.escape(jax.__version__)} │", out)
  assert len(re.findall(r"│ \d +│ +cpu: ", out)) == 8
  assert "polynomial attention" in out and "xla" in out


def test_the_script_runs_beside_a_users_train_py(
  tmp_path: Path, trainer: Path
) -> None:
  """The console script does not put the working directory on the path."""
  (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
  script = Path(sys.executable).parent / "rebased"
  if not script.exists():
    pytest.skip("the package is not installed")
  environ = environment(trainer)
  del environ["PYTHONPATH"]
  _assert_inspects([str(script)], tmp_path, environ)


def test_python_m_train_runs_from_the_checkout(trainer: Path) -> None:
  environ = environment(trainer)
  del environ["PYTHONPATH"]
  _assert_inspects([sys.executable, "-m", "train"], ROOT, environ)


def _assert_inspects(words: list[str], cwd: Path, environ: dict) -> None:
  found = subprocess.run(
    [*words, "inspect", "mqar"],
    cwd=cwd,
    env=environ,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert found.returncode == 0, found.stderr
  assert re.search(r"│ steps +│ +2,000, or", found.stdout)
