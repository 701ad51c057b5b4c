"""Pages of the benchmarks and tools name files that exist."""

from pathlib import Path
import re

import pytest

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("benchmarks", "tools")
_PAGES = [
  *(p for folder in _FOLDERS for p in (_ROOT / folder).rglob("*.md")),
  *(_ROOT / "docs").glob("*.md"),
  *_ROOT.glob("*.md"),
]
_SCRIPTS = [p for folder in _FOLDERS for p in (_ROOT / folder).rglob("*.py")]
_COMMAND = re.compile(r"\b(?:benchmarks|tools)/[\w/]+\.py\b")


@pytest.mark.parametrize(
  "page", _PAGES, ids=lambda p: str(p.relative_to(_ROOT))
)
def test_links_and_scripts_exist(page: Path) -> None:
  text = page.read_text()
  for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
    assert (page.parent / link).exists(), link
  for script in _COMMAND.findall(text):
    assert (_ROOT / script).exists(), script


def test_scripts_name_themselves_by_their_place() -> None:
  for path in _SCRIPTS:
    for script in _COMMAND.findall(path.read_text()):
      assert (_ROOT / script).exists(), f"{path}: {script}"


@pytest.mark.parametrize("folder", _FOLDERS)
def test_every_folder_of_scripts_has_a_page(folder: str) -> None:
  for path in (_ROOT / folder).rglob("*.py"):
    assert (path.parent / "README.md").exists(), path.parent


def test_every_record_is_listed() -> None:
  results = _ROOT / "benchmarks" / "results"
  page = (results / "README.md").read_text()
  for path in results.glob("*.json"):
    assert f"`{path.name}`" in page, path.name
