"""`rebased doctor`: show devices, versions and implementations."""

from importlib import metadata
import platform

from rich.console import Console

from train.console import rows, say

_HELP = """\
usage: rebased doctor

Show the versions of the packages, the devices that jax finds, and which
implementation of polynomial attention they run. The exit code is 1 if a package
is missing, or jax finds no device."""
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
  """Print the tables; return 1 if a package is missing or there is no device.

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
  # Imported when the arguments are right: jax takes seconds.
  from pallas_kernels import which_implementation
  from train.devices import backend

  console = Console()
  versions, missing = {"python": platform.python_version()}, False
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name], missing = "missing", True
  console.print(rows("versions", versions))
  try:
    found = backend.devices()
  except backend.NoDeviceError as error:
    say(console, f"devices: none: {error}")
    return 1
  devices = {str(x.id): f"{x.platform}: {x.device_kind}" for x in found}
  console.print(rows("devices", devices))
  chosen, why = which_implementation()
  console.print(
    rows("polynomial attention", {"implementation": chosen, "why": why})
  )
  return 1 if missing else 0
