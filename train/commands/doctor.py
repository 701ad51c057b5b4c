"""`rebased doctor`: devices, versions, and which implementation will run."""

from importlib import metadata
import platform

import jax
from rich.console import Console

from pallas_kernels import which_implementation
from train.console import rows

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


def show(console: Console) -> int:
  """Prints the tables; 0 if everything that a run needs is there."""
  versions, missing = {"python": platform.python_version()}, []
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = "missing"
      missing.append(name)
  console.print(rows("versions", versions))
  devices = {str(x.id): f"{x.platform}: {x.device_kind}" for x in jax.devices()}
  console.print(rows("devices", devices))
  chosen, why = which_implementation()
  console.print(
    rows("polynomial attention", {"implementation": chosen, "why": why})
  )
  return 1 if missing else 0
