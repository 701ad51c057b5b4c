"""Environment variables that the tests set before jax starts its backend."""

import importlib.metadata
import os
from pathlib import Path
import shutil

_CACHE_LIMIT = 1 << 30  # bytes; a larger cache of programs starts anew

DEVICES = 8


def xla_flags() -> str:
  """Return XLA_FLAGS for eight CPU devices and short compilations."""
  flags = [
    os.environ.get("XLA_FLAGS", ""),
    f"--xla_force_host_platform_device_count={DEVICES}",
    # Eight devices on two busy cores wait for each other longer than 40 s.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_backend_optimization_level=0",
    # These two make a program faster, and compiling it slower: splitting it
    # for several cores, and the library that fuses products of matrices.
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_experimental_ynn_fusion_type=",
  ]
  # With this flag jax 0.10 compiles the tests' many small programs in a third
  # of the time. XLA stops at a flag it does not know, and jax 0.12 dropped it.
  # `pallas_kernels.devices` cannot be asked: it imports jax.
  if importlib.metadata.version("jax").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)


def cache_folder() -> Path:
  """Return the folder that keeps compiled programs between test runs."""
  home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(home) / "rebased_jax" / "compiled_tests"


def jax_variables() -> dict[str, str]:
  """Return the variables that make jax compile fast and keep every program.

  Child processes inherit them. Variables that are already set win;
  JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
  """
  variables = {
    # No test reads the lines of source that each operation came from.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  }
  return {k: os.environ.get(k, v) for k, v in variables.items()}


def limit_cache(folder: Path, limit: int = _CACHE_LIMIT) -> None:
  """Delete the cache if its files have more than `limit` bytes together.

  Programs of older code are never read again, and jax keeps them for ever.
  """
  if not folder.is_dir():
    return
  with os.scandir(folder) as entries:
    size = sum(entry.stat().st_size for entry in entries if entry.is_file())
  if size > limit:
    shutil.rmtree(folder, ignore_errors=True)
