"""Measure peak device memory for one row of 1,048,576 tokens, both passes.

`run.py` starts this script, because the allocator's peak belongs to a whole
process. The script prints a line of JSON. Inputs are generated piece by piece
along T, so that generating them does not set the peak. Values are checked
afterwards, at a few positions.
"""

import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels import measure, polynomial_attention_at
from pallas_kernels.polynomial.arg_specs import ArgSpec

SPEC = ArgSpec("long", 1, 1_048_576, 12, 16, 64)
_PARTS = 64


def long_inputs(spec: ArgSpec) -> list[jax.Array]:
  """Return q, k, v, do, random over the whole row."""

  def make(key, width):
    part = lambda key: jax.random.normal(
      key, (spec.T // _PARTS, spec.H, width), jnp.bfloat16
    )
    parts = jax.lax.map(part, jax.random.split(key, _PARTS))
    return parts.reshape(1, spec.T, spec.H, width)

  keys = jax.random.split(jax.random.key(0), 4)
  widths = (spec.F, spec.F, spec.P, spec.P)
  make = jax.jit(make, static_argnums=1)
  return [make(key, width) for key, width in zip(keys, widths, strict=True)]


def error_at(arrays, o, count: int = 8) -> float:
  """Return the relative error of o at `count` positions, the last included."""
  q, k, v, _ = (x.astype(jnp.float32) for x in arrays)
  T = q.shape[1]
  positions = jnp.linspace(64, T - 1, count).astype(jnp.int32)[None]
  expected = jax.jit(polynomial_attention_at)(
    q[:, positions[0]], k, v, positions
  )
  return measure.relative([o[:, positions[0]]], [expected])[0]


def main() -> None:
  arrays = jax.block_until_ready(long_inputs(SPEC))
  device = jax.devices()[0]
  before = device.memory_stats()["peak_bytes_in_use"]
  both = jax.jit(
    measure.forward_and_backward(measure.operator(SPEC, sys.argv[1]))
  )
  found = jax.block_until_ready(both(*arrays))
  peak = device.memory_stats()["peak_bytes_in_use"]
  moved = sum(x.nbytes for x in (*arrays, *found))
  ms = measure.milliseconds(lambda: both(*arrays))
  error = error_at(arrays, found[0])
  finite = all(bool(jnp.isfinite(x).all()) for x in found)
  row = {
    "T": SPEC.T,
    "H": SPEC.H,
    "peak_bytes": peak,
    "peak_bytes_of_inputs": before,
    "bytes_of_arrays": moved,
    "ratio": round(peak / moved, 4),
    "error_of_o": error,
    "finite": finite,
  }
  if finite and error <= measure.TOLERANCE:
    row["both_ms"] = ms
  else:
    row["skipped"] = "wrong values"
  print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
