"""Where and with what a benchmark ran."""

import datetime
import json
import os
from pathlib import Path
import platform
import subprocess
import sys

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def moment(*sources: str) -> dict:
  """Date and commit; changes of the sources and benchmarks are noted."""
  git = lambda *words: subprocess.run(
    ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
  ).stdout.strip()
  dirty = git("status", "--porcelain", "--", *sources, "benchmarks/*.py")
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": git("rev-parse", "HEAD") + (" + changes" if dirty else ""),
  }


def describe(*sources: str) -> dict:
  """`moment`, the device and versions, and what XLA was told."""
  return moment(*sources) | {
    "device": jax.devices()[0].device_kind,
    "machine": platform.machine(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "jaxlib": jax.lib.__version__,
      "numpy": np.__version__,
    },
  }


def describe_apart(*sources: str) -> dict:
  """`describe` by a process of its own, so that the device stays free."""
  code = (
    f"import json, environment as e; print(json.dumps(e.describe{sources}))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT / "benchmarks",
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int | None:
  """The most bytes that the device has held, where it counts them."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
