"""Test the messages about wrong options: one line that names what to type."""

import pytest
from train_cases import tiny

from train import cli
from train.commands import parsing
from train.commands.arguments import parse_preset
from train.commands.train import TrainArgs
from train.stored_config import to_json

_WRONG = {
  "synonym": (["--lr", "1e-3"], "no option --lr; did you mean --optimizer."),
  "with a value": (["--lr=1e-3"], "no option --lr; did you mean --optimizer."),
  "place": (["--num-layers", "4"], "--num-layers; did you mean --model.pairs?"),
  "misspelt": (["--optimiser.beta1", "0"], "mean --optimizer.beta1"),
  "two": (["--batch-size", "4", "--lr", "1"], "--batch-size; did you mean --b"),
  "other preset": (
    ["--data.path", "x"],
    "--data.path with mqar: expected a preset such as lm-tiny",
  ),
  "nothing alike": (["--zzzz", "x"], "there is no option --zzzz\n"),
  "argument": (["more"], "'more' is one argument too many"),
  "no value": (["--steps"], "Missing value for argument '--steps'"),
  "not a number": (["--steps", "many"], "--steps: invalid literal for int()"),
  "not a number or None": (
    ["--stop-accuracy", "x"],
    "--stop-accuracy: expected {None}|FLOAT, not 'x'",
  ),
  "choice": (["--nan", "x"], "Expected one of ('abort', 'skip')"),
  "dtype": (
    ["--model.dtype", "bf16"],
    "--model.dtype='bf16': expected one of ('float32', 'bfloat16', 'float16', "
    "'float64'); did you mean 'bfloat16'?",
  ),
  "mixer": (["--model.second.heads", "0"], "--model.second.heads=0: expected"),
  "optimizer": (["--optimizer.beta1", "2"], "--optimizer.beta1=2.0: expected"),
  "two fields": (
    ["--data.vocab-size", "512"],
    "--model.vocab-size=256: expected at least --data.vocab-size=512",
  ),
}


@pytest.mark.parametrize("name", _WRONG)
def test_a_wrong_option_is_one_line(capsys, name: str) -> None:
  args, expected = _WRONG[name]
  with pytest.raises(SystemExit) as stop:
    cli.main(["train", "mqar", *args])
  err = capsys.readouterr().err
  assert stop.value.code == 2 and err.startswith("rebased: ")
  assert expected in err
  assert "─" not in err and "--------" not in err and "run." not in err


def test_a_missing_argument_is_named(capsys) -> None:
  with pytest.raises(SystemExit) as stop:
    cli.main(["tokenizer", "train", "x"])
  assert stop.value.code == 2
  assert "rebased: missing: --out STR " in capsys.readouterr().err


def test_names_of_fields_become_options() -> None:
  options = ["--data.vocab-size", "--steps"]
  for message, expected in (
    ("data.vocab_size=3: a", "--data.vocab-size=3: a"),
    ("below steps=2", "below --steps=2"),
    ("--steps=2", "--steps=2"),
    ("other=2", "other=2"),
  ):
    assert parsing.as_options(message, options) == expected


def test_the_config_of_a_run_stands_instead_of_a_preset(
  tmp_path, capsys
) -> None:
  file = tmp_path / "mine" / "config.json"
  file.parent.mkdir()
  file.write_text(to_json(tiny(seed=7)))
  for words in (["--config", str(file)], [f"--config={file}"]):
    name, parsed = parse_preset(TrainArgs, "train", [*words, "--steps", "9"])
    assert name == "mine" and parsed.run == tiny(seed=7, steps=9)
  file.write_text("{}")
  for args, expected in (
    (["--config"], "--config: expected a file"),
    (["--config", "none"], "--config none: "),
    (["--config", str(tmp_path)], "expected the config.json of a run"),
    (["--config", str(file)], "version=None: expected 2"),
  ):
    with pytest.raises(SystemExit) as stop:
      cli.main(["train", *args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and expected in err, err
