"""The one place that knows versions of jax and kinds of devices."""

import jax
import jax.numpy as jnp

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


def device_kind() -> str:
  """The name of this process's first device, as jax has it."""
  return jax.devices()[0].device_kind


def has_mosaic_gpu() -> bool:
  """Whether this jax can lower the Hopper kernels."""
  return jax.__version_info__[:2] >= _MOSAIC_GPU


def why_not_cudnn(dtype: jnp.dtype, head_width: int) -> str | None:
  """Why cuDNN's attention cannot run here on such heads; None: it can."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return f"needs a GPU; this process runs on {device.platform}"
  capability = str(getattr(device, "compute_capability", "unknown"))
  # An AMD GPU names an architecture instead of a number.
  number = capability.replace(".", "", 1)
  if not number.isdigit() or float(capability) < 8:
    return (
      "needs an NVIDIA GPU of compute capability 8.0 or above; "
      f"{device.device_kind} has {capability}"
    )
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"needs bfloat16 or float16, not {jnp.dtype(dtype)}"
  widest = 256 if float(capability) >= 9 else 128
  if head_width % 8 or head_width > widest:
    return (
      f"needs a head width that is a multiple of 8, at most {widest} on this "
      f"GPU; it is {head_width}"
    )
  return None
