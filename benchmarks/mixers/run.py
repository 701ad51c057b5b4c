"""Measure one layer of every system against the row length T: time and memory.

    python benchmarks/mixers/run.py
    python benchmarks/mixers/run.py --plot benchmarks/results/mixers_cpu.json

A layer is a mixer alone, x (B, T, D) → y, through its public call, projections
included. Both the forward pass and forward with backward are measured. B · T,
the number of tokens, is the same at every T, so a cost linear in T is a level
line. On a GPU: bfloat16, D = 1024, 65,536 tokens, T = 512 … 32768. On other
devices: float32 and smaller sizes.

Values and gradients are checked first, at 33 positions of one row, against the
next wider dtype. The reference asks for those positions only, so Based, ReBased
and Attention compute it query by query. Memory is XLA's memory analysis of
the program: temporaries and outputs. If the device keeps statistics, a peak
that the program raised is recorded too. The script exits with 1 if values are
wrong. It needs jax and flax, and matplotlib for --plot.
"""

import argparse
import dataclasses
import itertools
import json
import os
from pathlib import Path
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import (  # noqa: E402
  RESULTS,
  describe,
  moment,
  peak_bytes,
)
from benchmarks.mixers import report  # noqa: E402
from benchmarks.mixers.cases import (  # noqa: E402
  CPU,
  GPU,
  MODES,
  WIDER,
  Case,
  Sizes,
  prepare,
  systems,
)

# The largest ‖a − b‖ / ‖b‖. Rounding (2⁻⁹ and 6e-8 an operation) gives up to
# 3e-2 and 1e-6 in short rows; long rows need room. An input that is one token
# late gives more than 0.15 in every system.
TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}
SOURCES = ("pallas_kernels", "rebased_jax")
SLICE = 0.1  # seconds of a program in a round; at least one call


def inputs(T: int, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
  """Return x and dy, random, for rows of length T."""
  shape = sizes.tokens // T, T, sizes.width
  keys = jax.random.split(jax.random.key(T))
  return tuple(jax.random.normal(key, shape, sizes.dtype) for key in keys)


def errors(case: Case, x_BTD: jax.Array, dy_BTD: jax.Array) -> dict[str, float]:
  """Return the errors of y, dx and each gradient; inf if not finite."""
  at, (x, dy) = case.positions, (x_BTD[:1], dy_BTD[:1, case.positions])
  chosen_BTD = jnp.zeros_like(dy_BTD).at[0, at].set(dy[0])
  forward = case.programs["forward"](case.params, x_BTD)
  y, (dparams, dx) = case.programs["both"](case.params, x_BTD, chosen_BTD)
  if not all(jnp.isfinite(z).all() for z in (forward, y, dx)):
    return {"all": float("inf")}
  with jax.enable_x64(case.wide == "float64"):
    widen = lambda z: jnp.asarray(np.asarray(z, np.float32), case.wide)
    wanted = case.programs["reference"](case.params, widen(x), widen(dy))
    y_ref, (dparams_ref, dx_ref) = jax.tree.map(np.asarray, wanted)
  found = {"forward": forward[0, at], "y": y[0, at], "dx": dx[0]}
  wanted = {"forward": y_ref[0], "y": y_ref[0], "dx": dx_ref[0]}
  return relative(
    found | {"dparams": dparams}, wanted | {"dparams": dparams_ref}
  )


def relative(found: Any, wanted: Any) -> dict[str, float]:
  """Return ‖a − b‖ / ‖b‖ of each array, by its path in the tree.

  For gradients of parameters (under "dparams"), ‖b‖ counts as at least a
  thousandth of the largest one. The gradient of a key's bias, for example, is
  zero but for rounding.
  """
  found, wanted = _flat(found), _flat(wanted)
  size = {name: np.linalg.norm(x) for name, x in wanted.items()}
  least = 1e-3 * max(x for name, x in size.items() if "dparams" in name)
  return {
    name: float(
      np.linalg.norm(np.asarray(found[name], np.float32) - x)
      / max(size[name], least if "dparams" in name else 0)
    )
    for name, x in wanted.items()
  }


def _flat(tree: Any) -> dict[str, Any]:
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {name(path): leaf for path, leaf in leaves}


def check(cases: list[Case], sizes: Sizes) -> None:
  """Put the worst errors into the rows.

  Raises:
    SystemExit: an error is above the tolerance.
  """
  limit = TOLERANCE[sizes.dtype]
  for case in cases:
    found = errors(case, *inputs(case.row["T"], sizes))
    worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    case.row |= {"worst_error": found[worst], "worst_error_of": worst}
    del case.programs["reference"]
    if not found[worst] <= limit:
      raise SystemExit(
        f"wrong values, not timed: {case.row}; expected at most {limit}"
      )


def memory(cases: list[Case], sizes: Sizes) -> None:
  """Put the memory into the rows.

  Programs run in the order of their size, before anything else. If the device's
  peak rises, the new peak therefore belongs to the program that ran.
  """
  jobs = []
  for case, mode in itertools.product(cases, MODES):
    memory = case.programs[mode].memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes
    jobs.append((size, case, mode))
  arrays = {T: inputs(T, sizes) for T in sizes.lengths}
  for size, case, mode in sorted(jobs, key=lambda job: job[0]):
    before = peak_bytes()
    jax.block_until_ready(_run(case, mode, arrays)())
    after = peak_bytes()
    raised = before is not None and after > before
    case.row[mode] = {"bytes": size, "device_peak": after if raised else None}


def measure(cases: list[Case], sizes: Sizes, rounds: int) -> None:
  """Put the times into the rows: those of the fastest round.

  Other work on the machine slows a round down; nothing speeds it up. Programs
  run in turn, so that a slow period affects all of them.
  """
  arrays = {T: inputs(T, sizes) for T in sizes.lengths}
  jobs = []
  for case, mode in itertools.product(cases, MODES):
    run = _run(case, mode, arrays)
    calls = min(max(int(SLICE / _seconds(run, 1)), 1), 20)
    jobs.append((case.row[mode], run, calls, []))
  for _ in range(rounds):
    for _, run, calls, seconds in jobs:
      seconds.append(_seconds(run, calls))
  for row, _, _, seconds in jobs:
    row["ms"] = 1e3 * min(seconds)


def _run(case: Case, mode: str, arrays: dict[int, tuple]):
  """Return a function that runs the program once, with its inputs."""
  arguments = case.params, *arrays[case.row["T"]]
  count = 2 if mode == "forward" else 3
  return lambda: case.programs[mode](*arguments[:count])


def _seconds(run, calls: int) -> float:
  """Return the seconds of one call, from several calls in a row."""
  start = time.perf_counter()
  for _ in range(calls):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def parse() -> argparse.Namespace:
  on_gpu = jax.devices()[0].platform == "gpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, default in dataclasses.asdict(GPU if on_gpu else CPU).items():
    kind = {"choices": WIDER} if name == "dtype" else {"type": int}
    nargs = "+" if name == "lengths" else None
    parser.add_argument(f"--{name}", **kind, nargs=nargs, default=default)
  names = list(systems(CPU, 1))
  parser.add_argument("--systems", nargs="+", choices=names, default=names)
  parser.add_argument(
    "--keep",
    action="store_true",
    help="keep the rows of other systems that are in the file",
  )
  parser.add_argument("--rounds", type=int, default=5)
  out = RESULTS / f"mixers_{'gpu' if on_gpu else 'cpu'}.json"
  parser.add_argument("--out", type=Path, default=out)
  parser.add_argument("--plot", type=Path, metavar="JSON", help="draw a result")
  args = parser.parse_args()
  for T in args.lengths:
    if args.tokens % T:
      parser.error(f"--tokens {args.tokens}: expected a multiple of {T}")
  return args


def kept(args: argparse.Namespace) -> list[dict]:
  """Return the rows of the file that --keep leaves as they are."""
  if not args.keep:
    return []
  old, here = json.loads(args.out.read_text()), describe(*SOURCES)
  for name in ("device", "versions"):
    if old[name] != here[name]:
      sys.exit(
        f"--keep: {args.out} was measured with {old[name]}, and this run has "
        f"{here[name]}; choose another --out"
      )
  stamp = {name: old[name] for name in ("date", "commit")}
  return [stamp | x for x in old["rows"] if x["system"] not in args.systems]


def main() -> None:
  args = parse()
  if args.plot:
    report.plot(json.loads(args.plot.read_text()), args.plot)
    return
  values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sizes)}
  sizes = Sizes(**values | {"lengths": tuple(args.lengths)})
  started, load = time.perf_counter(), os.getloadavg()[0]
  rows = kept(args)
  for T in sizes.lengths:
    part = dataclasses.replace(sizes, lengths=(T,))
    cases = prepare(part, args.systems)
    compiled = time.perf_counter() - started
    print(f"T = {T}: compiled after {compiled:.0f} s", flush=True)
    memory(cases, part)
    check(cases, part)
    measure(cases, part, args.rounds)
    rows += [case.row | moment(*SOURCES) for case in cases]
    del cases
    rows.sort(key=lambda row: row["T"])
    result = describe(*SOURCES) | {
      "sizes": dataclasses.asdict(sizes),
      "memory": "XLA's memory_analysis: temporaries and outputs; device_peak: "
      "of the device since the process began, where the program raised it",
      "tolerance": TOLERANCE[sizes.dtype],
      "cores": os.cpu_count(),
      "load_before_and_after": [load, os.getloadavg()[0]],
      "seconds": time.perf_counter() - started,
      "rows": rows,
      "verdicts": report.verdicts(rows),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"T = {T}: {result['seconds']:.0f} s so far", flush=True)
  print("\n".join(report.table(rows)))
  for line in result["verdicts"]:
    print("yes" if line["passed"] else "NO ", line["line"])


if __name__ == "__main__":
  main()
