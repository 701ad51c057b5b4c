"""Imports go one way between the packages, use public names, form no cycle."""

import ast
from collections.abc import Iterator
import functools
import graphlib
from pathlib import Path
import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick

_ROOT = Path(__file__).parents[2]
# Each package may import these, the standard library and itself.
_ALLOWED = {
  "pallas_kernels": {"jax", "numpy"},
  "rebased_jax": {
    *("jax", "numpy", "flax", "etils", "safetensors", "typeguard"),
    "pallas_kernels",
  },
}
_PACKAGES = (*_ALLOWED, "train")
_USERS = ("benchmarks", "examples", "tools")  # import packages as users do
_CHECKPOINT = "train/checkpoint/"  # the only folder that imports orbax
_FOLDERS = (*_PACKAGES, *_USERS, "tests")
_FILES = {
  folder: sorted(
    path.relative_to(_ROOT).as_posix()
    for path in (_ROOT / folder).rglob("*.py")
  )
  for folder in _FOLDERS
}
_ALL_FILES = [file for files in _FILES.values() for file in files]


@functools.cache
def _tree(file: str) -> ast.Module:
  return ast.parse((_ROOT / file).read_text())


def _module(file: str) -> str:
  """Return the dotted name of a file: `train/__init__.py` is `train`."""
  return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


_MODULES = {_module(file) for file in _ALL_FILES}


def _imported(nodes: list[ast.AST], file: str) -> Iterator[tuple[str, str]]:
  """Yield (module, name) of every import; the name is "" for a whole module."""
  for node in nodes:
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, ""
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0 and node.module, f"{file}: a relative import"
      for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        if submodule in _MODULES:
          yield submodule, ""
        else:
          yield node.module, alias.name


def _imports(file: str) -> list[tuple[str, str]]:
  return list(_imported(list(ast.walk(_tree(file))), file))


def _top(module: str) -> str:
  return module.partition(".")[0]


def _packages_imported(file: str) -> set[str]:
  return {_top(module) for module, _ in _imports(file)}


def test_every_folder_has_files() -> None:
  assert all(_FILES.values()), {k: len(v) for k, v in _FILES.items()}


@pytest.mark.parametrize("package", _ALLOWED)
def test_a_package_imports_only_the_layers_beneath_it(package: str) -> None:
  allowed = _ALLOWED[package] | {package} | sys.stdlib_module_names
  for file in _FILES[package]:
    assert _packages_imported(file) <= allowed, file


def test_no_package_imports_tests_or_benchmarks() -> None:
  helpers = {Path(file).stem for file in _FILES["tests"]}
  for package in _PACKAGES:
    for file in _FILES[package]:
      forbidden = {"tests", "pytest", *_USERS, *helpers}
      assert not _packages_imported(file) & forbidden, file


def test_only_the_checkpoint_folder_imports_orbax() -> None:
  for package in _PACKAGES:
    for file in _FILES[package]:
      if not file.startswith(_CHECKPOINT):
        assert "orbax" not in _packages_imported(file), file


def _is_private(name: str) -> bool:
  return name.startswith("_") and not name.endswith("__")


def _crossing(file: str) -> Iterator[tuple[str, str]]:
  """Yield the imports of a file from another of the three packages."""
  own = _top(_module(file))
  for module, name in _imports(file):
    if _top(module) in _PACKAGES and _top(module) != own:
      yield module, name


@pytest.mark.parametrize("folder", _FOLDERS)
def test_no_private_name_crosses_a_package_boundary(folder: str) -> None:
  found = [
    f"{file}: {module} {name}".strip()
    for file in _FILES[folder]
    for module, name in _crossing(file)
    if any(map(_is_private, (*module.split("."), name)))
  ]
  assert found == []


@pytest.mark.parametrize("folder", [*_PACKAGES, *_USERS])
def test_no_private_attribute_of_another_package_is_used(folder: str) -> None:
  found = []
  for file in _FILES[folder]:
    crossing = {module for module, _ in _crossing(file)}
    modules = {
      bound for bound, module in _bound_modules(file) if module in crossing
    }
    for node in ast.walk(_tree(file)):
      if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and _is_private(node.attr)
      ):
        found.append(f"{file}:{node.lineno}: {node.value.id}.{node.attr}")
  assert found == []


def _bound_modules(file: str) -> Iterator[tuple[str, str]]:
  """Yield (name in the file, module) of the modules that a file imports."""
  for node in ast.walk(_tree(file)):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.asname or _top(alias.name), alias.name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        module = f"{node.module}.{alias.name}"
        if module in _MODULES:
          yield alias.asname or alias.name, module


@pytest.mark.parametrize("folder", ["rebased_jax", "train"])
def test_operators_are_imported_from_their_folders(folder: str) -> None:
  """The files inside an operator's folder are its own business."""
  found = [
    f"{file}: {module}"
    for file in _FILES[folder]
    for module, _ in _crossing(file)
    if _top(module) == "pallas_kernels" and module.count(".") > 1
  ]
  assert found == []


@pytest.mark.parametrize("package", _PACKAGES)
def test_modules_import_each_other_without_cycles(package: str) -> None:
  """Imports inside functions do not count: they run when all modules exist."""
  graph = {}
  for file in _FILES[package]:
    name = _module(file)
    found = {module for module, _ in _imported(_module_level(file), file)}
    graph[name] = {m for m in found if m in _MODULES and m != name}
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    pytest.fail(" → ".join(reversed(error.args[1])))


def _module_level(file: str) -> list[ast.AST]:
  """Return the statements that run when a module is imported."""
  found: list[ast.AST] = []
  waiting: list[ast.AST] = list(_tree(file).body)
  while waiting:
    node = waiting.pop()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
      continue
    found.append(node)
    waiting += [
      x for x in ast.iter_child_nodes(node) if isinstance(x, ast.stmt)
    ]
  return found


def test_matplotlib_is_imported_when_a_picture_is_drawn() -> None:
  """It takes a second, which commands without a picture need not wait."""
  for folder in _PACKAGES:
    for file in _FILES[folder]:
      names = {_top(name) for name, _ in _imported(_module_level(file), file)}
      assert "matplotlib" not in names, file


def test_importing_the_modules_needs_no_trainer() -> None:
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
