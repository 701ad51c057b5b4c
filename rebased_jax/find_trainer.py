"""Find the trainer, the package `train`, whatever else is called `train`.

A folder with a user's own train.py, or a package `train/` on PYTHONPATH, comes
before the trainer on Python's path. So the trainer is found by its place on
disk, beside this package, and is `train` in `sys.modules` only while it runs:

    with import_trainer() as train:
      train.run(config, "runs/mine")

The command `rebased` uses it, and `rebased_jax.load` for runs. This module
imports nothing heavy, because worker processes that only tokenize text import
it as well.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
import pickle
import sys
import threading
from types import ModuleType
from typing import Any

_NAME = "train"
_FOLDER = Path(__file__).resolve().parents[1] / _NAME
_trainer: dict[str, ModuleType] = {}  # its modules while they are set aside
_lock = threading.RLock()


@dataclasses.dataclass
class _Inside:
  """The threads and nested calls that are inside `import_trainer` now."""

  count: int = 0
  #: The user's modules `train…`, which the first call set aside.
  users: dict[str, ModuleType] = dataclasses.field(default_factory=dict)
  #: Whether the trainer was `train` before the first call, and so remains it.
  was_there: bool = False


_inside = _Inside()


@contextlib.contextmanager
def import_trainer() -> Iterator[ModuleType]:
  """Make the trainer importable as `train` inside the context.

  A user's module `train` is set aside meanwhile and comes back afterwards.
  Take everything of the trainer inside the context: its names are imported when
  they are first used. `run` and `load` enter the context themselves, so they
  can be called after it; call all else inside. Several threads may be inside at
  once. Until the last one leaves, `import train` gives the trainer in every
  thread. Objects of the trainer cannot be pickled outside the context.

  Yields:
    The package `train` of the trainer.

  Raises:
    ImportError: the trainer is not installed beside `rebased_jax`.
  """
  with _lock:
    if _inside.count == 0:
      _inside.was_there = _is_trainer(sys.modules.get(_NAME))
      _inside.users = {} if _inside.was_there else _take_modules()
      try:
        install_trainer()
      except BaseException:
        sys.modules.update(_inside.users)
        raise
    _inside.count += 1
    trainer = sys.modules[_NAME]
  try:
    yield trainer
  finally:
    with _lock:
      _inside.count -= 1
      # Kept where a later `import train` would find it anyway: a second copy
      # would have other exception classes than this one.
      shadowed = _inside.users or not _is_found_first()
      if _inside.count == 0 and not _inside.was_there and shadowed:
        _trainer.update(_take_modules())
        sys.modules.update(_inside.users)


def install_trainer() -> ModuleType:
  """Make the trainer `train` for the rest of this process, and return it.

  Raises:
    ImportError: the trainer is not installed beside `rebased_jax`.
  """
  if _is_trainer(sys.modules.get(_NAME)):
    return sys.modules[_NAME]
  _take_modules()
  if _trainer:
    sys.modules.update(_trainer)
    _trainer.clear()
    return sys.modules[_NAME]
  spec = importlib.util.spec_from_file_location(
    _NAME,
    _FOLDER / "__init__.py",
    submodule_search_locations=[str(_FOLDER)],
  )
  if spec is None or spec.loader is None or not _FOLDER.is_dir():
    raise ImportError(
      f"{_FOLDER}: there is no trainer beside rebased_jax: expected the "
      "package `train`; install rebased-jax again"
    )
  module = importlib.util.module_from_spec(spec)
  sys.modules[_NAME] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    _take_modules()  # a module that is half made must not be found again
    raise
  return module


def in_worker(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
  """Return a callable that can be pickled and called in any process.

  Pickle stores a function or class by its name, so that `train.data...` would
  be looked up in a user's `train` there. The callable installs the trainer
  first and then calls `function` with `args` and its own arguments.

  Args:
    function: a function or class of the trainer.
    *args: its first arguments, which pickle together with it.
  """
  return functools.partial(_call, pickle.dumps((function, args)))


def main() -> None:
  """Run the command `rebased`."""
  install_trainer()
  importlib.import_module("train.cli").main()


def _call(pickled: bytes, *more: Any) -> Any:
  install_trainer()
  function, args = pickle.loads(pickled)
  return function(*args, *more)


def _take_modules() -> dict[str, ModuleType]:
  """Remove `train` and its submodules from `sys.modules` and return them."""
  names = [x for x in sys.modules if x == _NAME or x.startswith(f"{_NAME}.")]
  return {name: sys.modules.pop(name) for name in names}


def _is_trainer(module: ModuleType | None) -> bool:
  return _is_in_folder(getattr(module, "__file__", None))


def _is_found_first() -> bool:
  """Whether a plain `import train` finds the trainer."""
  spec = importlib.machinery.PathFinder.find_spec(_NAME)
  return spec is not None and _is_in_folder(spec.origin)


def _is_in_folder(file: str | None) -> bool:
  return file is not None and Path(file).resolve().parent == _FOLDER


if __name__ == "__main__":
  main()
