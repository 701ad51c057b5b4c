"""The README and the documentation are true: what they name exists."""

import itertools
from pathlib import Path
import re
import subprocess
import sys

from rebased_jax import presets as model_presets
from train import cli, presets
from train.presets import mqar as mqar_presets, text as text_presets

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text()
_TRAINING = (_ROOT / "docs" / "training.md").read_text()
_PAGES = sorted((_ROOT / "docs").rglob("*.md"))
_PAGES = [page for page in _PAGES if "_build" not in page.parts]
_PAGES += [_ROOT / "README.md", _ROOT / "CONTRIBUTING.md"]


def test_the_readme_is_short():
  assert len(_README.splitlines()) <= 100
  assert len(_README.split()) <= 800


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
  names = presets.make_presets() | model_presets.make_models()
  listed = set()
  for pattern in re.findall(
    r"`((?:mqar|lm-tiny|pile-|table)[\w.{},-]*)`", _TRAINING
  ):
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [x.split(",") if i % 2 else [x] for i, x in enumerate(parts)]
    listed |= {"".join(words) for words in itertools.product(*choices)}
  assert listed <= names.keys()
  aliases = {*mqar_presets.ALIASES, *text_presets.ALIASES}
  assert names.keys() - listed == aliases - listed
  lengths = ",".join(map(str, mqar_presets.ABLATION_LENGTHS))
  variants = ",".join(model_presets.VARIANTS)
  assert f"mqar-paper-ablation-{{{variants}}}-{{{lengths}}}" in _TRAINING


def test_the_commands_are_those_of_the_help():
  verbs = list(cli.VERBS)
  assert len(verbs) >= 10
  for name in verbs:
    assert f"`rebased {name}" in _TRAINING, name


def test_the_files_that_pages_name_are_there():
  """Links to files, and paths such as `train/step.py`, from the root."""
  for page in _PAGES:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for name in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
      assert (page.parent / name).exists(), f"{page.name}: {name}"
    path = (
      r"`((?:pallas_kernels|rebased_jax|train|tests|benchmarks|tools)/[\w/.]+)`"
    )
    for name in re.findall(path, text):
      if "NAME" not in name:  # of a recipe
        assert (_ROOT / name).exists(), f"{page.name}: {name}"


def test_the_reference_lists_every_public_name():
  """Each name of a package's `__all__` is on its reference page."""
  import pallas_kernels
  import rebased_jax
  import train

  for package in (pallas_kernels, rebased_jax, train):
    name = package.__name__
    page = (_ROOT / "docs" / "api" / f"{name}.md").read_text()
    for public in package.__all__:
      if public.startswith("__"):
        continue
      listed = rf"^\.\. (auto\w+|py:data):: {name}\.{public}$"
      found = re.search(listed, page, re.MULTILINE)
      assert found, f"docs/api/{name}.md does not list {name}.{public}"
