"""Names of our packages exist wherever a file mentions them.

Benchmarks, GPU tests and slow tests do not run with the default tests. Without
this check, a renamed function would be noticed only when they run again.
"""

import ast
from collections.abc import Iterator
import importlib
import pathlib
import re
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("pallas_kernels", "rebased_jax", "train")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "tools", "examples")
_ABSENT = object()
_UNKNOWN = object()  # imports a package that is not installed here


def missing_names(source: str) -> list[str]:
  """Return `line: module.name` for each name of our packages that is absent."""
  tree = ast.parse(source)
  modules: dict[str, types.ModuleType] = {}
  missing = []
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and _is_ours(node):
      module = _import(node.module or "")
      if not isinstance(module, types.ModuleType):
        if module is _ABSENT:
          missing.append(f"{node.lineno}: {node.module}")
        continue
      for name, local in _imported(node):
        value = _find(module, name)
        if value is _ABSENT:
          missing.append(f"{node.lineno}: {node.module}.{name}")
        elif isinstance(value, types.ModuleType):
          modules[local] = value
  # A local variable of the same name may be anything.
  rebound = {
    x.id
    for x in ast.walk(tree)
    if isinstance(x, ast.Name) and not isinstance(x.ctx, ast.Load)
  } | {x.arg for x in ast.walk(tree) if isinstance(x, ast.arg)}
  for node in ast.walk(tree):
    if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
      continue
    if isinstance(node.value, ast.Name) and node.value.id not in rebound:
      module = modules.get(node.value.id)
      if module is not None and _find(module, node.attr) is _ABSENT:
        missing.append(f"{node.lineno}: {module.__name__}.{node.attr}")
  return missing


def _is_ours(node: ast.ImportFrom) -> bool:
  return node.level == 0 and (node.module or "").split(".")[0] in PACKAGES


def _imported(node: ast.ImportFrom) -> Iterator[tuple[str, str]]:
  for alias in node.names:
    yield alias.name, alias.asname or alias.name


def _find(module: types.ModuleType, name: str) -> object:
  """Return an attribute or submodule, or `_ABSENT` where there is none."""
  found = getattr(module, name, _ABSENT)
  return _import(f"{module.__name__}.{name}") if found is _ABSENT else found


def _import(name: str) -> object:
  """Return a module, or `_ABSENT`; a missing package of others is skipped."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    missing = error.name or ""
    return _ABSENT if missing.split(".")[0] in PACKAGES else _UNKNOWN


def test_names_of_our_packages_exist() -> None:
  missing = [
    f"{path.relative_to(ROOT)}:{name}"
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    for name in missing_names(path.read_text())
  ]
  assert not missing, "\n".join(missing)


def test_pages_use_what_the_import_of_the_package_gives() -> None:
  """`rebased_jax.linen.load` on a page needs no import but rebased_jax's."""
  import rebased_jax

  missing = []
  for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    for block in re.findall(
      r"```python\n(.*?)```", path.read_text(), re.DOTALL
    ):
      imported = re.findall(r"^(?:from|import) rebased_jax\.(\w+)", block, re.M)
      used = re.findall(r"\brebased_jax\.(\w+)", block)
      absent = set(used) - set(imported) - set(rebased_jax.__all__)
      missing += [f"{path.name}: rebased_jax.{name}" for name in absent]
  assert not missing, "\n".join(missing)


def test_a_missing_name_is_found() -> None:
  source = (
    "from pallas_kernels.polynomial import xla, api as front\n"
    "from pallas_kernels.polynomial.xla import CHUNKS, no_such_constant\n"
    "xla.CHUNKS, front.polynomial_attention\n"
    "xla.no_such_function(front.no_such_name)\n"
  )
  assert sorted(missing_names(source)) == [
    "2: pallas_kernels.polynomial.xla.no_such_constant",
    "4: pallas_kernels.polynomial.api.no_such_name",
    "4: pallas_kernels.polynomial.xla.no_such_function",
  ]
