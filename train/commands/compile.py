"""`rebased compile PRESET`: compile the step for TPUs that are not attached."""

import dataclasses
from typing import Annotated

from rich.console import Console
import tyro

from train.commands.arguments import SystemArg, parse_preset
from train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class CompileArgs:
  """Compile the preset's training step, with the fields that you change."""

  run: Annotated[RunConfig, tyro.conf.arg(name="")]
  #: The system that the model gets, as with `rebased train`.
  mixer: SystemArg = None
  #: The TPU slice to compile for, such as v5e:4x4.
  topology: str = "v5e:4x4"


def run(args: list[str]) -> int:
  """Run the verb and return the exit code: 1 if the step does not fit.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or libtpu is not installed.
  """
  _, parsed = parse_preset(CompileArgs, "compile", args)
  # Imported when the options are right: jax takes seconds.
  from train.compile import report

  return report.show(parsed.run, parsed.topology, Console())
