"""The README is true: its script runs, its commands and presets exist."""

import itertools
from pathlib import Path
import re
import subprocess
import sys

from train import cli, presets

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text()


def test_the_script_is_the_example():
  (block,) = re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL)
  assert block == (_ROOT / "examples" / "quickstart.py").read_text()


def test_the_script_runs_beside_the_users_own_train_py(tmp_path):
  (tmp_path / "train.py").write_text('raise SystemExit("the wrong train")')
  script = tmp_path / "mine.py"
  script.write_text((_ROOT / "examples" / "quickstart.py").read_text())
  run = subprocess.run(
    [sys.executable, "-W", "error", script],
    cwd=tmp_path,
    env={
      "PATH": "",
      "PYTHONPATH": f"{tmp_path}:{_ROOT}",
      "HOME": str(tmp_path),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  loss = float(re.search(r"loss ([0-9.]+)", run.stdout)[1])
  assert loss < 5  # from ln 256 = 5.5


def test_the_presets_are_named():
  names = presets.make_presets() | presets.presets.make_models()
  listed = set()
  for pattern in re.findall(r"`((?:mqar|pile-|table)[\w.{},-]*)`", _README):
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [x.split(",") if i % 2 else [x] for i, x in enumerate(parts)]
    listed |= {"".join(words) for words in itertools.product(*choices)}
  assert listed <= names.keys()
  unlisted = names.keys() - listed - presets.ALIASES.keys()
  assert {name for name in unlisted if "table-4" not in name} == {"lm-tiny"}
  lengths = ",".join(map(str, presets.ABLATION_LENGTHS))
  variants = ",".join(presets.presets.VARIANTS)
  assert f"mqar-paper-ablation-{{{variants}}}-{{{lengths}}}" in _README


def test_the_commands_are_those_of_the_help():
  for name in re.findall(r"^    rebased (\w+)", cli.__doc__, re.MULTILINE):
    assert f"`rebased {name}" in _README, name


def test_the_files_that_it_names_are_there():
  for name in re.findall(r"\]\((?!http)([^)]+)\)", _README):
    assert (_ROOT / name).exists(), name
  for name in re.findall(r"`([a-z_/]+\.py)`", _README):
    assert (_ROOT / name).exists(), name
