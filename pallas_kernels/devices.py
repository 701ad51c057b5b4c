"""Versions of jax and kinds of devices; no other module knows them.

It answers three questions: which platform calls run on, whether the Hopper and
TPU kernels can run there, and whether this jax has what they are written with.
"""

from collections.abc import Iterator
import contextlib
import functools
import importlib
import os
import warnings

import jax
import jax.numpy as jnp

WARPGROUP = 128  # threads of a Hopper GPU that work on one row of an array

# The first jax whose Pallas Mosaic GPU has what the kernels are written with.
_MOSAIC_GPU = (0, 11)

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
  """Return (platform, kind) of the devices that calls run on.

  They are the ambient mesh's devices, or else this process's. A mesh of devices
  that are not attached is what a step is compiled for ahead of time.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.platform or "", abstract.device_kind
  device = jax.devices()[0]
  return device.platform, device.device_kind


def platform() -> str:
  """Return the platform that calls run on: "cpu", "gpu" or "tpu"."""
  return _device()[0]


def program_key() -> tuple[str, str, bool]:
  """Return what programs depend on besides their arguments.

  A program that was traced under one key is not the right one under another.
  """
  return platform(), _device()[1], is_hopper()


def device_kind() -> str:
  """Return jax's name of this process's first device."""
  return jax.devices()[0].device_kind


def tpu_generation() -> str:
  """Return the TPU generation that calls run on: "v5e", "v5p" or "v6e".

  Raises:
    NotImplementedError: calls run on another platform or another TPU.
  """
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


def tpu_topology(generation: str) -> list[jax.Device]:
  """Return devices of a TPU that is not attached, to compile for.

  It needs libtpu and sets environment variables for the whole process: they
  tell the TPU runtime that it runs alone on one host.

  Args:
    generation: "v5e", "v5p" or "v6e".
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
  """Raise NotImplementedError where the Hopper kernels cannot run."""
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
  """Whether calls run on a Hopper GPU with a jax that has its kernels."""
  if platform() != "gpu":
    return False
  try:
    check_gpu()
  except NotImplementedError:
    return False
  return True


def has_mosaic_gpu() -> bool:
  """Whether this jax is new enough to lower the Hopper kernels."""
  return jax.__version_info__[:2] >= _MOSAIC_GPU


@contextlib.contextmanager
def kernel_imports(implementation: str) -> Iterator[None]:
  """Turn a failed import of kernels into a NotImplementedError with the reason.

  Pallas is experimental: a jax that is newer than the kernels may have moved or
  removed what they import. Callers with another implementation then use it.

  Args:
    implementation: "gpu" or "tpu", for the message.
  """
  try:
    yield
  except (ImportError, AttributeError, TypeError) as error:
    raise NotImplementedError(
      f"implementation={implementation!r} cannot be imported with jax "
      f"{jax.__version__} ({error}); use implementation='xla' or a jax that "
      "this version was tested with"
    ) from error


@functools.cache
def can_import_kernels(module: str) -> bool:
  """Whether this jax can import a module of Hopper kernels.

  The first failure warns that XLA runs instead.

  Args:
    module: full name, such as "pallas_kernels.gelu.gpu".
  """
  try:
    with kernel_imports("gpu"):
      importlib.import_module(module)
  except NotImplementedError as error:
    warnings.warn(f"{module} is not used, XLA runs: {error}", stacklevel=3)
    return False
  return True


def takes_row_kernel(x: jax.Array) -> bool:
  """Whether a Hopper kernel over rows can take x where calls run.

  It can on a Hopper GPU, if x has a 16-bit dtype and is not empty. It cannot
  inside a `jax.shard_map` that checks what varies over the mesh: jax does not
  know over which axes a kernel's results vary. Cast all inputs with
  `sharding.vary_alike` first, so that one of them speaks for all.
  """
  narrow = x.dtype in (jnp.bfloat16, jnp.float16) and x.size > 0
  return narrow and is_hopper() and not varying_axes(x)


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Return the mesh axes that x varies over.

  They are axes of a `jax.shard_map` around the call that checks them; outside
  such a map there are none.
  """
  return jax.typeof(x).manual_axis_type.varying


def why_not_cudnn(dtype: jnp.dtype, head_width: int) -> str | None:
  """Return why cuDNN's attention cannot run here; None if it can.

  Args:
    dtype: of queries, keys and values.
    head_width: numbers in one head's query.
  """
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
