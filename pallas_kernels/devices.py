"""Versions of jax and kinds of devices; no other module knows them.

It answers three questions: which platform calls are expected to run on, whether
a device is known that the Hopper or TPU kernels can run on, and whether this
jax has what they are written with.
"""

from collections.abc import Iterator
import contextlib
import functools
import importlib
import os
from typing import Any
import warnings

import jax
import jax.numpy as jnp

from pallas_kernels.by_platform import Kernels
from pallas_kernels.plain_derivatives import are_plain

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


# Where the kernels of each implementation lower, by jax's names of platforms.
KERNEL_PLATFORMS = {"gpu": ("cuda",), "tpu": ("tpu",)}
# Where plain jax is cut so that it fills a GPU.
XLA_ON_GPU = Kernels("xla", ("cuda",), "an NVIDIA GPU")


def _device() -> tuple[str, str]:
  """Return (platform, kind) of the devices that calls are expected to run on.

  They are the ambient mesh's devices, or else jax's default device. A mesh of
  devices that are not attached is what a step is compiled for ahead of time.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.platform or "", abstract.device_kind
  device = jax.config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.devices(*([] if device is None else [device]))[0]
  return device.platform, device.device_kind


def platform() -> str:
  """Return the platform that calls are expected to run on: "cpu", "gpu", "tpu".

  Arrays may lie on another one, and a program may be lowered for another one.
  So it decides what is fast; `by_platform` decides what must fit the platform.
  """
  return _device()[0]


def program_key() -> tuple[Any, ...]:
  """Return what programs depend on besides their arguments.

  A program that was traced under one key is not the right one under another.
  """
  return platform(), *_device(), is_hopper(), knows_tpu()


def device_kind() -> str:
  """Return jax's name of this process's first device."""
  return jax.devices()[0].device_kind


def _attached(platform: str) -> list[jax.Device]:
  """Return the process's devices of a platform; it need not be the default."""
  try:
    return jax.devices(platform)
  except RuntimeError:  # jax has no such platform here
    return []


def _tpu_kind() -> str | None:
  """Return the kind of the TPUs that are known: the mesh's or the process's."""
  found, kind = _device()
  if found == "tpu":
    return kind
  return next((device.device_kind for device in _attached("tpu")), None)


def knows_tpu() -> bool:
  """Whether a TPU that the TPU kernels are written for is known."""
  return _tpu_kind() in _TPUS


def tpu_generation() -> str:
  """Return the TPU generation to choose sizes for: "v5e", "v5p" or "v6e".

  It is that of the mesh's TPU, or else of the process's. Where there is none, a
  program is only lowered, and "v5e" stands for all.

  Raises:
    NotImplementedError: it is another TPU.
  """
  kind = _tpu_kind()
  if kind is None:
    return "v5e"
  if kind not in _TPUS:
    raise NotImplementedError(
      f"implementation='tpu' needs a TPU v5e, v5p or v6e; this is a {kind}"
    )
  return _TPUS[kind]


def check_tpu() -> None:
  """Raise NotImplementedError if calls run on no TPU v5e, v5p or v6e."""
  found = platform()
  if found != "tpu":
    raise NotImplementedError(
      f"implementation='tpu' needs a TPU; calls run on {found}"
    )
  tpu_generation()


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
  """Raise NotImplementedError if calls run on no GPU with Hopper kernels."""
  found = platform()
  if found != "gpu":
    raise NotImplementedError(
      f"implementation='gpu' needs a Hopper GPU; calls run on {found}"
    )
  _check_gpus()


def check_mosaic_gpu() -> None:
  """Raise NotImplementedError if this jax cannot lower the Hopper kernels."""
  if not has_mosaic_gpu():
    raise NotImplementedError(
      f"implementation='gpu' needs jax ≥ 0.11, which can lower the Hopper "
      f"kernels; this is jax {jax.__version__}: pass implementation=None or "
      "'xla', or upgrade jax"
    )


def check_named(implementation: str) -> None:
  """Check that kernels that a caller named can be lowered.

  They can wherever Python traces the call. Where calls are expected to run on
  the kernels' platform, its devices must fit too.

  Args:
    implementation: "gpu" or "tpu".

  Raises:
    NotImplementedError: this jax cannot lower them, or the devices do not fit.
  """
  if implementation == "gpu":
    check_mosaic_gpu()
  if platform() == implementation:
    {"gpu": check_gpu, "tpu": check_tpu}[implementation]()


def kernels_of(implementation: str) -> Kernels:
  """Return where the kernels of "gpu" or "tpu" run."""
  needs = {"gpu": "a Hopper GPU", "tpu": "a TPU"}[implementation]
  platforms = KERNEL_PLATFORMS[implementation]
  return Kernels(implementation, platforms, needs)


def _check_gpus() -> None:
  """Raise NotImplementedError if a GPU of the process is no Hopper GPU."""
  for device in _attached("cuda") or _attached("gpu"):
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
      raise NotImplementedError(
        f"implementation='gpu' needs a Hopper GPU (compute capability 9.0); "
        f"{device.device_kind} has {capability}"
      )
  check_mosaic_gpu()


def is_hopper() -> bool:
  """Whether the process has Hopper GPUs, and a jax with their kernels.

  Calls may run elsewhere. Where programs are lowered for a GPU that is not
  attached, its kind is not known, and nothing may rely on a Hopper GPU.
  """
  if not _attached("cuda"):
    return False
  try:
    _check_gpus()
  except NotImplementedError:
    return False
  return True


def has_bfloat16_products() -> bool:
  """Whether all GPUs of the process have tensor cores that take bfloat16."""
  capabilities = [
    getattr(device, "compute_capability", "0") for device in _attached("cuda")
  ]
  # XLA refuses to split products into bfloat16 parts on older GPUs.
  return all(float(capability) >= 8.0 for capability in capabilities)


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
  """Whether a Hopper kernel over rows can take x on this process's GPUs.

  It can on Hopper GPUs, if x has a 16-bit dtype and is not empty. It cannot
  inside `plain_derivatives`, nor inside a `jax.shard_map` that checks what
  varies over the mesh: jax does not know over which axes a kernel's results
  vary. Cast all inputs with
  `sharding.vary_alike` first, so that one of them speaks for all.
  """
  narrow = x.dtype in (jnp.bfloat16, jnp.float16) and x.size > 0
  runs = is_hopper() and not varying_axes(x) and not are_plain()
  return narrow and runs


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Return the mesh axes that x varies over.

  They are axes of a `jax.shard_map` around the call that checks them; outside
  such a map there are none.
  """
  return jax.typeof(x).manual_axis_type.varying


def why_not_cudnn(dtype: jnp.dtype, head_width: int) -> str | None:
  """Return why cuDNN's attention cannot run on this process's GPUs, if so.

  None: it can. Calls may run elsewhere; see `by_platform`.

  Args:
    dtype: of queries, keys and values.
    head_width: numbers in one head's query.
  """
  device = next(iter(_attached("gpu")), None)
  if device is None:
    return f"needs a GPU; this process runs on {platform()}"
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
