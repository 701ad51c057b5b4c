"""Strict promotion and eight CPU devices for every test."""

import gc
import importlib.metadata
import os

# jax 0.10 can choose code that compiles in a third of the time, of which the
# tests' many small programs take most; jax 0.12 would not know the option.
_OLDER = tuple(importlib.metadata.version("jax").split(".")[:2]) == ("0", "10")
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Eight devices on two busy cores wait for each other longer than 40 s.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_backend_optimization_level=0",
    *["--xla_cpu_use_fusion_emitters=false"] * _OLDER,
  ]
)
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402

# A full collection walks the millions of objects that compiling leaves behind.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """A file's tests run in one process: they share what it has compiled."""
  from xdist.scheduler import LoadFileScheduling

  if config.getoption("dist") == "load":
    return LoadFileScheduling(config, log)
  return None


@pytest.fixture
def hopper(monkeypatch) -> None:
  """As if calls ran on a Hopper GPU, with a jax that has its kernels."""
  from pallas_kernels import devices

  if not devices.has_mosaic_gpu():
    pytest.skip("the GPU kernels need jax ≥ 0.11")
  monkeypatch.setattr(devices, "is_hopper", lambda: True)


@pytest.fixture
def interpreted(hopper):
  """A Hopper GPU's kernels, interpreted on this machine's CPU."""
  import jax.experimental.pallas.mosaic_gpu as plgpu

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    yield
