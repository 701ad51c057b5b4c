"""Settings for every test: eight CPU devices, strict types, a program cache."""

import gc
import os
import signal

import jax_settings

# Before jax starts its backend.
os.environ["XLA_FLAGS"] = jax_settings.xla_flags()
os.environ.update(jax_settings.jax_variables())
os.environ.setdefault("MPLBACKEND", "agg")
# Several test processes share a GPU. By default each would take 75 % of its
# memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

# A shell ignores SIGINT in `pytest … &`, and nohup ignores SIGHUP. The programs
# that tests start would inherit that, but not a handler that does nothing.
for number in (signal.SIGINT, signal.SIGHUP):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, lambda *_: None)
# A full collection walks the millions of objects that compiling leaves behind.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
  """Limit the program cache once, before xdist starts its workers."""
  if not hasattr(config, "workerinput"):
    jax_settings.limit_cache(jax_settings.cache_folder())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Run the tests of a file in one process, which compiles for all of them."""
  from xdist.scheduler import LoadFileScheduling

  if config.getoption("dist") == "load":
    return LoadFileScheduling(config, log)
  return None


def pytest_collection_finish(session: pytest.Session) -> None:
  """Spare the imported modules from all later collections of garbage."""
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Free what a file of tests has traced and compiled.

  jax would keep all of it, which comes to several GB in a process.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session", autouse=True)
def cache_on_the_cpu_only() -> None:
  """Keep no compiled programs of an accelerator between runs.

  The cache is there for the many small programs of the CPU tests. An
  accelerator's programs are larger, and fewer of them repeat.
  """
  if jax.default_backend() != "cpu":
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(autouse=True)
def nan_in_free_memory(request: pytest.FixtureRequest) -> None:
  """Fill memory of the GPU with NaN before each test of kernels on it.

  Buffers of results, and what kernels use on the way, then start as NaN.
  """
  on_gpu = request.node.get_closest_marker("gpu") is not None
  if on_gpu and jax.default_backend() == "gpu":
    from device_memory import fill_free_memory_with_nan

    # More than most tests take, and little beside what six processes share.
    fill_free_memory_with_nan(2 << 30)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
  """Choose implementations as on a Hopper GPU; skip if jax has no kernels."""
  from pallas_kernels import devices

  if not devices.has_mosaic_gpu():
    pytest.skip("the GPU kernels need jax ≥ 0.11")
  monkeypatch.setattr(devices, "is_hopper", lambda: True)


@pytest.fixture
def hopper_on_the_cpu(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
  """Let programs for the CPU take the Hopper kernels, or what replaces them."""
  from pallas_kernels import devices

  monkeypatch.setitem(devices.KERNEL_PLATFORMS, "gpu", ("cuda", "cpu"))


@pytest.fixture
def interpreted(hopper_on_the_cpu):
  """Run the Hopper kernels in Pallas's interpreter on this machine's CPU."""
  import jax.experimental.pallas.mosaic_gpu as plgpu

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    yield
