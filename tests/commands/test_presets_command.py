"""Test the catalogue: every preset is in it, with its number of parameters."""

from pathlib import Path

import pytest

from rebased_jax import parameter_count
from train import cli, compiled_steps
from train.presets import catalogue, make_presets

_PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
_CONFIGS = make_presets()
_ONE_OF_EACH = (
  "mqar",
  "mqar-mamba",
  "mqar-paper-rebased-512",
  "mqar-paper-ablation-gamma-2048",
  "lm-tiny",
)


def test_every_preset_is_in_the_catalogue_and_on_the_page(capsys) -> None:
  assert set(catalogue.PRESETS) == set(_CONFIGS)
  assert len(catalogue.PRESETS) == sum(
    len(group.presets) for group in catalogue.CATALOGUE
  )
  assert _PAGE.read_text() == catalogue.as_markdown()
  with pytest.raises(SystemExit) as stop:
    cli.main(["presets"])
  shown = capsys.readouterr().out
  assert not stop.value.code
  for name, preset in catalogue.PRESETS.items():
    assert f"  {name} " in shown and f"{preset.parameters:,}" in shown
  assert max(map(len, shown.splitlines())) <= 80
  assert catalogue.PRESETS["mqar"].ended in shown


def _assert_counted(name: str) -> None:
  model = compiled_steps.abstract_lm(_CONFIGS[name].model)
  assert parameter_count(model) == catalogue.PRESETS[name].parameters


@pytest.mark.parametrize("name", _ONE_OF_EACH)
def test_parameters(name: str) -> None:
  _assert_counted(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(_CONFIGS) - set(_ONE_OF_EACH)))
def test_parameters_of_all(name: str) -> None:
  _assert_counted(name)


@pytest.mark.parametrize(
  "name, expected",
  [
    (
      "mqar-paper-rebased-300",
      "mean mqar-paper-rebased-128 or mqar-paper-rebased-256?",
    ),
    ("mqar-paper-rebased-4096", "mean mqar-paper-rebased-1024 or"),
    ("pile-157-rebased", "pile-157m-rebased"),
    ("zzz", "'zzz'. `rebased presets` lists all"),
  ],
)
def test_an_unknown_name_has_the_nearest(name: str, expected: str) -> None:
  with pytest.raises(ValueError) as error:
    catalogue.check_name(name)
  assert expected in str(error.value)
