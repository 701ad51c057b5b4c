"""Times of the operator on a GPU, beside its peers, after a check of values.

    python benchmarks/kernels.py

Times are of the public call on (B, T, H, ·) arrays in bfloat16, all operations
around the kernels included: wall time of a run of calls that the device works
off one after the other, divided by their number; the median of several runs.
Peers are the chunked XLA form and jax's softmax attention by cuDNN with head
width 64. Values and gradients are compared with the chunked form in float32.
"""

import argparse
import datetime
import functools
import json
from pathlib import Path
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import polynomial_attention
from pallas_kernels.polynomial import arg_specs

_RESULTS = Path(__file__).parent / "results" / "kernels.json"
# Of ‖a − ref‖ / ‖ref‖. bfloat16 operands give 3e-3; a few rows of each head's
# first tokens, whose gradients are differences of large equal terms, the rest.
_TOLERANCE = 2e-2
_HBM = 3.35e12  # bytes a second, of an H100's data sheet


def inputs(spec: arg_specs.ArgSpec) -> list[jax.Array]:
  """q, k, v and the cotangent of o."""
  q, k, v = spec.arrays()
  return _normal([x.shape for x in (q, k, v, v)])


def _normal(shapes) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def forward_and_backward(call):
  """(q, k, v, do) → o and its gradients."""

  def run(q, k, v, do):
    o, pull = jax.vjp(call, q, k, v)
    return o, *pull(do)

  return run


def errors(spec, both, arrays) -> dict[str, float]:
  """‖a − ref‖ / ‖ref‖ of "gpu" against "xla" in float32."""
  found = both(*arrays)
  wide = [x.astype(jnp.float32) for x in arrays]
  reference = functools.partial(_operator, spec, "xla")
  expected = jax.jit(forward_and_backward(reference))(*wide)
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32))
  names = ("o", "dq", "dk", "dv")
  return {
    name: float(norm(a.astype(jnp.float32) - b) / norm(b))
    for name, a, b in zip(names, found, expected, strict=True)
  }


def milliseconds(function, arrays, calls: int, runs: int = 9) -> float:
  """The median time of a call, of `runs` runs of `calls` calls."""
  jax.block_until_ready(function(*arrays))
  times = []
  for _ in range(runs):
    start = time.perf_counter()
    for _ in range(calls):
      result = function(*arrays)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / calls)
  return 1e3 * float(np.median(times))


def softmax(q, k, v):
  """Causal softmax attention at head width 64, by cuDNN."""
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def measure(spec: arg_specs.ArgSpec, peers: bool) -> dict:
  """One row of the table; refuses where values are wrong."""
  arrays = inputs(spec)
  wide = _normal([(spec.B, spec.T, spec.H, 64)] * 4)
  calls = {"gpu": (functools.partial(_operator, spec, "gpu"), arrays)}
  if peers:
    calls["xla"] = (functools.partial(_operator, spec, "xla"), arrays)
    calls["cudnn softmax"] = (softmax, wide)
  row = {"name": spec.name, "B": spec.B, "T": spec.T}
  for name, (call, given) in calls.items():
    both = jax.jit(forward_and_backward(call))
    if name == "gpu":
      row["errors"] = errors(spec, both, given)
      if not all(error <= _TOLERANCE for error in row["errors"].values()):
        raise SystemExit(f"{spec.name}: wrong values, no times: {row}")
    row[name] = {
      "forward_ms": milliseconds(jax.jit(call), given[:3], 10),
      "both_ms": milliseconds(both, given, 5),
    }
  moved = 2 * spec.B * spec.T * spec.H * (2 * spec.F + 2 * spec.P)
  row["forward_share_of_dram"] = moved / _HBM * 1e3 / row["gpu"]["forward_ms"]
  return row


def _operator(spec, implementation, q, k, v):
  return polynomial_attention(
    q,
    k,
    v,
    coefficients=spec.coefficients,
    implementation=implementation,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = [spec.name for spec in arg_specs.SPECS]
  parser.add_argument("--specs", nargs="+", choices=names, default=names)
  parser.add_argument("--no-peers", action="store_true")
  parser.add_argument("--out", type=Path, default=_RESULTS)
  args = parser.parse_args()
  if jax.devices()[0].platform != "gpu":
    sys.exit("benchmarks/kernels.py needs a GPU")
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
  ).stdout.strip()
  result = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "rows": [],
  }
  for spec in arg_specs.SPECS:
    if spec.name in args.specs:
      row = measure(spec, not args.no_peers)
      result["rows"].append(row)
      print(json.dumps(row), flush=True)
      args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
