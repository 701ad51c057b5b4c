"""Sphinx settings of the documentation site.

Build it with `sphinx-build -W --keep-going -b html docs docs/_build`.
"""

import dataclasses
from importlib import metadata
import inspect
import itertools
import os
import re

from flax import nnx
from sphinx.util.inspect import stringify_signature

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # notebooks are executed on a CPU

project = "ReBased for JAX"
author = "The ReBased for JAX authors"
copyright = "2026, The ReBased for JAX authors"  # noqa: A001
release = metadata.version("rebased-jax")

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = "ReBased for JAX"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
html_static_path = ["_static"]
html_css_files = ["style.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_output_stderr = "remove"

# Docstrings are written in plain text with `code` in single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_SECTIONS = re.compile(
  r"^(Args|Attributes|Example|Examples|Note|Raises|Returns|Yields):$"
)
_BULLET = re.compile(r"^ *\* ")


def _escape(line):
  """Escape what reStructuredText takes for markup outside of `code`."""
  bullet = _BULLET.match(line)
  start = bullet.end() if bullet else 0
  parts = line[start:].split("`")  # every second part is code
  parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
  return line[:start] + "`".join(parts)


def _plain_text_to_rst(app, what, name, obj, options, lines):
  """Make a plain-text docstring valid reStructuredText, in place.

  Equations and listings stand in blocks that are indented by four spaces after
  an empty line; they become literal blocks. Directives stay as they are.
  """
  del app, name, options
  if what == "class" and dataclasses.is_dataclass(obj):
    # autodoc reads the comments of the fields itself.
    lines[:] = itertools.takewhile(lambda x: x != "Attributes:", lines)
  result, block, in_section = [], None, False
  for line in lines:
    indent = len(line) - len(line.lstrip())
    if line.strip():
      in_section = in_section or bool(_SECTIONS.match(line))
      if block is not None and indent <= block:
        block = None
      if block is None and line.lstrip().startswith(".. "):
        block = indent
      after_empty = bool(result) and not result[-1].strip()
      if block is None and indent >= 4 and after_empty and not in_section:
        result += ["::", ""]
        block = 3
    result.append(line if block is not None else _escape(line))
  # Napoleon splits the first line of an attribute at a colon: `type: text`.
  # An empty comment before it prevents that.
  lines[:] = ["..", "", *result] if what == "attribute" else result


def _signature_of_module(app, what, name, obj, options, signature, returns):
  """Show the arguments of a module's __init__; its metaclass hides them."""
  del app, name, options
  if what != "class" or not issubclass(obj, nnx.Module):
    return signature, returns
  parameters = list(inspect.signature(obj.__init__).parameters.values())
  shown = inspect.Signature(parameters[1:])  # without self
  return stringify_signature(shown, unqualified_typehints=True), None


def setup(app):
  app.connect("autodoc-process-signature", _signature_of_module)
  # Before napoleon, which listens with the default priority of 500.
  app.connect("autodoc-process-docstring", _plain_text_to_rst, priority=400)
