"""Finding the trainer beside a user's own module `train`."""

from pathlib import Path
import subprocess
import sys

import pytest

_ROOT = Path(__file__).parents[2]

_OVERLAPPING_THREADS = """
import sys, threading
import train as users
from rebased_jax.find_trainer import import_trainer
both_inside, first_left = threading.Barrier(2), threading.Event()

def leave_first():
  with import_trainer():
    both_inside.wait()
  first_left.set()

thread = threading.Thread(target=leave_first)
thread.start()
with import_trainer() as trainer:
  both_inside.wait()
  first_left.wait()
  assert sys.modules["train"] is trainer
  import train.data.checks  # a module that nobody has imported so far
thread.join()
import train
assert train is users, train
print("ok")
"""

_FAILED_IMPORT = """
import builtins, importlib.machinery, sys
import train as users
from rebased_jax import find_trainer
real = importlib.machinery.SourceFileLoader.exec_module

def fail(self, module):
  if module.__name__ == "train":
    raise MemoryError("once")
  return real(self, module)

importlib.machinery.SourceFileLoader.exec_module = fail
try:
  with find_trainer.import_trainer():
    raise SystemExit("expected a MemoryError")
except MemoryError:
  pass
assert sys.modules["train"] is users
importlib.machinery.SourceFileLoader.exec_module = real
with find_trainer.import_trainer() as trainer:
  import train.data.checks
assert sys.modules["train"] is users
print("ok")
"""


@pytest.mark.parametrize("code", [_OVERLAPPING_THREADS, _FAILED_IMPORT])
def test_the_users_module_comes_back(tmp_path: Path, code: str) -> None:
  (tmp_path / "train.py").write_text("NAME = 'mine'\n")
  (tmp_path / "script.py").write_text(
    f"import sys\nsys.path.insert(1, {str(_ROOT)!r})\n{code}"
  )
  run = subprocess.run(
    [sys.executable, "script.py"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr
