"""The devices that jax finds, or one line about why it finds none."""

import os

import jax


class NoDeviceError(ValueError):
  """jax finds no device; the message has its reason."""


def devices() -> list[jax.Device]:
  """Return the devices of all processes.

  Raises:
    NoDeviceError: there are none, as with JAX_PLATFORMS=cuda on a machine
      without a GPU.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    # jax asserts, without a message, if the platform's plugin is missing.
    lines = str(error).splitlines() or ["its plugin is not installed"]
    chosen = os.environ.get("JAX_PLATFORMS", "")
    raise NoDeviceError(
      f"jax finds no device with JAX_PLATFORMS={chosen!r}: {lines[0]}"
    ) from error
