"""The arithmetic of accelerators, which MFU is a fraction of.

    MFU = tokens/s · 6 N / (devices · peak)

with N all parameters, and the peak that of dense bfloat16 products, as the
makers state it, whatever a run computes in. The interconnect's bandwidth is
half of what Google's pages state of a chip and both directions.
"""

PEAK_FLOPS: dict[str, float] = {  # by `device_kind`
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

INTERCONNECT: dict[str, float] = {  # bytes a second that leave a chip
  "TPU v5 lite": 200e9,
  "TPU v5": 600e9,
  "TPU v5p": 600e9,
}


def mfu(
  tokens_per_second: float, parameters: int, kind: str, devices: int
) -> float | None:
  """The fraction of the peak; None of a device that is not known."""
  peak = PEAK_FLOPS.get(kind)
  if peak is None:
    return None
  return tokens_per_second * 6 * parameters / (devices * peak)
