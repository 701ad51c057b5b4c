"""Named arrays in safetensors files: one file, or several with an index.

    model.safetensors                              up to `max_file_bytes`
    model-00001-of-00003.safetensors, …            above
    model.safetensors.index.json                   the file of each array

These are the names that Hugging Face's libraries use. A file is a header and
numbers, and no code of it is run. An array is never cut: one that is larger
than `max_file_bytes` has a file to itself.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rebased_jax import atomic
from rebased_jax.config_json import ConfigError, load_json
from rebased_jax.processes import failing_together, gather, is_split

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000

#: The dtypes of safetensors that parameters may have.
_DTYPES = {
  **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
  **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
  **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
  "BOOL": "bool",
}
# Floats that every float32 can hold. They are converted as they are read.
_NARROW = ("float16", "bfloat16")
_MOST_LISTED = 8


class WeightsError(ValueError):
  """Files of weights cannot be written or read, or do not fit the model."""


def write(
  folder: Path | None,
  arrays: Mapping[str, Any],
  max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
  """Write arrays to a folder.

  If an array is split over several processes, all of them call the function,
  with the same arrays. Each such array is gathered on every device in turn.

  Args:
    folder: an existing folder without such files. None: another process writes
      the arrays.
    arrays: the arrays by name. Each is copied to the memory of the process that
      writes when its file is written.
    max_file_bytes: the size above which arrays are put into several files.

  Raises:
    WeightsError: an array has a value that is not finite, or a dtype that the
      files cannot hold.
    ValueError: `max_file_bytes` is not an integer ≥ 1.
    OSError: a file cannot be written.
    OtherProcessFailed: another process raised one of these.
  """
  if not isinstance(max_file_bytes, int) or max_file_bytes < 1:
    raise ValueError(
      f"max_file_bytes={max_file_bytes!r}: expected an integer ≥ 1"
    )
  groups = _group(arrays, max_file_bytes)
  files = {}
  for number, names in enumerate(groups, start=1):
    file = f"model-{number:05}-of-{len(groups):05}.safetensors"
    if len(groups) == 1:
      file = FILE
    path = None if folder is None else folder / file
    _write_file(path, {name: arrays[name] for name in names})
    files |= dict.fromkeys(names, file)
  if folder is None or len(groups) == 1:
    return
  total = sum(_bytes(x) for x in arrays.values())
  index = {"metadata": {"total_size": total}, "weight_map": files}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(
  path: Path, arrays: Mapping[str, Any], notes: Mapping[str, str]
) -> None:
  """Write arrays to one file, which appears whole or not at all.

  If an array is split over several processes, all of them call the function,
  and process 0 writes.

  Args:
    path: the file. An existing one is replaced.
    arrays: the arrays by name.
    notes: text that the file has too.

  Raises:
    WeightsError: as `write`.
    OSError: the file cannot be written.
    OtherProcessFailed: as `write`.
  """
  together = is_split(arrays.values())
  if together and jax.process_index() != 0:
    with failing_together(together):
      _write_file(None, arrays, notes)
    return
  with failing_together(together), atomic.replacing(path) as temporary:
    _write_file(temporary, arrays, notes)


def read_notes(path: Path) -> dict[str, str]:
  """Return the notes of one file.

  Raises:
    WeightsError: the file cannot be read.
  """
  with _open(path) as file:
    return file.metadata() or {}


def read_file(
  path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Read the arrays of one file; arguments and errors are those of `read`."""
  with _open(path) as file:
    names = list(file.keys())
    slices = {name: file.get_slice(name) for name in names}
    _check(path, slices, wanted)
    return {
      name: _read_array(path, name, slices[name], target)
      for name, target in wanted.items()
    }


def is_there(folder: Path) -> bool:
  """Whether a folder has weights: one file, or an index."""
  return (folder / FILE).exists() or (folder / INDEX).exists()


def read(
  folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Read arrays from a folder, each straight to its devices.

  All names, shapes and dtypes are compared before any number is read.

  Args:
    folder: the folder.
    wanted: shape and dtype by name; the folder must have these arrays and no
      others. An array without a sharding goes to one device. With a sharding,
      a process reads only the parts that its devices hold.

  Raises:
    WeightsError: a file cannot be read, the arrays are not those that are
      wanted, or a value is not finite.
    OtherProcessFailed: another process raised this error. That is noticed if an
      array is split over processes.
  """
  together = any(
    x.sharding is not None and not x.sharding.is_fully_addressable
    for x in wanted.values()
  )
  with failing_together(together), _opened(folder) as slices:
    _check(folder, slices, wanted)
    return {
      name: _read_array(folder, name, slices[name], target)
      for name, target in wanted.items()
    }


def read_all(folder: Path) -> dict[str, np.ndarray]:
  """Return all arrays of a folder by name, in this process's memory.

  Raises:
    WeightsError: a file cannot be read.
  """
  with _opened(folder) as slices:
    return {name: np.asarray(part[...]) for name, part in slices.items()}


def _bytes(x: Any) -> int:
  return math.prod(x.shape) * x.dtype.itemsize


def _group(arrays: Mapping[str, Any], limit: int) -> list[list[str]]:
  """Return the names of each file's arrays."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, x in arrays.items():
    if groups[-1] and used + _bytes(x) > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += _bytes(x)
  return groups


def _write_file(
  path: Path | None,
  arrays: Mapping[str, Any],
  notes: Mapping[str, str] | None = None,
) -> None:
  """Write one file, or help another process to write it if `path` is None."""
  for name, x in arrays.items():
    if str(x.dtype) not in _DTYPES.values():
      raise WeightsError(
        f"{name} has the dtype {x.dtype}: expected one of "
        f"{tuple(_DTYPES.values())}"
      )
  together = is_split(arrays.values())
  found = {}
  for name, x in arrays.items():
    whole = gather(x)
    if path is not None:
      # safetensors would write any other order as if it were C order.
      found[name] = np.asarray(jax.device_get(whole), order="C")
    del whole  # or each array would stay on the devices until the last one
  with failing_together(together):
    if path is not None:
      _save(path, found, {"format": "flax", **(notes or {})})


def _save(
  path: Path, arrays: dict[str, np.ndarray], notes: dict[str, str]
) -> None:
  for name, array in arrays.items():
    _check_finite(name, array, [0] * array.ndim)
  try:
    save_file(arrays, path, metadata=notes)
  except SafetensorError as error:  # a full disk, for example
    raise OSError(f"{path} cannot be written: {error}") from error
  # The library makes a file that only its owner can read.
  path.chmod(path.parent.stat().st_mode & 0o666)
  atomic.sync(path)


def _open(path: Path) -> Any:
  """Return an open file, a context; WeightsError if it cannot be read."""
  try:
    return safe_open(path, "numpy")
  except (SafetensorError, OSError) as error:
    raise WeightsError(
      f"{path} cannot be read: {error}: expected a whole safetensors file; "
      "copy or export it again"
    ) from error


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Any]]:
  """Yield a reader of each array of a folder, by name."""
  with contextlib.ExitStack() as files:
    found = {}
    for path, names in _files(folder).items():
      file = files.enter_context(_open(path))
      there = list(file.keys())
      slices = {name: file.get_slice(name) for name in there}
      if names is not None and set(names) != set(there):
        name = sorted(set(names) ^ set(there))[0]
        raise WeightsError(
          f"{path}: {INDEX} and the file disagree on {name}: expected files of "
          "one export"
        )
      found |= slices
    yield found


def _files(folder: Path) -> dict[Path, list[str] | None]:
  """Return the files of a folder, and the names of their arrays, if known."""
  index = folder / INDEX
  if (folder / FILE).exists():
    if index.exists():
      raise WeightsError(
        f"{folder} holds {FILE} and {INDEX}: expected one of them; remove the "
        "one of another export"
      )
    return {folder / FILE: None}
  if not index.exists():
    raise WeightsError(f"{folder} holds no {FILE} and no {INDEX}")
  try:
    data = load_json(index.read_text())
  except (ConfigError, UnicodeDecodeError) as error:
    raise WeightsError(f"{index}: {error}") from error
  names = data.get("weight_map") if isinstance(data, dict) else None
  if not isinstance(names, dict) or not names:
    raise WeightsError(f"{index}: weight_map: expected the file of each array")
  found: dict[Path, list[str] | None] = {}
  for name, file in names.items():
    if not isinstance(file, str) or Path(file).name != file:
      raise WeightsError(
        f"{index}: {name}: {file!r}: expected the name of a file beside it"
      )
    if not (folder / file).exists():
      raise WeightsError(
        f"{folder / file} is missing: expected all files of {INDEX}"
      )
    listed = found.setdefault(folder / file, [])
    assert listed is not None
    listed.append(name)
  return found


def _check(
  folder: Path,
  slices: Mapping[str, Any],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
  """Check that a folder has the arrays that are wanted, and no others."""
  faults = [f"{name} is missing" for name in wanted if name not in slices]
  faults += [f"{name} is not expected" for name in slices if name not in wanted]
  for name, target in wanted.items():
    if name not in slices:
      continue
    shape, dtype = tuple(slices[name].get_shape()), _dtype(slices[name])
    if shape != target.shape:
      faults.append(f"{name} has shape {shape}: expected {target.shape}")
    elif dtype != target.dtype.name and not (
      dtype in _NARROW and target.dtype == jnp.float32
    ):
      faults.append(f"{name} is {dtype}: expected {target.dtype.name}")
  if faults:
    more = len(faults) - _MOST_LISTED
    listed = "; ".join(faults[:_MOST_LISTED])
    raise WeightsError(
      f"{folder}: the weights do not fit the model: {listed}"
      + (f"; and {more} more" if more > 0 else "")
    )


def _dtype(part: Any) -> str:
  """Return the dtype of a stored array; one that is unknown by its own name."""
  return _DTYPES.get(part.get_dtype(), part.get_dtype())


def _read_array(
  folder: Path, name: str, part: Any, target: jax.ShapeDtypeStruct
) -> jax.Array:
  def read_part(index: tuple[slice, ...]) -> np.ndarray:
    try:
      found = part[index] if index else part[...]
    except (SafetensorError, OSError) as error:
      raise WeightsError(f"{folder}: {name}: {error}") from error
    found = np.asarray(found)
    starts = [x.start or 0 for x in index] or [0] * found.ndim
    _check_finite(f"{folder}: {name}", found, starts)
    return found.astype(target.dtype, copy=False)

  if target.sharding is None:
    return jnp.asarray(read_part(()))
  return jax.make_array_from_callback(target.shape, target.sharding, read_part)


def _check_finite(name: str, x: np.ndarray, starts: list[int]) -> None:
  """Raise WeightsError if a part of an array, from `starts`, has NaN or Inf."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return
  finite = np.isfinite(x)
  if finite.all():
    return
  wrong = np.argwhere(~finite)
  first = ", ".join(str(i) for i in wrong[0] + starts)
  raise WeightsError(
    f"{name} has {len(wrong)} values that are not finite, the first at "
    f"[{first}]: expected finite numbers"
  )
