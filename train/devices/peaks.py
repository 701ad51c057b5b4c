"""Peak speeds and memory of accelerators, for MFU and `rebased compile`.

    MFU = tokens/s · 6 N / (devices · peak)

N is the number of parameters. The peak is the makers' number for dense bfloat16
products, whatever dtype a run computes in. TPUs' peaks and memory are those of
jax's own tables. Google's pages state the bandwidth of a chip's interconnect
for both directions together; here it is half of that.
"""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

#: A device, or the description of one that need not be attached.
AnyDevice = jax.Device | AbstractDevice

#: Peak of a GPU's dense bfloat16 products, in FLOP/s, by jax's `device_kind`.
PEAK_FLOPS: dict[str, float] = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}

#: Bytes that can leave a device in a second, by jax's `device_kind`.
INTERCONNECT: dict[str, float] = {
  "TPU v5 lite": 200e9,
  "TPU v5": 600e9,
  "TPU v5p": 600e9,
}


def flops(device: AnyDevice) -> float | None:
  """Return the peak of a device's dense bfloat16 products, in FLOP/s.

  None if it is not known.
  """
  tpu = _tpu_info(device)
  if tpu is None:
    return PEAK_FLOPS.get(device.device_kind)
  return tpu.num_cores * tpu.bf16_ops_per_second


def memory(device: AnyDevice) -> int | None:
  """Return the bytes of a TPU device's memory.

  None for other devices, and for a TPU that jax does not know.
  """
  tpu = _tpu_info(device)
  return None if tpu is None else tpu.num_cores * tpu.hbm_capacity_bytes


def mfu(
  tokens_per_second: float, parameters: int, device: AnyDevice, devices: int
) -> float | None:
  """Return the fraction of the peak that a run uses.

  Args:
    tokens_per_second: input tokens of all devices.
    parameters: parameters of the model.
    device: one of the devices, which are all alike.
    devices: their number.

  Returns:
    A number from 0 to 1, or None if the device's peak is not known.
  """
  peak = flops(device)
  if peak is None:
    return None
  return tokens_per_second * 6 * parameters / (devices * peak)


def _tpu_info(device: AnyDevice):
  """Return jax's figures for one core of a TPU; None if it has none.

  A device is one core of a TPU7x chip, and both cores of a v5p chip. The device
  itself says how many it has.
  """
  if device.platform != "tpu":
    return None
  from jax.experimental.pallas import tpu as pltpu  # only a TPU needs it

  # jax tells the figures of the devices that calls run on.
  described = AbstractDevice(device.device_kind, device.num_cores, "tpu")
  mesh = AbstractMesh((1,), ("device",), abstract_device=described)
  with jax.sharding.use_abstract_mesh(mesh):
    try:
      return pltpu.get_tpu_info()
    except ValueError:  # jax does not know this kind
      return None
