"""Tables and quoted figures of the pages are those of the records."""

from pathlib import Path
import re

import pytest

from benchmarks import pages

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", pages.PAGES)
def test_tables_are_those_of_the_records(name: str) -> None:
  page = (_ROOT / name).read_text()
  assert pages.names(page), f"{name} has no table"
  assert pages.filled(page) == page, "run `python benchmarks/pages.py`"


def test_every_table_and_every_page_is_known() -> None:
  found = [x for p in pages.PAGES for x in pages.names((_ROOT / p).read_text())]
  assert sorted(found) == sorted(pages.TABLES)
  marked = {
    str(path.relative_to(_ROOT))
    for pattern in ("docs/*.md", "benchmarks/**/*.md", "*.md")
    for path in _ROOT.glob(pattern)
    if pages.names(path.read_text())
  }
  assert marked == set(pages.PAGES)


def test_a_typed_figure_is_replaced() -> None:
  page = (_ROOT / "docs" / "performance.md").read_text()
  typed = page.replace("| 0.297 | 0.0875 | 3.39 |", "| 0.097 | 0.0875 | 1.1 |")
  assert typed != page and pages.filled(typed) == page


def test_a_wrong_marker_is_refused() -> None:
  with pytest.raises(ValueError, match="has no `<!-- end -->`"):
    pages.filled("<!-- table: text -->\n\n| a |\n")
  with pytest.raises(ValueError, match="has no `<!-- end -->`"):
    pages.filled("<!-- table: text -->\n<!-- table: text -->\n<!-- end -->\n")
  with pytest.raises(KeyError, match="no table is called 'texts'"):
    pages.filled("<!-- table: texts -->\n\n| a |\n\n<!-- end -->\n")


def test_sentences_quote_the_records() -> None:
  page = (_ROOT / "docs" / "performance.md").read_text()
  # Tables are checked above: only sentences are left.
  sentences = re.sub(r"(?m)^\|.*\n", "", page)
  h200 = pages.read("train_step_h200.json")
  at_4096 = {x["case"]: x for x in h200["rows"] if x["length"] == 4096}
  two = pages.read("train_step_h200_2.json")["rows"][0]
  memory = pages.read("kernels_h200.json")["memory"]
  (mamba,) = (
    row
    for row in pages.read("mixers_gpu.json")["rows"]
    if (row["system"], row["T"]) == ("Mamba", 2048)
  )
  rate = lambda row: f"{row['tokens_per_second']:,}"
  both = " / ".join(pages.number(mamba[x]["ms"]) for x in ("forward", "both"))
  quoted = [
    f"has {rate(at_4096['rebased-157m'])} tokens/s",
    f"attention's {rate(at_4096['attention-127m'])} with",
    f"{rate(at_4096['rebased-145m'])} and {rate(two['one'])} tokens/s",
    f"{at_4096['rebased-145m-long']['gradient_error']:.3f}, attention's",
    f"take {memory['both_ms']:.1f} ms",
    f"peak is {memory['ratio']:.2f} times",
    f"{both} ms",
  ]
  for words in quoted:
    assert words in re.sub(r"\s+", " ", sentences), words
  devices = re.sub(r"\s+", " ", (_ROOT / "docs/many_devices.md").read_text())
  assert f"measured: {rate(two['all'])} tokens/s" in devices
  assert f"{two['ratio']:.2f} times one card's {rate(two['one'])}" in devices
