"""`rebased presets`: list the presets, their sizes, times and outcomes."""

import dataclasses

from train.commands.parsing import parse
from train.presets import catalogue


@dataclasses.dataclass(frozen=True)
class PresetsArgs:
  """List every preset of `rebased train`.

  Each has its parameters, what it needs, how long it takes, and what to expect.
  """

  #: Print the page of the documentation.
  markdown: bool = False


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong.
  """
  parsed = parse(PresetsArgs, "rebased presets", args)
  page = catalogue.as_markdown() if parsed.markdown else catalogue.as_text()
  print(page, end="")
  return 0
