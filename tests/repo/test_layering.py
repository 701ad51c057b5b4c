"""Imports go one way between the packages."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

_ROOT = Path(__file__).parents[2]
# Each package may import these, the standard library and what lies beneath.
_PACKAGES = {
  "pallas_kernels": {"jax", "numpy"},
  "rebased_jax": {"jax", "numpy", "flax", "pallas_kernels"},
}
_STORAGE = "train/checkpoint"  # the only files that know orbax
_FILES = sorted(
  path.relative_to(_ROOT).as_posix()
  for package in (*_PACKAGES, "train", "tests")
  for path in (_ROOT / package).rglob("*.py")
)


def _tree(file: str) -> ast.Module:
  return ast.parse((_ROOT / file).read_text())


def _imports(file: str) -> set[str]:
  found = set()
  for node in ast.walk(_tree(file)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}: a relative import"
      found.add(node.module)
  return {name.partition(".")[0] for name in found}


def test_there_is_something_to_check() -> None:
  assert {file.partition("/")[0] for file in _FILES} == {
    *_PACKAGES,
    "train",
    "tests",
  }


@pytest.mark.parametrize("package", _PACKAGES)
def test_a_package_imports_what_lies_beneath_it(package) -> None:
  allowed = _PACKAGES[package] | {package} | sys.stdlib_module_names
  for file in _FILES:
    if file.startswith(f"{package}/"):
      assert _imports(file) <= allowed, file


@pytest.mark.parametrize("file", _FILES)
def test_nothing_imports_tests_and_orbax_stays_in_its_files(file) -> None:
  imports = _imports(file)
  if file.startswith("tests/"):
    return
  helpers = {Path(f).stem for f in _FILES if f.startswith("tests/")}
  assert not imports & {"tests", "pytest", *helpers}
  if not file.startswith(_STORAGE):
    assert "orbax" not in imports


def test_importing_needs_no_trainer() -> None:
  code = "import sys, rebased_jax, rebased_jax.presets, rebased_jax.linen\n"
  code += "names = {name.partition('.')[0] for name in sys.modules}\n"
  code += "print(names & {'train', 'orbax', 'tyro', 'grain'})"
  run = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout == "set()\n"
