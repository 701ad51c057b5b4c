"""Test the table of verbs: each is documented and imports what it needs."""

import importlib
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
