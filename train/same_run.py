"""Check that the processes of one run train the same run.

Each process reads its own command, files and environment. Where they differ,
training would hang, abort, or learn something that no process was told to.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
from pathlib import Path
import sys
import time
from typing import Any

import jax

import pallas_kernels
import rebased_jax
from rebased_jax.model_files import is_exported
from train import stored_config
from train.config import RunConfig
from train.data.batches import Batches
from train.devices import processes
from train.records.run_folder import RunFolder

_PACKAGES = (
  Path(pallas_kernels.__file__).parent,
  Path(rebased_jax.__file__).parent,
  Path(__file__).parent,
)
# Settings of jax that change numbers or programs, and that a variable of the
# environment sets.
_SETTINGS = (
  "jax_enable_x64",
  "jax_default_matmul_precision",
  "jax_default_prng_impl",
  "jax_threefry_partitionable",
  "jax_numpy_dtype_promotion",
  "jax_disable_jit",
)


def check(config: RunConfig, folder: RunFolder, **options: Any) -> None:
  """Check that all processes were told to train the same run.

  All must call it, before anything else that needs them all.

  Args:
    config: the run.
    folder: its folder.
    **options: what else the processes were told; JSON values.

  Raises:
    ValueError: something differs, or cannot be read in one of them.
  """
  if jax.process_count() == 1:
    return
  facts: dict[str, Any] = {}
  with processes.all_or_none():
    facts = dict(
      config=stored_config.to_dict(config),
      run_dir=str(folder.path),
      options=options,
      data=_identity(config.data.train_batches(config.batch, config.seed)),
      held_out_data=_identity(
        config.data.eval_batches(config.micro_batch, config.seed)
      ),
      init_from_files=_names(config.init_from),
      versions=processes.versions(),
      code=hash_of_code(config),
      settings={name: str(jax.config.values[name]) for name in _SETTINGS},
    )
  processes.check_alike(facts)


def _identity(batches: Batches) -> dict[str, Any]:
  return {**batches.fingerprint, "num_batches": batches.num_batches}


def _names(run: str | None) -> list[str] | None:
  """Return the names in a run's checkpoint folder; None if there is none.

  For an exported model, return the names and sizes of its files.
  """
  if run is None:
    return None
  if is_exported(run):
    return sorted(f"{x.name} {x.stat().st_size}" for x in Path(run).iterdir())
  checkpoints = RunFolder(run).checkpoints
  if not checkpoints.exists():
    return None
  return sorted(path.name for path in checkpoints.iterdir())


def hash_of_code(config: Any) -> str:
  """Return a hash of our source, and of the modules of a config's classes."""
  files = {
    f"{package.name}/{path.relative_to(package)}": path
    for package in _PACKAGES
    for path in package.rglob("*.py")
  }
  for module in _modules(config):
    file = sys.modules[module].__file__
    if file is not None:
      files[module] = Path(file)
  digest = hashlib.sha256()
  for name, path in sorted(files.items()):
    digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
  return digest.hexdigest()[:16]


def _modules(value: Any) -> Iterator[str]:
  """Yield the modules of the dataclasses that a value is made of."""
  if isinstance(value, tuple):
    for inner in value:
      yield from _modules(inner)
  elif dataclasses.is_dataclass(value):
    yield type(value).__module__
    for field in dataclasses.fields(value):
      yield from _modules(getattr(value, field.name))


def check_folder(folder: RunFolder, seconds: float = 60) -> None:
  """Check that all processes see the run folder that the first one has made.

  Args:
    folder: the run's folder.
    seconds: how long to wait for it; a network file system may show it late.

  Raises:
    ValueError: a process sees none, or another one.
  """
  if jax.process_count() == 1:
    return
  end = time.monotonic() + seconds
  while not folder.config_file.exists() and time.monotonic() < end:
    time.sleep(0.2)
  seen = "no config.json"
  if folder.config_file.exists():
    seen = hashlib.sha256(folder.config_file.read_bytes()).hexdigest()[:16]
  processes.check_alike({f"the folder {folder.path}": seen})
