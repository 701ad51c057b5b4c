"""Describe the machine, the versions and the commit for a result file."""

import datetime
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def moment(*sources: str) -> dict[str, str]:
  """Return the date and the commit, marked if there are uncommitted changes.

  The commit is "unknown" in a copy without git's history.

  Args:
    *sources: folders whose changes matter, beside benchmarks/ and tools/.
  """

  def git(*words: str) -> str:
    try:
      done = subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
      )
    except FileNotFoundError:  # git is not installed
      return ""
    return done.stdout.strip()

  scripts = ("benchmarks/*.py", "tools/*.py")
  dirty = git("status", "--porcelain", "--", *sources, *scripts)
  commit = git("rev-parse", "HEAD") or "unknown"
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit + (" + changes" if dirty else ""),
  }


def describe(*sources: str) -> dict[str, Any]:
  """Return `moment`, the device, the versions and the XLA flags."""
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


def describe_in_child(*sources: str) -> dict[str, Any]:
  """Return `describe` from a child process, which frees the device again."""
  code = (
    "import json; from benchmarks import environment; "
    f"print(json.dumps(environment.describe(*{sources!r})))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def python_path() -> str:
  """Return a PYTHONPATH for children: this checkout, then the given one."""
  return os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
  )


def peak_bytes() -> int | None:
  """Return the device's peak of memory in use; None if it keeps no count."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
