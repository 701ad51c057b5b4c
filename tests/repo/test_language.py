"""Docstrings, comments and pages use plain English: some phrases are banned.

A short list cannot prove that a sentence is clear. It holds the phrases that
readers of this project stumbled over, each with what to write instead.
"""

import ast
from collections.abc import Iterator
import io
from pathlib import Path
import re
import tokenize

import pytest

pytestmark = pytest.mark.quick

_ROOT = Path(__file__).parents[2]
_FOLDERS = (
  *("pallas_kernels", "rebased_jax", "train", "tests"),
  *("benchmarks", "tools", "examples", "docs"),
)
# phrase: what to write instead
_BANNED = {
  r"\b(goes|go|went) on (from|in|with|to)\b": "resume, continue",
  r"\bbehind (the|a|an|it|its|each|that|one|those|them)\b": "after",
  r"\bone behind (the other|another)\b": "one after another",
  r"\bin front of\b": "before",
  r"\bin place of\b": "instead of",
  r"\bof (its|their) own\b": "separate, or name the thing",
  r"\bthe same (in every bit|bits)\b": "bit-identical",
  r"\bborders?\b": "boundary",
  r"\bby the compiler's word\b": "compiled, never run",
  r"\b(is|are|was|were) not here\b": "is not attached, does not exist",
}
# How a docstring must not begin: a bare genitive or a relative clause.
_BEGINNING = re.compile(r"(Of|What|Whether of|Those|That|Theirs|Where) ")


def _python_files() -> list[Path]:
  files = [p for folder in _FOLDERS for p in (_ROOT / folder).rglob("*.py")]
  files = [p for p in files if "_build" not in p.parts]
  return sorted(p for p in files if p != Path(__file__))


def _pages() -> list[Path]:
  pages = [p for folder in _FOLDERS for p in (_ROOT / folder).rglob("*.md")]
  pages = [p for p in pages if not {"_build", "jupyter_execute"} & set(p.parts)]
  return sorted([*pages, *_ROOT.glob("*.md")])


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(tree):
    if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
      constant = node.body[0]
      yield constant.lineno, ast.get_docstring(node, clean=False) or ""


def _comments(source: str) -> Iterator[tuple[int, str]]:
  """Yield each block of comment lines as one text, at its first line."""
  start, lines, last = 0, [], -1
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      row = token.start[0]
      if row != last + 1 and lines:
        yield start, " ".join(lines)
        lines = []
      if not lines:
        start = row
      lines.append(token.string.lstrip("# "))
      last = row
  if lines:
    yield start, " ".join(lines)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
  source = path.read_text()
  if path.suffix == ".py":
    yield from _docstrings(ast.parse(source))
    yield from _comments(source)
  else:
    for match in re.finditer(r"(?:.+\n?)+", source):  # a paragraph
      yield source.count("\n", 0, match.start()) + 1, match[0]


@pytest.mark.parametrize("kind", ["python", "pages"])
def test_no_banned_phrase_is_used(kind: str) -> None:
  found = []
  for path in _python_files() if kind == "python" else _pages():
    for line, text in _texts(path):
      joined = " ".join(text.split())
      for phrase, instead in _BANNED.items():
        for match in re.finditer(phrase, joined, re.IGNORECASE):
          place = f"{path.relative_to(_ROOT)}:{line}"
          found.append(f"{place}: {match[0]!r}; write: {instead}")
  assert not found, "\n".join(found)


def test_docstrings_begin_with_a_statement_or_an_imperative() -> None:
  found = []
  for path in _python_files():
    for line, text in _docstrings(ast.parse(path.read_text())):
      if _BEGINNING.match(text.lstrip()):
        first = text.strip().splitlines()[0]
        found.append(f"{path.relative_to(_ROOT)}:{line}: {first}")
  assert not found, "\n".join(found)
