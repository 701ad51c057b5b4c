"""Test the table of verbs: each is documented and imports what it needs."""

import ast
import importlib
from pathlib import Path
import subprocess
import sys

import pytest

from train import cli

_CODE = """
import sys
from train import cli
try:
  cli.main(sys.argv[1:])
except SystemExit as stop:
  print("code", stop.code)
assert not {"jax", "flax", "grain"} & set(sys.modules), "jax was imported"
"""


@pytest.mark.parametrize(
  "words, code",
  [
    (["--help"], 0),
    (["trian"], 2),
    (["train", "mqarr"], 2),
    (["presets"], 0),
    (["prepare", "--help"], 0),
    (["tokenizer", "train", "--help"], 0),
    (["tokenizer", "learn"], 2),
    (["count", "no such data set"], 2),
  ],
)
def test_verbs_about_tokens_do_not_import_jax(words, code, tmp_path) -> None:
  found = subprocess.run(
    [sys.executable, "-W", "error", "-c", _CODE, *words],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert found.returncode == 0, found.stderr
  assert f"code {code}\n" in found.stdout
  assert "Traceback" not in found.stderr


def test_every_verb_is_a_module_and_in_the_help(capsys) -> None:
  with pytest.raises(SystemExit):
    cli.main(["--help"])
  shown = capsys.readouterr().out
  assert max(map(len, shown.splitlines())) <= 80
  for name, verb in cli.VERBS.items():
    assert f"rebased {name}" in shown
    if name != "compile":  # its environment is for its own process
      assert callable(importlib.import_module(verb.module).run)


def test_only_drawing_imports_matplotlib() -> None:
  """A run that is refused, or ends without a picture, does not wait for it."""
  root = Path(cli.__file__).parent
  files = [x for x in root.rglob("*.py") if x.parent != root / "experiments"]
  assert len(files) > 50
  for file in files:
    for node in ast.parse(file.read_text()).body:
      if isinstance(node, ast.Import | ast.ImportFrom):
        assert "matplotlib" not in ast.unparse(node), file
