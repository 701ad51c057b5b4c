"""Examples are short. CI runs each one, from an installed wheel."""

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_EXAMPLES = sorted((_ROOT / "examples").glob("*.py"))
_LONGEST = 60  # lines


def test_there_are_examples() -> None:
  assert len(_EXAMPLES) > 4


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_shows(path: Path) -> None:
  text = path.read_text()
  assert text.count("\n") < _LONGEST
  if path.stem != "quickstart":  # the README shows it, with words around it
    assert ast.get_docstring(ast.parse(text))


def test_ci_runs_every_example() -> None:
  assert "for example in examples/*.py" in (_ROOT / ".ci" / "run").read_text()
