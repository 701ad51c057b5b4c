"""Test the messages about wrong options: one line that names what to type."""

import dataclasses
import typing

import pytest
from train_cases import tiny

from rebased_jax.presets import SYSTEMS
from train import cli
from train.commands import parsing
from train.commands.arguments import SystemArg, parse_preset
from train.commands.train import TrainArgs
from train.config import RunConfig
from train.presets import make_presets, with_system
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
  "file": (
    ["--config", "f"],
    "--config with mqar: expected `rebased train --c",
  ),
  "nothing alike": (["--zzzz", "x"], "there is no option --zzzz\n"),
  "argument": (["more"], "'more' is one argument too many; `rebased"),
  "without dashes": (["steps=3"], "'steps=3' is one argument too many; did "),
  "value of a switch": (
    ["--tensorboard", "yes"],
    "'yes' is one argument too many: --tensorboard takes no value, and --no-t",
  ),
  "one of the past": (["--resume", "x"], "--resume; did you mean --run-dir?"),
  "no value": (["--steps"], "--steps: expected a value after it"),
  "not a number": (["--steps", "many"], "--steps='many': expected an integer"),
  "not a number or None": (
    ["--stop-accuracy", "x"],
    "--stop-accuracy='x': expected None or a number",
  ),
  "choice": (["--nan", "x"], "--nan='x': expected one of ('abort', 'skip')"),
  "dtype": (
    ["--model.dtype", "bf16"],
    "--model.dtype='bf16': expected one of ('float32', 'bfloat16', 'float16', "
    "'float64'); did you mean 'bfloat16'?",
  ),
  "not used by the rule": (
    ["--optimizer.name", "sgd", "--optimizer.beta2", "0.9"],
    "--optimizer.beta2=0.9: expected 0.999, its default: sgd does not use it",
  ),
  "mixer": (["--model.second.heads", "0"], "--model.second.heads=0: expected"),
  "no system": (
    ["--model.mixer", "mambo"],
    "--model.mixer='mambo': expected None or one of ('attention', 'based'",
  ),
  "mixer of both layers": (
    ["--model.mixer", "attention", "--model.mixer.heads", "0"],
    "--model.first.heads=0: expected an integer ≥ 1",
  ),
  "mixer's synonym": (
    ["--model.mixer.feature-dim", "8"],
    "--model.second.feature-dim; did you mean --model.second.features",
  ),
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


def test_help_stands_before_or_behind_a_verb(capsys) -> None:
  for words in (["help", "presets"], ["presets", "--help"], ["train", "help"]):
    with pytest.raises(SystemExit) as stop:
      cli.main(words)
    shown = capsys.readouterr().out
    assert not stop.value.code and "usage: rebased " in shown
    assert words[words[0] == "help"] in shown.splitlines()[0]


def test_names_of_fields_become_options() -> None:
  options = ["--data.vocab-size", "--steps"]
  for message, expected in (
    ("data.vocab_size=3: a", "--data.vocab-size=3: a"),
    ("below steps=2", "below --steps=2"),
    ("--steps=2", "--steps=2"),
    ("data.vocab_size: 3 → 4; other: 1 → 2", "--data.vocab-size: 3 → 4; oth"),
    ("other=2", "other=2"),
  ):
    assert parsing.as_options(message, options).startswith(expected)


def _trained(*args: str) -> RunConfig:
  """Return the run that the arguments of `rebased train` ask for."""
  return parse_preset(TrainArgs, "train", list(args))[1].run


def test_an_option_chooses_the_system_of_a_preset() -> None:
  presets = make_presets()
  names, _ = typing.get_args(typing.get_args(SystemArg)[0])
  assert typing.get_args(names) == tuple(SYSTEMS)
  for name, system, expected in (
    ("mqar", "attention", "mqar-attention"),
    ("mqar-mamba", "rebased", "mqar"),
    ("mqar-paper-rwkv-512", "based", "mqar-paper-based-512"),
    ("mqar-paper-ablation-x2-256", "based", "mqar-paper-ablation-based-256"),
    ("lm-tiny-hyena", "rebased", "lm-tiny"),
    ("lm-tiny", "mamba", "lm-tiny-mamba"),
    ("pile-157m-rebased-long", "based", "pile-157m-based-long"),
    ("pile-1.3b-based", "attention", "pile-1.3b-attention"),
  ):
    assert _trained(name, "--model.mixer", system) == presets[expected], name
  # After it come the options of the mixer, in each layer that has it.
  model = _trained(
    "mqar",
    *("--model.mixer.heads", "2", "--model.mixer=double-based"),
    *("--model.second.features", "8", "--steps", "700"),
  ).model
  assert (model.first.heads, model.second.heads) == (2, 2)
  assert (model.first.features, model.second.features) == (16, 8)
  hybrid = _trained("mqar", "--model.mixer.heads=2").model
  assert (
    hybrid.second.heads == 2 and hybrid.first == presets["mqar"].model.first
  )


def test_another_rule_leaves_what_it_does_not_use() -> None:
  """The preset's beta2 and final rate are not those of a rule without them."""
  preset = make_presets()["lm-tiny"].optimizer
  other = ("--optimizer.name", "sgd", "--optimizer.schedule=constant")
  found = _trained("lm-tiny", *other).optimizer
  assert (found.name, found.schedule) == ("sgd", "constant")
  assert (preset.beta2, preset.final_fraction) == (0.95, 0.1)
  assert (found.beta2, found.final_fraction) == (0.999, 0.0)
  assert _trained("lm-tiny", "--optimizer.name=muon").optimizer.beta2 == 0.95


def test_a_system_that_no_preset_has_replaces_the_mixers() -> None:
  presets = make_presets()
  for name, system in (
    ("mqar-paper-rebased-2048", "hyena"),
    ("pile-157m-rebased", "attention"),
    ("pile-145m-based-long", "conv-hyena"),
    ("pile-127m-attention", "double-rebased"),
  ):
    run, old = with_system(name, system), presets[name]
    assert type(run.model.second) is type(SYSTEMS[system].second), name
    mixers = dict(first=old.model.first, second=old.model.second)
    model = dataclasses.replace(run.model, **mixers)
    assert dataclasses.replace(run, model=model) == old
  kept = with_system("pile-157m-rebased", "double-based").model
  assert kept.first == kept.second and kept.first.heads == 64
  with pytest.raises(
    ValueError, match="--model.mixer mamba: expected a system"
  ):
    with_system("pile-157m-rebased", "mamba")


def test_the_config_of_a_run_stands_instead_of_a_preset(
  tmp_path, capsys
) -> None:
  file = tmp_path / "mine" / "config.json"
  file.parent.mkdir()
  file.write_text(to_json(tiny(seed=7)))
  for words in (["--config", str(file)], [f"--config={file}"]):
    name, parsed = parse_preset(TrainArgs, "train", [*words, "--steps", "9"])
    assert name == "mine" and parsed.run == tiny(seed=7, steps=9)
  named = file.with_name("named.json")
  file.rename(named)
  file.write_text("{}")
  for args, expected in (
    (["--config"], "--config: expected a file"),
    (["--config", "none"], "--config none: "),
    (["--config", str(tmp_path)], "expected the config.json of a run"),
    (["--config", str(file)], "version=None: expected 2"),
    (["--config", str(named), "--model.mixer", "rwkv"], "expected a preset"),
  ):
    with pytest.raises(SystemExit) as stop:
      cli.main(["train", *args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and expected in err, err
