"""Gauges of a run's devices: MFU and memory, where they are known."""

import math
from typing import Any

import jax

from train.devices import peaks


class DeviceUsage:
  """MFU and memory of a run over all devices.

  Args:
    params: the model's parameters, or their shapes.
  """

  def __init__(self, params: Any):
    shapes = [x.shape for x in jax.tree.leaves(params)]
    self._parameters = sum(math.prod(shape) for shape in shapes)

  def read(self, tokens_per_second: float) -> dict[str, float]:
    """Return `mfu` and `hbm_peak_bytes`, as far as the device tells them.

    Args:
      tokens_per_second: input tokens of all devices.
    """
    device, devices = jax.devices()[0], jax.device_count()
    mfu = peaks.mfu(tokens_per_second, self._parameters, device, devices)
    found = dict(mfu=mfu, hbm_peak_bytes=peak_bytes())
    return {name: x for name, x in found.items() if x is not None}


def peak_bytes() -> int | None:
  """Return the most bytes that one of this process's devices has held.

  None where the devices do not count them.
  """
  found = [
    (device.memory_stats() or {}).get("peak_bytes_in_use")
    for device in jax.local_devices()
  ]
  return max((x for x in found if x is not None), default=None)
