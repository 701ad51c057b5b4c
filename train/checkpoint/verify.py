"""Verify a checkpoint: its sealed record, with a checksum for every array.

The storage has no checksum over array data, so that a flipped bit reads back as
a wrong value. The record therefore holds one for every array: a sum of mixed
32-bit words, computed where the array lives. It takes one pass over device
memory and no copy to the host, and is the same on any mesh and any number of
processes. A change of one element always changes the sum; other damage goes
unnoticed once in 2³².
"""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# 1 had other parameter names: conv and mixer. 2 did not know its step and run.
FORMAT_VERSION = 3
_OLDEST = 2  # that is still read
_NAMED = 3  # differing arrays that a message names before it counts the rest


class CheckpointError(RuntimeError):
  """A checkpoint cannot be saved, found, read or used; one line says why."""


class DamagedError(Exception):
  """The record or the arrays of a checkpoint are not what was saved."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return the leaves of nested dicts by their path, `params/norm/scale`.

  Args:
    tree: nested dicts of arrays, or of their shapes and dtypes.
    prefix: what the paths begin with.

  Raises:
    TypeError: a leaf is not an array.
    ValueError: a name is not a string, or has a slash.
  """
  flat = {}
  for name, value in tree.items():
    if not isinstance(name, str) or "/" in name:
      raise ValueError(
        f"{prefix}{name!r}: expected a string without a slash as the name of "
        "a parameter"
      )
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{name}/"))
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
      flat[prefix + name] = value
    else:
      kind = type(value).__name__
      raise TypeError(
        f"{prefix}{name} is a {kind}: expected an array or a dict"
      )
  return flat


def make_record(
  state: Mapping[str, Any],
  meta: Mapping[str, Any],
  *,
  step: int,
  run: str | None,
) -> dict[str, Any]:
  """Return the record of a checkpoint; waits for the arrays.

  Args:
    state: nested dicts of arrays.
    meta: JSON data, kept in the record.
    step: the step of the checkpoint.
    run: the id of its run. None: it belongs to no run.

  Raises:
    TypeError: a leaf of `state` or `meta` cannot be saved.
    ValueError: a name in `state` cannot be saved.
  """
  leaves = flatten(state)
  if len({path.replace("/", ".") for path in leaves}) < len(leaves):
    raise ValueError("two parameters have one name on disk: 'a.b' and 'a/b'")
  body = {
    "format_version": FORMAT_VERSION,
    "step": step,
    "run": run,
    "arrays": {
      path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
      for path, leaf in leaves.items()
    },
    "meta": dict(meta),
  }
  for path, checksum in checksums(leaves).items():
    body["arrays"][path]["checksum"] = checksum
  # Metrics may be infinite or NaN, which must not stop a save. Python's JSON
  # writes and reads them as Infinity and NaN.
  body = json.loads(json.dumps(body))
  return {**body, "sha256": _seal(body)}


def check_record(record: Any) -> None:
  """Check that a record is undamaged and of a format that can be read.

  Args:
    record: what was read, of any type.

  Raises:
    DamagedError: it is not as it was written.
    CheckpointError: its format is older or newer than this one.
  """
  if not isinstance(record, dict):
    raise DamagedError("the record is not a JSON object")
  body = {key: value for key, value in record.items() if key != "sha256"}
  if record.get("sha256") != _seal(body):
    raise DamagedError("the record has another checksum than was saved")
  version = body["format_version"]
  if version > FORMAT_VERSION:
    raise CheckpointError(
      f"the checkpoint has format {version}, of a newer trainer: expected "
      f"format {FORMAT_VERSION}; update rebased-jax"
    )
  if version < _OLDEST:
    raise CheckpointError(
      f"the checkpoint has format {version}, of a trainer before 0.1.0, whose "
      f"parameters had other names: expected format {FORMAT_VERSION}; train "
      "the run again, or use the trainer that wrote it"
    )


def check_place(record: Mapping[str, Any], step: int, run: str | None) -> None:
  """Check that a record is that of the step and the run where it was found.

  A record of format 2 says neither. Its step is believed. It is taken for that
  of `run` only if that is None.

  Args:
    record: the record, which `check_record` has checked.
    step: the step that its folder is named after.
    run: the id of the run that the folder belongs to. None: any run.

  Raises:
    CheckpointError: it is of another step or run; the message has both.
  """
  stored = record.get("step", step)
  if stored != step:
    raise CheckpointError(
      f"the checkpoint is of step {stored}: expected step {step}, the name of "
      f"its folder; rename the folder to {stored}, or take it away"
    )
  owner = record.get("run")
  if run is not None and owner != run:
    raise CheckpointError(
      f"the checkpoint is of {f'the run {owner!r}' if owner else 'no run'}: "
      f"expected {run!r}, the run of this folder; take it away"
    )


def check_arrays(
  stored: Mapping[str, Mapping[str, Any]], target: Mapping[str, Any]
) -> None:
  """Check that a record has the arrays, shapes and dtypes of the target.

  Args:
    stored: the record's `arrays`, by path.
    target: arrays or their shapes and dtypes, by path.

  Raises:
    CheckpointError: names the paths, what is stored and what is expected.
  """
  found = {p: _describe(s["dtype"], s["shape"]) for p, s in stored.items()}
  wanted = {p: _describe(x.dtype, x.shape) for p, x in target.items()}
  differing = [
    f"{path}: stored {found.get(path, 'nothing')}, "
    f"expected {wanted.get(path, 'nothing')}"
    for path in sorted(found.keys() | wanted.keys())
    if found.get(path) != wanted.get(path)
  ]
  if differing:
    more = len(differing) - _NAMED
    tail = [f"and {more} more"] if more > 0 else []
    raise CheckpointError("; ".join(differing[:_NAMED] + tail))


def check_checksums(
  stored: Mapping[str, Mapping[str, Any]], leaves: Mapping[str, Any]
) -> None:
  """Check that every array has the checksum of the record.

  Args:
    stored: the record's `arrays`, by path.
    leaves: the arrays that were read, by path.

  Raises:
    DamagedError: names the first such path.
  """
  for path, checksum in checksums(leaves).items():
    if checksum != stored[path]["checksum"]:
      raise DamagedError(f"{path} has another checksum than was saved")


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
  """Return the checksum of every array, by path.

  Args:
    leaves: arrays on any devices, by path.

  Raises:
    TypeError: an array holds neither real numbers nor booleans.
  """
  for path, leaf in leaves.items():
    if not _is_plain(leaf.dtype):
      raise TypeError(f"{path}: cannot save an array of {leaf.dtype}")
  # Each is waited for. XLA queues 32 programs on a CPU device; with more, two
  # devices of a process may wait for each other's part of a sum for good.
  return {path: int(_checksum(leaf)) for path, leaf in leaves.items()}


def _is_plain(dtype: Any) -> bool:
  kinds = (np.integer, np.floating, np.bool_)
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  words = _words(array)
  position = jnp.zeros_like(words)
  for axis in range(words.ndim):
    stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
    position += stride * lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  mixed = _mix(words + _mix(position + np.uint32(1)))
  return jnp.sum(mixed, dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
  """Return the bits of each element as uint32, or a pair of them."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  sizes = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
  word = sizes[array.dtype.itemsize]
  return lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
  """Return a bijection of uint32 in which every bit depends on all bits."""
  words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def _seal(body: Mapping[str, Any]) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _describe(dtype: Any, shape: Any) -> str:
  return f"{dtype}[{','.join(str(size) for size in shape)}]"
