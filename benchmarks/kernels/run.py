"""Measure polynomial attention on a Hopper GPU, beside its peers.

    python benchmarks/kernels/run.py [--specs lm-1k …] [--only xla cudnn fla …]
    python benchmarks/kernels/run.py --report

The first command measures. The Hopper kernels always run; `--only` chooses the
peers. The second command prints the results as a Markdown table and draws the
plot. Values are checked before anything is timed. benchmarks/kernels/README.md
explains the method and the columns.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import environment  # noqa: E402
from benchmarks.kernels import floors, kernel_times, report  # noqa: E402
from benchmarks.kernels.peers import PEERS, Peer, peer  # noqa: E402
from pallas_kernels import measure  # noqa: E402
from pallas_kernels.polynomial import arg_specs  # noqa: E402

RESULTS = environment.RESULTS / "kernels.json"
EXTRAS = ("copy", "profile", "fla", "memory")
CHECKED_ROWS = 2  # rows of the batch on which FLA's values are checked
MODES = ("forward", "both")


def programs(item: Peer) -> dict[str, jax.stages.Lowered]:
  """Return the lowered programs of a peer: "forward", and "both" passes."""
  q, k, v, do = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in item.shapes()
  )
  both = jax.jit(measure.forward_and_backward(item.call))
  forward = jax.jit(item.call).lower(q, k, v)
  return {"forward": forward, "both": both.lower(q, k, v, do)}


def expected(spec, arrays) -> tuple:
  """Return the float32 results (o, dq, dk, dv) of "xla", twice.

  The second time `do` is zero on the first tokens of each row, where Σ sim can
  be near zero and rounding dominates the gradients (`measure.settled`).
  """
  wide = [x.astype(jnp.float32) for x in arrays]
  call = jax.jit(measure.forward_and_backward(measure.operator(spec, "xla")))
  call = call.lower(*wide).compile(measure.UNTIMED)
  return call(*wide), call(*wide[:3], measure.settled(wide[3]))


def errors(both, arrays, wanted) -> dict:
  """Return the relative errors of a peer, on as many rows as it has."""
  found = both(*arrays[:3], measure.settled(arrays[3]))
  wanted = [x[: arrays[0].shape[0]] for x in wanted]
  return dict(
    zip(measure.RESULTS, measure.relative(found, wanted), strict=True)
  )


def time_peer(item: Peer, compiled: dict, wanted) -> dict:
  """Return the times of one peer, or why its values forbid them."""
  row = {"note": item.note} if item.note else {}
  if not item.checked:
    arrays = measure.normal(item.shapes())
  else:
    arrays = [x[: item.qk[0]] for x in wanted["arrays"]]
    row["errors"] = errors(compiled["both"], arrays, wanted["settled"])
    if not all(e <= measure.TOLERANCE for e in row["errors"].values()):
      return row | {"skipped": "wrong values"}
  given = {"forward": arrays[:3], "both": arrays}
  for mode in MODES:
    call, inputs = compiled[mode], given[mode]
    row[f"{mode}_ms"] = measure.milliseconds(lambda c=call, x=inputs: c(*x))
  return row


def time_copy(spec) -> dict:
  """Time a device copy of the bytes that each pass must move at least."""
  row = {}
  for mode, (moved, _) in floors.least(spec).items():
    x = jax.random.bits(jax.random.key(0), (moved // 8,), jnp.uint32)
    copy = jax.jit(lambda x: x ^ jnp.uint32(1)).lower(x).compile()
    row[f"{mode}_ms"] = measure.milliseconds(lambda c=copy, x=x: c(x))
  return row


def ceilings() -> dict:
  """Measure the card's own rates: bytes copied, bfloat16 operations."""
  x = jax.random.bits(jax.random.key(0), (1 << 28,), jnp.uint32)
  copy = jax.jit(lambda x: x ^ jnp.uint32(1))
  ms = measure.milliseconds(lambda: copy(x))
  a, b = measure.normal([(8192, 8192)] * 2)
  product = jax.jit(jnp.matmul)
  product_ms = measure.milliseconds(lambda: product(a, b))
  return {
    "copy_bytes_per_s": round(2 * x.nbytes / ms * 1e3),
    "matmul_operations_per_s": round(2 * 8192**3 / product_ms * 1e3),
  }


def measure_spec(spec, names, extras, pool, keep: Path) -> dict:
  """Return the row of one shape.

  Raises:
    SystemExit: the Hopper kernels give wrong values.
  """
  found = {name: peer(name, spec) for name in names}
  lowered = {}
  for name, item in found.items():
    try:
      lowered |= {name: programs(item)} if isinstance(item, Peer) else {}
    except (NotImplementedError, RuntimeError, ValueError) as error:
      if name == "gpu":
        raise
      found[name] = str(error)[:200]
  # XLA measures candidates while it compiles. Compiling its programs at the
  # same time would disturb those measurements, so only ours are parallel.
  compiling = {
    (name, mode): pool.submit(program.compile)
    for name, each in lowered.items()
    for mode, program in each.items()
    if name == "gpu"
  }
  arrays = measure.inputs(spec)
  plain, settled = expected(spec, arrays)
  wanted = {"arrays": arrays, "settled": settled}
  row = {n: getattr(spec, n) for n in ("name", "B", "T", "H", "F", "P")}
  device = jax.devices()[0].device_kind
  for name, item in found.items():
    if isinstance(item, str):
      row[name] = {"skipped": item}
      continue
    try:
      compiled = {
        m: compiling[name, m].result() if name == "gpu" else program.compile()
        for m, program in lowered[name].items()
      }
      row[name] = time_peer(item, compiled, wanted)
    except jax.errors.JaxRuntimeError as error:
      if name == "gpu":
        raise
      row[name] = {"skipped": str(error).splitlines()[0][:200]}
      continue
    if name == "gpu":
      if "skipped" in row[name]:
        raise SystemExit(f"{spec.name}: wrong values, no times: {row}")
      # Recorded, not judged: rounding dominates where few keys were seen.
      every = measure.relative(compiled["both"](*arrays), plain)
      row[name]["errors_with_first_tokens"] = dict(
        zip(measure.RESULTS, every, strict=True)
      )
      row["compiled"] = compiled
  for mode, work in floors.least(spec).items():
    ms = row["gpu"][f"{mode}_ms"]
    row["gpu"][f"{mode}_peak"] = floors.shares(work, ms, device)
  if "copy" in extras:
    row["copy"] = time_copy(spec)
  if "fla" in extras and not spec.coefficients.affine:
    _keep(keep / f"{spec.name}.npz", arrays, settled)
  return row


def _keep(path: Path, arrays, settled) -> None:
  """Save inputs and results of the first rows for the process of FLA."""
  q, k, v, do = arrays
  low = dict(q=q, k=k, v=v, do=measure.settled(do))
  low = {
    n: np.asarray(x[:CHECKED_ROWS]).view(np.uint16) for n, x in low.items()
  }
  wide = zip(measure.RESULTS, settled, strict=True)
  wide = {n: np.asarray(x[:CHECKED_ROWS], np.float32) for n, x in wide}
  np.savez(path, **low, **wide)


def profile(rows: list[dict]) -> None:
  """Add the device time of each kernel; after all wall times are taken."""
  for row in rows:
    spec = next(s for s in arg_specs.SPECS if s.name == row["name"])
    arrays = measure.inputs(spec)
    for mode, compiled in row["compiled"].items():
      given = arrays[:3] if mode == "forward" else arrays
      wall = row["gpu"][f"{mode}_ms"]
      row["gpu"][f"{mode}_kernels"] = kernel_times.kernels(
        compiled, given, wall, spec
      )


def child(name: str, *words: str, seconds: int) -> tuple[list[dict], str]:
  """Run a script of this folder.

  Returns:
    The JSON lines that it printed, and how it ended.
  """
  command = [sys.executable, str(Path(__file__).parent / name), *words]
  settings = os.environ | {
    "PYTHONPATH": environment.python_path(),
    # This process holds most of the memory, so the child takes what it needs.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    try:
      run = subprocess.run(
        command,
        stdout=out,
        stderr=err,
        timeout=seconds,
        check=False,
        env=settings,
      )
      reason = f"exit {run.returncode}"
    except subprocess.TimeoutExpired:
      reason = f"stopped after {seconds} s"
    out.seek(0)
    err.seek(0)
    last = err.read().strip().splitlines()[-1:] or [""]
    lines = [x for x in out.read().splitlines() if x.startswith("{")]
  return [json.loads(line) for line in lines], f"{reason}: {last[0][:200]}"


def add_fla(rows: list[dict], keep: Path, seconds: int) -> None:
  """Add the times of `fla_peer.py` for the shapes that were saved for it."""
  mine = [row for row in rows if (keep / f"{row['name']}.npz").exists()]
  sizes = [{n: row[n] for n in ("name", *"BTHFP")} for row in mine]
  (keep / "sizes.json").write_text(json.dumps(sizes))
  found, reason = child("fla_peer.py", str(keep), seconds=seconds)
  times = {(x.pop("name"), x.pop("mode")): x for x in found}
  for row in rows:
    absent = {"skipped": reason if row in mine else "ReBased only"}
    for mode in ("parallel", "chunk"):
      row[f"fla {mode}"] = times.get((row["name"], mode), absent)


def run(args) -> dict:
  """Measure everything that was asked for; save the result after each shape."""
  extras = [x for x in EXTRAS if x in args.only]
  names = [x for x in PEERS if x in args.only or x == "gpu"]
  result = environment.describe("pallas_kernels") | {
    "ceilings": ceilings(),
    "rows": [],
  }
  rows = result["rows"]
  plain = lambda row: {k: v for k, v in row.items() if k != "compiled"}

  def write() -> None:
    text = json.dumps(result | {"rows": [*map(plain, rows)]}, indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")

  with (
    tempfile.TemporaryDirectory() as folder,
    ThreadPoolExecutor(args.jobs) as pool,
  ):
    for spec in arg_specs.SPECS:
      if spec.name in args.specs:
        rows.append(measure_spec(spec, names, extras, pool, Path(folder)))
        print(json.dumps(plain(rows[-1])), flush=True)
        write()
    result["registers"] = kernel_times.registers(
      Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    )
    if "fla" in extras:
      add_fla(rows, Path(folder), args.fla_seconds)
      write()
    if "profile" in extras:
      profile(rows)
      write()
    if "memory" in extras:
      found, reason = child("memory.py", "gpu", seconds=120)
      result["memory"] = found[0] if found else {"skipped": reason}
  write()
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = [spec.name for spec in arg_specs.SPECS]
  parser.add_argument("--specs", nargs="+", choices=names, default=names)
  every = [*PEERS, *EXTRAS]
  parser.add_argument("--only", nargs="+", choices=every, default=every)
  parser.add_argument("--out", type=Path, default=RESULTS)
  parser.add_argument(
    "--jobs", type=int, default=8, help="kernels compiled at the same time"
  )
  parser.add_argument(
    "--fla-seconds", type=int, default=120, help="time limit of the FLA peer"
  )
  parser.add_argument(
    "--report", action="store_true", help="print the table, draw the plot"
  )
  args = parser.parse_args()
  if args.report:
    report.report(json.loads(args.out.read_text()), args.out)
    return
  # Leave memory for the child processes.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    if jax.devices()[0].platform != "gpu":
      device = jax.devices()[0].device_kind
      sys.exit(f"this benchmark needs a Hopper GPU; this process has {device}")
    result = run(args)
  for key in ("ceilings", "registers", "memory"):
    print(key, json.dumps(result.get(key)))


if __name__ == "__main__":
  main()
