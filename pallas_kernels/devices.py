"""The one place that knows versions of jax and kinds of devices."""

import os

import jax
import jax.numpy as jnp

_MOSAIC_GPU = (0, 11)  # the first jax whose Pallas Mosaic GPU the kernels fit

# The generations that the TPU kernels are compiled for, by jax's names.
_TPUS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}


def _device() -> tuple[str, str]:
  """(platform, kind) of the ambient mesh's devices, or of this process's.

  A mesh of devices that are not here is what a step is compiled for ahead of
  time.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.platform or "", abstract.device_kind
  device = jax.devices()[0]
  return device.platform, device.device_kind


def platform() -> str:
  """The platform that calls run on: "cpu", "gpu", "tpu"."""
  return _device()[0]


def tpu_generation() -> str:
  """ "v5e", "v5p" or "v6e"; NotImplementedError where there is none of them."""
  found, kind = _device()
  if found != "tpu":
    raise NotImplementedError(
      f"implementation='tpu' needs a TPU; this process runs on {found}"
    )
  if kind not in _TPUS:
    raise NotImplementedError(
      f"implementation='tpu' needs a TPU v5e, v5p or v6e; this is a {kind}"
    )
  return _TPUS[kind]


def tpu_topology(generation: str) -> list:
  """Devices of a TPU that is not attached, to compile for; needs libtpu.

  For a process of its own: the TPU runtime is told that it is alone.
  """
  from jax.experimental import topologies

  alone = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several processes may compile
  )
  for name, value in alone.items():
    os.environ.setdefault(name, value)
  name = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}[generation]
  found = topologies.get_topology_desc(platform="tpu", topology_name=name)
  return list(found.devices)


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


def is_hopper() -> bool:
  """Whether the Hopper kernels can run, where calls run."""
  if platform() != "gpu":
    return False
  try:
    check_gpu()
  except NotImplementedError:
    return False
  return True


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Of a `jax.shard_map` around the call that checks what x varies over."""
  return jax.typeof(x).manual_axis_type.varying


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
