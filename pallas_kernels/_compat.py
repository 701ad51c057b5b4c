"""The one place that knows versions of jax and kinds of devices."""

import jax

_MOSAIC_GPU = (0, 11)  # the first jax whose Pallas Mosaic GPU the kernels fit


def check_gpu() -> None:
  """Raises NotImplementedError where the Hopper kernels cannot run."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise NotImplementedError(
      f"implementation='gpu' needs a Hopper GPU; this process runs on "
      f"{device.platform}"
    )
  capability = str(getattr(device, "compute_capability", "unknown"))
  if capability != "9.0":
    raise NotImplementedError(
      f"implementation='gpu' needs a Hopper GPU (compute capability 9.0); "
      f"{device.device_kind} has {capability}"
    )
  if not has_mosaic_gpu():
    raise NotImplementedError(
      f"implementation='gpu' needs jax ≥ 0.11; this is {jax.__version__}"
    )


def has_mosaic_gpu() -> bool:
  """Whether this jax can lower the Hopper kernels."""
  return jax.__version_info__[:2] >= _MOSAIC_GPU
