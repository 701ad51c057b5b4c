"""Check and time the Hopper kernels of Mamba and RWKV, beside XLA.

    python benchmarks/mixers/recurrences.py --out recurrences.json

Values and gradients of `selective_scan` and `wkv` are first compared with XLA
in float64 on small inputs, and two calls must give equal bits. Then it times,
forward and with backward, the operator alone and a whole layer: bfloat16, D =
1024, 65,536 tokens, T = 512 … 32768. `pallas_kernels.measure` takes the times.
ptxas's report on registers and spills is kept. The script exits with 1 if
values are wrong. It needs a Hopper GPU. A second call with the file of one that
was stopped measures what the file does not have.
"""

import argparse
import functools
import itertools
import json
import os
from pathlib import Path
import sys
import tempfile
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import describe  # noqa: E402
from benchmarks.kernels import kernel_times  # noqa: E402
from benchmarks.mixers.cases import GPU  # noqa: E402
from pallas_kernels import measure, selective_scan, wkv  # noqa: E402
import rebased_jax as rj  # noqa: E402
from rebased_jax.mixers import base  # noqa: E402

OPERATORS = {"Mamba": selective_scan, "RWKV": wkv}
CONFIGS = {
  "Mamba": rj.MambaConfig,
  "RWKV": functools.partial(rj.RWKVConfig, wkv_dtype="float32"),
}
# The largest ‖a − b‖ / ‖b‖. float32 sums err by 1e-6; an exponential of the
# GPU is exact to 2e-7, and such errors may add up over the tokens. bfloat16
# results are rounded by 2e-3.
TOLERANCE = {"float32": 5e-5, "bfloat16": 4e-3}
# Rows, tokens, channels, dtype, Δ's range or the size of k, documents. Time is
# cut into slices where rows are few and long.
CHECKS = (
  ("Mamba", 2, 2, 128, "float32", (1e-3, 0.1), False),
  ("Mamba", 3, 77, 128, "float32", (0.6, 0.8), False),
  ("Mamba", 2, 2100, 192, "float32", (1e-3, 0.1), False),
  ("Mamba", 2, 1111, 64, "float32", (1e-4, 40), True),
  ("Mamba", 4, 600, 2048, "bfloat16", (1e-3, 1), True),
  ("RWKV", 2, 2, 128, "float32", 1, False),
  ("RWKV", 3, 77, 256, "float32", 3, False),
  ("RWKV", 2, 2100, 128, "float32", 1, False),
  ("RWKV", 2, 1111, 128, "float32", 3, True),
  ("RWKV", 4, 600, 1024, "bfloat16", 1, True),
)


def inputs(
  system: str, rows: int, T: int, channels: int, dtype: str, scale: Any
) -> dict[str, np.ndarray]:
  """Return an operator's arrays by name, float32 numbers in their dtypes."""
  rng = np.random.default_rng(T)
  normal = lambda *shape: np.float32(rng.normal(size=shape))
  narrow = lambda x: np.float32(x).astype(jnp.dtype(dtype))
  if system == "RWKV":
    return dict(
      k=narrow(scale * normal(rows, T, channels)),
      v=narrow(normal(rows, T, channels)),
      w=-np.exp(np.linspace(-9, 3, channels, dtype=np.float32)),
      u=normal(channels),
    )
  delta = np.exp(rng.uniform(*np.log(scale), (rows, T, channels)))
  return dict(
    x=narrow(normal(rows, T, channels)),
    delta=narrow(delta),
    A=narrow(-np.tile(np.arange(1.0, 17), (channels, 1))),
    B=narrow(normal(rows, T, 16)),
    C=narrow(normal(rows, T, 16)),
  )


def with_gradients(system: str, implementation: str, ids: Any):
  """Return a function (arrays, dy) → y, the last state's sums and gradients."""

  def call(arrays):
    y, state = OPERATORS[system](
      **arrays, segment_ids=ids, implementation=implementation
    )
    if system == "RWKV":
      state = state.numerator / state.denominator
    return y, state

  def run(arrays, dy):
    (y, state), pull = jax.vjp(call, arrays)
    (grads,) = pull((dy, jnp.cos(state)))
    return dict(y=y, state=state, **grads)

  return jax.jit(run)


def check() -> list[dict]:
  """Return a row for each case of `CHECKS`, which says whether it is right."""
  rows = []
  for system, B, T, channels, dtype, scale, documents in CHECKS:
    rng = np.random.default_rng(0)
    ids = None
    if documents:
      ids = np.cumsum(rng.random((B, T)) < 0.01, axis=1).astype(np.int32)
    arrays = inputs(system, B, T, channels, dtype, scale)
    dy = np.float32(rng.normal(size=(B, T, channels))).astype(jnp.dtype(dtype))
    run = with_gradients(system, "gpu", ids)
    found, again = (jax.device_get(run(arrays, dy)) for _ in range(2))
    with jax.enable_x64(True):
      wide = jax.tree.map(np.float64, (arrays, dy))
      wanted = jax.device_get(with_gradients(system, "xla", ids)(*wide))
    errors = {
      name: float(
        np.linalg.norm(np.float64(x) - wanted[name])
        / np.linalg.norm(wanted[name])
      )
      for name, x in found.items()
    }
    same = all(np.array_equal(x, again[name]) for name, x in found.items())
    right = same and all(x <= TOLERANCE[dtype] for x in errors.values())
    row = dict(system=system, B=B, T=T, channels=channels, dtype=dtype)
    row |= dict(documents=documents, errors=errors, same=same, right=right)
    print(json.dumps(row), flush=True)
    rows.append(row)
  return rows


def operator_times(system: str, T: int) -> dict[str, float]:
  """Return the kernels' milliseconds of an operator alone, in the layer's size.

  As in the layers, Mamba's arrays are float32 and RWKV's keys bfloat16.
  """
  B = GPU.tokens // T
  if system == "Mamba":
    arrays = inputs(system, B, T, 2 * GPU.width, "float32", (0.6, 0.8))
  else:
    arrays = inputs(system, B, T, GPU.width, "bfloat16", 1)
  arrays = jax.device_put(arrays)
  call = lambda arrays: OPERATORS[system](**arrays, implementation="gpu")[0]
  return _times(call, arrays, jax.eval_shape(call, arrays))


def layer_times(system: str, implementation: str, T: int) -> dict[str, float]:
  """Return the milliseconds of a layer, forward and with backward."""
  config = CONFIGS[system](implementation=implementation)
  site = base.Site(GPU.width, dtype=GPU.dtype)
  graph, params = nnx.split(config.make(site, rngs=nnx.Rngs(0)))
  shape = GPU.tokens // T, T, GPU.width
  x = jax.random.normal(jax.random.key(T), shape, GPU.dtype)
  call = lambda arrays: nnx.merge(graph, arrays[0])(arrays[1])
  return _times(call, (params, x), jax.typeof(x))


def _times(call, arrays: Any, y: Any) -> dict[str, float]:
  def both(arrays, dy):
    y, pull = jax.vjp(call, arrays)
    return y, pull(dy)

  dy = jax.random.normal(jax.random.key(0), y.shape, y.dtype)
  forward, both = jax.jit(call), jax.jit(both)
  return dict(
    forward=measure.milliseconds(lambda: forward(arrays)),
    both=measure.milliseconds(lambda: both(arrays, dy)),
  )


def _stopped(path: Path, run: dict) -> dict:
  """Return the record of a stopped run, {} if there is none.

  Args:
    path: of the record.
    run: commit, device and versions of this run, which must be the same.
  """
  if not path.exists():
    return {}
  before = json.loads(path.read_text())
  for key in ("commit", "device", "versions"):
    if before[key] != run[key]:
      sys.exit(
        f"{path} has {key} {before[key]!r}, this run {run[key]!r}: expected "
        "the same, or a new file"
      )
  return before


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--lengths", type=int, nargs="+", default=GPU.lengths)
  names = list(OPERATORS)
  parser.add_argument("--systems", nargs="+", choices=names, default=names)
  args = parser.parse_args()
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    if jax.devices()[0].platform != "gpu":
      sys.exit(f"expected a Hopper GPU; this is {jax.devices()[0].device_kind}")
    result = describe("pallas_kernels", "rebased_jax")
    before = _stopped(args.out, result)
    rows: list[dict] = before.get("times", [])

    def write() -> None:
      found = kernel_times.registers(Path(folder))
      result["registers"] = before.get("registers", []) + found
      result["times"] = rows
      args.out.write_text(json.dumps(result, indent=1) + "\n")

    result["checks"] = before.get("checks") or check()
    write()
    for row in result["registers"]:
      print(json.dumps(row), flush=True)
    if not all(row["right"] for row in result["checks"]):
      sys.exit("wrong values, not timed")
    # XLA's programs come last: they take longest to compile.
    jobs = [("operator", "gpu"), ("layer", "gpu"), ("layer", "xla")]
    for (part, by), T, system in itertools.product(
      jobs, args.lengths, args.systems
    ):
      case = dict(system=system, part=part, by=by, T=T)
      if any(case.items() <= row.items() for row in rows):
        continue
      times = (
        operator_times(system, T)
        if part == "operator"
        else layer_times(system, by, T)
      )
      rows.append(case | times)
      print(json.dumps(rows[-1]), flush=True)
      write()


if __name__ == "__main__":
  main()
