"""The sealed record of a checkpoint: what was saved, and its checksums.

The storage has no checksum over array data: a flipped bit there reads back as
a wrong value. So the record holds one for every array. They are sums of mixed
words, taken where the arrays live: one pass over device memory, no host copy,
the same number on any mesh and any number of processes. Changing one element
always changes the sum; other damage escapes it once in 2**32.
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

FORMAT_VERSION = 1
_NAMED = 3  # differing arrays that a message names before it counts the rest


class CheckpointError(RuntimeError):
  """A checkpoint cannot be saved, found, read or used; one line says why."""


class DamagedError(Exception):
  """A record or the arrays are not what was saved."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """The leaves of nested dicts by their path, `params/mixer/kernel`.

  Raises:
    TypeError: a leaf is no array.
    ValueError: a name is no string, or has a slash.
  """
  flat = {}
  for name, value in tree.items():
    if not isinstance(name, str) or "/" in name:
      raise ValueError(f"{prefix}{name!r}: not a name for a parameter")
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{name}/"))
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
      flat[prefix + name] = value
    else:
      kind = type(value).__name__
      raise TypeError(f"{prefix}{name}: not an array or a dict but {kind}")
  return flat


def make(state: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
  """The record of `state` and `meta`; waits for the arrays.

  Raises:
    TypeError: a leaf of `state` or `meta` cannot be saved.
    ValueError: a name in `state` or a number in `meta` cannot be saved.
  """
  leaves = flatten(state)
  if len({path.replace("/", ".") for path in leaves}) < len(leaves):
    raise ValueError("two parameters have one name on disk: 'a.b' and 'a/b'")
  body = {
    "format_version": FORMAT_VERSION,
    "arrays": {
      path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
      for path, leaf in leaves.items()
    },
    "meta": dict(meta),
  }
  for path, checksum in checksums(leaves).items():
    body["arrays"][path]["checksum"] = checksum
  body = json.loads(json.dumps(body, allow_nan=False))
  return {**body, "sha256": _seal(body)}


def check(record: Any) -> None:
  """Raises unless this version wrote `record` and it is undamaged.

  Raises:
    DamagedError: it is not as it was written.
    CheckpointError: a newer version of this program wrote it.
  """
  if not isinstance(record, dict):
    raise DamagedError("the record is no JSON object")
  body = {key: value for key, value in record.items() if key != "sha256"}
  if record.get("sha256") != _seal(body):
    raise DamagedError("the record has another checksum than was saved")
  version = body["format_version"]
  if version > FORMAT_VERSION:
    raise CheckpointError(
      f"the checkpoint has format {version}; this version reads formats up "
      f"to {FORMAT_VERSION}"
    )


def compare(
  stored: Mapping[str, Mapping[str, Any]], target: Mapping[str, Any]
) -> None:
  """Raises if the arrays of a record are not those of the target.

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


def verify(
  stored: Mapping[str, Mapping[str, Any]], leaves: Mapping[str, Any]
) -> None:
  """Raises if the checksum of an array is not the stored one.

  Raises:
    DamagedError: names the first such path.
  """
  for path, checksum in checksums(leaves).items():
    if checksum != stored[path]["checksum"]:
      raise DamagedError(f"{path} has another checksum than was saved")


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
  """The checksum of every array, by path.

  Raises:
    TypeError: an array has neither real numbers nor truth values.
  """
  for path, leaf in leaves.items():
    if not _is_plain(leaf.dtype):
      raise TypeError(f"{path}: cannot save an array of {leaf.dtype}")
  sums = {path: _checksum(leaf) for path, leaf in leaves.items()}
  return {path: int(value) for path, value in jax.device_get(sums).items()}


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
  """The bits of an array as uint32."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  sizes = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
  word = sizes[array.dtype.itemsize]
  return lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
  """A bijection in which every bit depends on all bits."""
  words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def _seal(body: Mapping[str, Any]) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _describe(dtype: Any, shape: Any) -> str:
  return f"{dtype}[{','.join(str(size) for size in shape)}]"
