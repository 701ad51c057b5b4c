"""Check and time the Hopper kernels of the operator in float32, beside XLA.

    python benchmarks/kernels/float32_times.py --out float32.json

Values and gradients are first compared with the quadratic form in float64, on
one row and a few heads, and two calls must give equal bits. Then it times the
public call, forward and with backward. `pallas_kernels.measure` takes the
times. ptxas's report on registers and spills is kept. The script exits with 1,
and times nothing, if values are wrong. It needs a Hopper GPU.
"""

import argparse
import json
import os
from pathlib import Path
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import describe  # noqa: E402
from benchmarks.kernels import kernel_times  # noqa: E402
from pallas_kernels import measure  # noqa: E402
from pallas_kernels.polynomial import arg_specs  # noqa: E402

# The largest ‖a − b‖ / ‖b‖ of o, dq, dk and dv where do is 0 on the first
# tokens (`measure.settled`). The errors of all tokens are recorded too.
TOLERANCE = 2e-5
EPS = 1e-6
HEADS = 2  # of the first row, which are compared
# The quadratic form in float64 takes T² numbers a head. Longer rows are
# compared with "xla" in float32.
LONGEST = 4096
NAMES = ("lm-1k", "based-360m", "mqar-512", "pile-157m", "lm-32k")


def quadratic(spec, arrays) -> list[np.ndarray]:
  """Return o, dq, dk and dv (T, HEADS, ·) of the first row, in float64."""
  c = spec.coefficients.scaled(spec.F**-0.5)
  heads = []
  for h in range(HEADS):
    q, k, v, do = (np.asarray(x[0, :, h], np.float64) for x in arrays)
    a = q @ k.T
    sees = np.tri(spec.T)
    sim = sees * (c.c2 * a * a + c.c1 * a + c.c0)
    r = 1 / (sim.sum(axis=1, keepdims=True) + EPS)
    o = r * (sim @ v)
    dz = -r * (do * o).sum(axis=1, keepdims=True)
    da = sees * (r * (do @ v.T) + dz) * (2 * c.c2 * a + c.c1)
    heads.append((o, da @ k, da.T @ q, (r * sim).T @ do))
  return [np.stack(x, axis=1) for x in zip(*heads, strict=True)]


def errors(found, wanted) -> dict[str, float]:
  """Return the relative errors of the compared heads, or of everything."""
  each = {}
  for name, a, b in zip(measure.RESULTS, found, wanted, strict=True):
    a = a if a.shape == b.shape else a[0, :, :HEADS]
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    each[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
  return each


def programs(spec) -> dict:
  """Return the jitted (forward, both passes) of "gpu" and "xla"."""
  result = {}
  for name in ("gpu", "xla"):
    call = measure.operator(spec, name)
    both = measure.forward_and_backward(call)
    result[name] = jax.jit(call), jax.jit(both)
  return result


def inputs(spec) -> list[jax.Array]:
  """Return float32 q, k, v and do from N(0, 1)."""
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v = spec.arrays(jnp.float32)
  return [
    jax.random.normal(key, x.shape, x.dtype)
    for key, x in zip(keys, (q, k, v, v), strict=True)
  ]


def check(spec, arrays, both) -> tuple[dict, bool]:
  """Return the errors of "gpu" and "xla", and whether those of "gpu" fit."""
  row: dict = {}
  calm = [*arrays[:3], measure.settled(arrays[3])]
  for kind, given in (("settled", calm), ("all", arrays)):
    of_xla = both["xla"](*given)
    wanted = quadratic(spec, given) if spec.T <= LONGEST else of_xla
    row[kind] = {name: errors(both[name](*given), wanted) for name in both}
  again = zip(both["gpu"](*arrays), both["gpu"](*arrays), strict=True)
  row["equal_bits"] = all(bool((a == b).all()) for a, b in again)
  fits = all(e <= TOLERANCE for e in row["settled"]["gpu"].values())
  return row, fits and row["equal_bits"]


def times(spec, arrays, calls) -> dict:
  """Return milliseconds of each implementation, and of the kernels of "gpu"."""
  row: dict = {}
  for name, (forward, both) in calls.items():
    row[name] = {
      "forward_ms": measure.milliseconds(lambda f=forward: f(*arrays[:3])),
      "both_ms": measure.milliseconds(lambda f=both: f(*arrays)),
    }
  wall = row["gpu"]["both_ms"]
  found = kernel_times.kernels(calls["gpu"][1], arrays, wall, spec)
  # The floors beside a kernel's time are those of bfloat16.
  each = {name: x["ms"] for name, x in found.get("each", {}).items()}
  row["gpu"]["both_kernels"] = each or found
  return row


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True)
  specs = {spec.name: spec for spec in arg_specs.SPECS if spec.F <= 16}
  parser.add_argument("--specs", nargs="+", choices=specs, default=NAMES)
  args = parser.parse_args()
  if jax.devices()[0].platform != "gpu":
    sys.exit(f"expected a Hopper GPU; this is {jax.devices()[0].device_kind}")
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    result = describe("pallas_kernels") | {"rows": []}
    for name in args.specs:
      spec = specs[name]
      arrays, calls = inputs(spec), programs(spec)
      row, fits = check(spec, arrays, {n: x[1] for n, x in calls.items()})
      row = {"name": name, "errors": row}
      if fits:
        row |= times(spec, arrays, calls)
      result["rows"].append(row)
      result["registers"] = kernel_times.registers(Path(folder))
      args.out.write_text(json.dumps(result, indent=1) + "\n")
      print(json.dumps(row), flush=True)
      if not fits:
        sys.exit(f"{name}: wrong values, not timed")
    for row in result["registers"]:
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
