"""Names with square brackets, which rich could take for markup."""

import ast
import io
import os
from pathlib import Path
import shlex
import signal

import jax
import numpy as np
import pytest
from rich.console import Console
from train_cases import (
  ROOT,
  built_once as built_once,
  call as call,
  tiny,
  trainer as trainer,
)

from train import console, start_run
from train.checkpoint.checkpoints import Checkpoints
from train.records.profile import Profile

pytestmark = pytest.mark.usefixtures("built_once")

_NAME = "run [red] [a=3] [/b] :smile:"


def test_a_run_folder_is_printed_as_it_is_named(
  call, tmp_path: Path, monkeypatch
) -> None:
  folder, config = tmp_path / _NAME, tiny(steps=4)
  before, text = Profile.before, io.StringIO()

  def signalled(self, step, state):
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    before(self, step, state)

  with monkeypatch.context() as patch:
    patch.setattr(Profile, "before", signalled)
    start_run.run(config, folder, console=Console(file=text, width=300))
  *_, line = text.getvalue().splitlines()
  assert shlex.split(line) == ["rebased", "resume", str(folder)]
  assert f"run folder: {folder}\n" in text.getvalue()
  monkeypatch.setenv("COLUMNS", "300")
  for words in (("resume",), ("evaluate",), ("inspect",)):
    code, out, err = call(*words, str(folder))
    assert (code, err) == (0, "")
    assert words == ("inspect",) or _words(str(folder)) in _words(out)
  code, out, _ = call("inspect", str(folder / "checkpoints" / "4"))
  assert code == 0 and _words(str(folder)) in _words(out)
  code, _, err = call("evaluate", str(folder / "[/c]"))
  assert code == 2 and str(folder / "[/c]") in err


def _words(text: str) -> str:
  """Return a text without its line breaks and spaces."""
  return "".join(text.split())


def test_checkpoints_are_read_in_folders_of_any_name(tmp_path: Path) -> None:
  """Orbax looks for files by a pattern, in which brackets mean something."""
  state = {"params": {"w": np.arange(3.0, dtype=np.float32)}}
  target = {"params": {"w": jax.ShapeDtypeStruct((3,), np.float32)}}
  for name in ("a[b]", "[ab]", "a?", "*", "a\\b", "100%20:#"):
    folder = tmp_path / name / "checkpoints"
    for step in (1, 2):
      with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, state, {})
        found = checkpoints.restore(target).state["params"]["w"]
        assert np.array_equal(found, state["params"]["w"])
    assert {x.name for x in folder.iterdir()} == {"1", "2"}
  assert len(list(tmp_path.iterdir())) == 6


def test_tables_show_names_and_values_as_they_are() -> None:
  text = io.StringIO()
  table = console.rows("[bold]title", {"[/a]": "[red]x", "b[0]": ["[/]"]})
  Console(file=text, width=80).print(table)
  for part in ("[bold]title", "[/a]", "[red]x", "b[0]", "['[/]']"):
    assert part in text.getvalue()


def _prints_of_text(tree: ast.AST) -> list[int]:
  """Return the lines of `console.print` whose first argument is a string."""
  return [
    node.lineno
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and ast.unparse(node.func).endswith("console.print")
    and node.args  # a call without one prints an empty line
    and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
  ]


def test_text_is_printed_by_say() -> None:
  """Which knows no markup, while `console.print` takes strings for markup."""
  assert _prints_of_text(ast.parse('console.print(f"{path}")')) == [1]
  found = {
    str(path): lines
    for path in sorted((ROOT / "train").rglob("*.py"))
    if (lines := _prints_of_text(ast.parse(path.read_text())))
  }
  assert found == {}
