"""The page that compares us with other libraries names its evidence.

Each entry of ours is checked by a test that exists. Each entry of another
library has a file in which it was read. That the entries of the others are
right cannot be tested here.
"""

import ast
from pathlib import Path
import re

import pytest

pytestmark = pytest.mark.quick

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "compared.md").read_text()
_OTHERS = ("FLA", "MaxText", "levanter", "zoology", "nanodo")


def _rows(columns: int) -> dict[int, list[str]]:
  """Return the numbered rows of all tables with so many columns."""
  lines = re.findall(r"^\| (\d+) \| (.*) \|$", _PAGE, flags=re.MULTILINE)
  cells = [(int(number), rest.split(" | ")) for number, rest in lines]
  found = [(number, row) for number, row in cells if len(row) == columns - 1]
  assert len(found) == len(dict(found)), "a number is there twice"
  return dict(found)


_FEATURES = _rows(8)  # number, feature, ours, five others
_EVIDENCE = _rows(3)  # number, our tests, files of the others


def test_every_row_has_its_evidence():
  assert list(_FEATURES) == list(range(1, len(_FEATURES) + 1))
  assert list(_EVIDENCE) == list(_FEATURES)
  for number, (feature, ours, *others) in _FEATURES.items():
    tests, files = _EVIDENCE[number]
    assert (ours == "no") == (tests == "–"), f"row {number}: {feature}"
    for name, entry in zip(_OTHERS, others, strict=True):
      read = re.search(rf"(^|; ){name} `", files)
      assert read or entry in ("no", "–"), f"row {number}: {name}: {entry}"


def test_the_tests_exist():
  named = [x for tests, _ in _EVIDENCE.values() for x in tests.split(", ")]
  for name in named:
    if name == "–":
      continue
    path, function = name.strip("`").split("::")
    tree = ast.parse((_ROOT / path).read_text())
    defined = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
    assert function in defined, name
