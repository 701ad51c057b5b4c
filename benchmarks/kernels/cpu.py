"""Measure polynomial attention on the CPU: the linear and the quadratic form.

    python benchmarks/kernels/cpu.py

Sizes: B=1, H=4, F=16, P=64, float32, T = 1024 … 16384, for the forward pass and
for both passes. Values are checked before any time is printed. Memory is XLA's
memory analysis of the compiled program: temporaries and outputs, without the
arguments. The script exits with 1 in three cases: values are wrong, a doubling
of T costs the linear form more than 2.2 times as much, or the linear form does
not win at the longest T that both ran.
"""

import argparse
import itertools
import json
import os
from pathlib import Path
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import RESULTS, describe  # noqa: E402
import pallas_kernels as pk  # noqa: E402

B, H, F, P = 1, 4, 16, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
FORMS = {"linear": "xla", "quadratic": "reference"}
MODES = ("forward", "forward+backward")
LINEAR = 2.2  # the largest ratio per doubling of T: 2, and room for noise
MEMORY_GUARD = 4 << 30  # bytes; a program that needs more is not run


def inputs(T: int) -> tuple:
  keys = jax.random.split(jax.random.key(T), 4)
  widths = (F, F, P, P)
  return tuple(
    jax.random.normal(key, (B, T, H, width), jnp.float32)
    for key, width in zip(keys, widths, strict=True)
  )


def compiled(form: str, mode: str, T: int):
  """Return the compiled program of (q, k, v, do)."""

  def attend(q, k, v):
    return pk.polynomial_attention(q, k, v, implementation=FORMS[form])

  def both(q, k, v, do):
    o, vjp = jax.vjp(attend, q, k, v)
    return o, vjp(do)

  f = both if mode != "forward" else lambda q, k, v, do: attend(q, k, v)
  shapes = jax.eval_shape(lambda: inputs(T))
  return jax.jit(f).lower(*shapes).compile()


def peak_bytes(program) -> int:
  memory = program.memory_analysis()
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


def oracle(q, k, v, do, rows: np.ndarray) -> tuple:
  """Compute o and dq at these positions, and dk and dv, in float64.

  The quadratic equations are written out in NumPy. `do` counts as zero at all
  other positions.
  """
  q, k, v, do = (np.asarray(x, np.float64)[0] for x in (q, k, v, do))
  q_HRF, do_HRP = (x[rows].swapaxes(0, 1) for x in (q, do))
  k_HTF, v_HTP = k.swapaxes(0, 1), v.swapaxes(0, 1)
  seen_RT = np.arange(len(q)) <= rows[:, None]
  a_HRT = np.where(seen_RT, q_HRF @ k_HTF.swapaxes(1, 2), 0)
  sim_HRT = a_HRT**2 / F
  r_HR1 = 1 / (sim_HRT.sum(-1, keepdims=True) + 1e-6)
  o_HRP, g_HRP = sim_HRT @ v_HTP * r_HR1, do_HRP * r_HR1
  dz_HR1 = -(g_HRP * o_HRP).sum(-1, keepdims=True)
  da_HRT = (g_HRP @ v_HTP.swapaxes(1, 2) + dz_HR1) * 2 * a_HRT / F
  dq_HRF, dk_HTF = da_HRT @ k_HTF, da_HRT.swapaxes(1, 2) @ q_HRF
  dv_HTP = sim_HRT.swapaxes(1, 2) @ g_HRP
  return tuple(x.swapaxes(0, 1) for x in (o_HRP, dq_HRF, dk_HTF, dv_HTP))


def check_values(program, arrays, mode: str) -> str | None:
  """Return what is wrong with the program's outputs, or None.

  33 positions are compared. Errors may be 1e-4 of the norm: float32 sums have
  up to 16384 terms, which cancel in the gradients.
  """
  q, k, v, do = arrays
  T = q.shape[1]
  rows = np.unique(np.linspace(0, T - 1, 33).astype(int))
  do = do * jnp.zeros((1, T, 1, 1)).at[:, rows].set(1)
  outputs = program(q, k, v, do)
  want = oracle(q, k, v, do, rows)
  if mode == "forward":
    pairs = {"o": (outputs[0, rows], want[0])}
  else:
    o, (dq, dk, dv) = outputs
    got = o[0, rows], dq[0, rows], dk[0], dv[0]
    names = ("o", "dq", "dk", "dv")
    pairs = dict(zip(names, zip(got, want, strict=True), strict=True))
  apart = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
  found = {n: apart(np.asarray(a), b) for n, (a, b) in pairs.items()}
  wrong = {n: float(e) for n, e in found.items() if not e <= 1e-4}
  return f"relative errors {wrong}" if wrong else None


def prepare(form: str, mode: str, T: int) -> tuple:
  """Compile a program and check its values.

  Returns:
    The result's row, still without a time, and a function that runs the
    program once; None if the program would need too much memory.

  Raises:
    SystemExit: the values are wrong.
  """
  row = {"form": form, "mode": mode, "T": T, "seconds": None}
  program = compiled(form, mode, T)
  row["bytes"] = peak_bytes(program)
  if row["bytes"] > MEMORY_GUARD:
    return row | {"skipped": "memory guard"}, None
  arrays = inputs(T)
  wrong = check_values(program, arrays, mode)
  if wrong:
    raise SystemExit(f"{form} {mode} T={T}: wrong values, not timed: {wrong}")
  return row, lambda: jax.block_until_ready(program(*arrays))


def measure_all(lengths, rounds: int) -> list[dict]:
  """Run all programs in turn, several rounds; the median round counts.

  A machine that is slow for a while then slows all programs alike.
  """
  jobs = [
    prepare(form, mode, T)
    for T, mode, form in itertools.product(lengths, MODES, FORMS)
  ]
  seconds = [[] for _ in jobs]
  for i, (times, (_, run)) in itertools.product(
    range(rounds), zip(seconds, jobs, strict=True)
  ):
    # Slow programs, which are quadratic, run three rounds.
    if run is None or (i >= 3 and times[0] > 1):
      continue
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  for times, (row, _) in zip(seconds, jobs, strict=True):
    row["rounds"] = len(times)
    if times:
      row["seconds"] = statistics.median(times)
  return [row for row, _ in jobs]


def table(rows) -> list[str]:
  """Return the lines of a table.

  Ratios compare with half the T. The speedup is quadratic over linear time.
  """
  find = {(r["form"], r["mode"], r["T"]): r for r in rows}
  head = f"{'form':10}{'mode':18}{'T':>6}{'ms':>10}{'ratio':>7}{'MiB':>9}"
  lines = [head + f"{'ratio':>7}{'speedup':>9}"]
  for mode in MODES:
    for row in sorted(
      (r for r in rows if r["mode"] == mode), key=lambda r: (r["form"], r["T"])
    ):
      half = find.get((row["form"], mode, row["T"] // 2), {})
      other = find[("quadratic", mode, row["T"])]
      linear = row["form"] == "linear"
      lines.append(
        f"{row['form']:10}{mode:18}{row['T']:>6}"
        f"{_number(row['seconds'], 1e3, 10, '.1f')}"
        f"{_number(_ratio(row, half, 'seconds'), 1, 7, '.2f')}"
        f"{row['bytes'] / 2**20:>9.1f}"
        f"{_number(_ratio(row, half, 'bytes'), 1, 7, '.2f')}"
        f"{_number(_ratio(other, row, 'seconds') if linear else None, 1, 9)}"
        f"{'  ' + row['skipped'] if 'skipped' in row else ''}"
      )
  return lines


def _number(x, factor, width: int, form: str = ".1f") -> str:
  return f"{'–' if x is None else format(x * factor, form):>{width}}"


def _ratio(row: dict, half: dict, field: str) -> float | None:
  if not row.get(field) or not half.get(field):
    return None
  return row[field] / half[field]


def verdicts(rows) -> list[tuple[bool, str]]:
  """Return (passed, line) for each claim."""
  find = {(r["form"], r["mode"], r["T"]): r for r in rows}
  found = []
  for mode in MODES:
    for what, field in (("time", "seconds"), ("memory", "bytes")):
      ratios = [
        _ratio(find["linear", mode, T], find["linear", mode, T // 2], field)
        for T in sorted({r["T"] for r in rows})[1:]
      ]
      worst, limit = max(ratios), LINEAR
      verdict = "linear" if worst <= limit else "NOT linear"
      sign = "≤" if worst <= limit else ">"
      line = f"{mode}, {what}: {verdict}: worst ratio per doubling"
      found.append((worst <= limit, f"{line} {worst:.2f} {sign} {limit}"))
    wins = {
      r["T"]: r["seconds"] > find["linear", mode, r["T"]]["seconds"]
      for r in rows
      if (r["form"], r["mode"]) == ("quadratic", mode) and r["seconds"]
    }
    lost = [T for T, won in wins.items() if not won]
    first = min((T for T in wins if max(lost, default=0) < T), default=None)
    line = f"wins from T={first}" if first else "does NOT win"
    found.append((first is not None, f"{mode}: {line}"))
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=31)
  parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
  parser.add_argument(
    "--output",
    type=Path,
    default=RESULTS / "attention_cpu.json",
  )
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  load = [os.getloadavg()[0]]
  rows = measure_all(args.lengths, args.rounds)
  load.append(os.getloadavg()[0])
  claims = verdicts(rows)
  print("\n".join(table(rows)))
  print("memory: temporaries and outputs by XLA's memory analysis")
  print(
    f"load before and after: {load[0]:.1f}, {load[1]:.1f} on {os.cpu_count()} "
    "cores; times are noise if the load is above the number of cores"
  )
  print("\n".join(line for _, line in claims))
  report = describe("pallas_kernels") | {
    "sizes": {"B": B, "H": H, "F": F, "P": P, "dtype": "float32"},
    "memory": "XLA's memory_analysis: temporaries and outputs",
    "cores": os.cpu_count(),
    "load_before_and_after": load,
    "rows": rows,
    "verdicts": [{"passed": ok, "line": line} for ok, line in claims],
  }
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(json.dumps(report, indent=2) + "\n")
  return 0 if all(ok for ok, _ in claims) else 1


if __name__ == "__main__":
  sys.exit(main())
