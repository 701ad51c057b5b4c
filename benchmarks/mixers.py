"""Time and memory of one layer of every system, against the length of a row.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --plot benchmarks/results/mixers_cpu.json

A layer is a mixer alone, x (B, T, D) → y; both modes are of the public call,
projections included. The number of tokens, B · T, is the same at every T, so
that what is linear in T is level. On a GPU: bfloat16, D = 1024, 65,536 tokens,
T = 512 … 32768; elsewhere float32 and less.

No time is measured before values and gradients are right: those of 33 positions
of one row are compared with the next wider dtype at those positions alone,
where Based, ReBased and Attention take another way, query by query. Memory is
XLA's account of the program, temporaries and outputs; where the device keeps
statistics, its peak too, as far as a program raised it. Exits 1 where values
are wrong. Needs jax and flax; --plot, matplotlib.
"""

import argparse
import dataclasses
import itertools
import json
import os
from pathlib import Path
import sys
import time

from environment import RESULTS, describe, moment, peak_bytes
import jax
import jax.numpy as jnp
from mixers_cases import CPU, GPU, MODES, WIDER, Case, Sizes, prepare, systems
import mixers_errors
import mixers_report
import numpy as np

# Of ‖a − b‖ / ‖b‖: roundings of 2⁻⁹ and 6e-8, up to 3e-2 and 1e-6 in short
# rows, and room for long ones. x a token late is more than 0.15 in each system.
TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}
SOURCES = ("pallas_kernels", "rebased_jax")
SLICE = 0.1  # seconds that a round gives a program, or one call


def inputs(T: int, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
  """x and dy."""
  shape = sizes.tokens // T, T, sizes.width
  keys = jax.random.split(jax.random.key(T))
  return tuple(jax.random.normal(key, shape, sizes.dtype) for key in keys)


def errors(case: Case, x_BTD: jax.Array, dy_BTD: jax.Array) -> dict[str, float]:
  """Those of y, dx and each parameter's gradient; inf if not finite."""
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
  return mixers_errors.relative(
    found | {"dparams": dparams}, wanted | {"dparams": dparams_ref}
  )


def check(cases: list[Case], sizes: Sizes) -> None:
  """Puts the errors into the rows; raises SystemExit where one is too large."""
  limit = TOLERANCE[sizes.dtype]
  for case in cases:
    found = errors(case, *inputs(case.row["T"], sizes))
    worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    case.row |= {"worst_error": found[worst], "worst_error_of": worst}
    del case.programs["reference"]
    if not found[worst] <= limit:
      raise SystemExit(f"wrong values, no times: {case.row}, of {limit}")


def memory(cases: list[Case], sizes: Sizes) -> None:
  """Puts the memory into the rows.

  Programs run from the smallest on, and before any other, so that a peak that
  rises is that of the program.
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
  """Puts the times into the rows: the least round's.

  Others on the machine slow a round down, nothing speeds it up. Programs run
  in turn, so that what lasts for a while falls on all.
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
  """The program on its arrays."""
  arguments = case.params, *arrays[case.row["T"]]
  count = 2 if mode == "forward" else 3
  return lambda: case.programs[mode](*arguments[:count])


def _seconds(run, calls: int) -> float:
  """Of one call, of several that are worked off one after the other."""
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
    "--keep", action="store_true", help="the file's rows of other systems"
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
  """The rows of the file that --keep leaves as they are."""
  if not args.keep:
    return []
  old, here = json.loads(args.out.read_text()), describe(*SOURCES)
  for name in ("device", "versions"):
    if old[name] != here[name]:
      sys.exit(f"--keep: {args.out} is of {old[name]}, this is {here[name]}")
  stamp = {name: old[name] for name in ("date", "commit")}
  return [stamp | x for x in old["rows"] if x["system"] not in args.systems]


def main() -> None:
  args = parse()
  if args.plot:
    mixers_report.plot(json.loads(args.plot.read_text()), args.plot)
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
      "verdicts": mixers_report.verdicts(rows),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"T = {T}: {result['seconds']:.0f} s so far", flush=True)
  print("\n".join(mixers_report.table(rows)))
  for line in result["verdicts"]:
    print("yes" if line["passed"] else "NO ", line["line"])


if __name__ == "__main__":
  main()
