"""`rebased doctor`: show devices, versions and implementations."""

from importlib import metadata
import platform

import jax
from rich.console import Console

from pallas_kernels import which_implementation
from train.console import rows

_HELP = """\
usage: rebased doctor

Show the versions of the packages, the devices that jax finds, and which
implementation of polynomial attention they run. The exit code is 1 if a package
is missing."""
_PACKAGES = (
  "rebased-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)


def run(args: list[str]) -> int:
  """Print the tables, and return 1 if a package is missing.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: there is an argument.
  """
  if args in (["-h"], ["--help"]):
    print(_HELP)
    return 0
  if args:
    raise ValueError(f"doctor takes no options, not {args[0]!r}")
  console = Console()
  versions, missing = {"python": platform.python_version()}, False
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name], missing = "missing", True
  console.print(rows("versions", versions))
  devices = {str(x.id): f"{x.platform}: {x.device_kind}" for x in jax.devices()}
  console.print(rows("devices", devices))
  chosen, why = which_implementation()
  console.print(
    rows("polynomial attention", {"implementation": chosen, "why": why})
  )
  return 1 if missing else 0
