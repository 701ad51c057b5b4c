"""What every result of a GPU benchmark says of its run."""

import datetime
from pathlib import Path
import subprocess

import jax

RESULTS = Path(__file__).parent / "results"


def header() -> dict:
  """Date, commit, whether files differ from it (null: no git), device, jax."""
  root = Path(__file__).parents[1]

  def git(*words: str) -> str:
    run = subprocess.run(
      ["git", *words], cwd=root, capture_output=True, text=True, check=False
    )
    return run.stdout.strip()

  commit = git("rev-parse", "HEAD") or None
  changed = bool(git("status", "--porcelain", "--untracked-files=no"))
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit,
    "changed": changed if commit else None,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }
