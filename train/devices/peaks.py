"""Peak speeds of accelerators, for MFU and for the shortest possible step.

    MFU = tokens/s · 6 N / (devices · peak)

N is the number of parameters. The peak is the makers' number for dense bfloat16
products, whatever dtype a run computes in. Google's pages state the bandwidth
of a chip's interconnect for both directions together; here it is half of that.
"""

#: Peak of dense bfloat16 products, in FLOP/s, by jax's `device_kind`.
PEAK_FLOPS: dict[str, float] = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,  # v5p
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
}

#: Bytes that can leave a chip in a second, by jax's `device_kind`.
INTERCONNECT: dict[str, float] = {
  "TPU v5 lite": 200e9,
  "TPU v5": 600e9,
  "TPU v5p": 600e9,
}


def mfu(
  tokens_per_second: float, parameters: int, kind: str, devices: int
) -> float | None:
  """Return the fraction of the peak that a run uses.

  Args:
    tokens_per_second: input tokens of all devices.
    parameters: parameters of the model.
    kind: jax's `device_kind`.
    devices: the number of devices.

  Returns:
    A number from 0 to 1, or None if the device's peak is not known.
  """
  peak = PEAK_FLOPS.get(kind)
  if peak is None:
    return None
  return tokens_per_second * 6 * parameters / (devices * peak)
