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
from concurrent import futures
import dataclasses
import itertools
import json
import os
from pathlib import Path
import sys
import time
from typing import Any

from environment import RESULTS, ROOT, describe, peak_bytes
from flax import nnx
import jax
import jax.numpy as jnp
import mixers_errors
import mixers_report
import numpy as np

sys.path.insert(0, str(ROOT))

import rebased_jax as rj  # noqa: E402
from rebased_jax.mixers import base  # noqa: E402

MODES = ("forward", "both")
WIDER = {"bfloat16": "float32", "float32": "float64"}
# Of ‖a − b‖ / ‖b‖: roundings of 2⁻⁹ and 6e-8, up to 3e-2 and 1e-6 in short
# rows, and room for long ones. x a token late is more than 0.15 in each system.
TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}
CHECKED = 33  # positions
SLICE = 0.1  # seconds that a round gives a program, or one call


@dataclasses.dataclass(frozen=True)
class Sizes:
  width: int  # D
  heads: int  # of Attention, Based and ReBased
  features: int  # F of Based and ReBased
  tokens: int  # B · T
  lengths: tuple[int, ...]  # T
  dtype: str


# The lengths in the order in which they are measured, and written down.
GPU = Sizes(1024, 16, 16, 65536, (2048, 32768, 512, 8192), "bfloat16")
CPU = Sizes(128, 4, 16, 4096, (256, 1024, 4096), "float32")


def systems(sizes: Sizes, T: int) -> dict[str, rj.MixerConfig]:
  shape = dict(heads=sizes.heads, features=sizes.features)
  return {
    "ReBased": rj.ReBasedConfig(**shape),
    "Based": rj.BasedConfig(**shape),
    "Attention": rj.AttentionConfig(heads=sizes.heads),
    "Mamba": rj.MambaConfig(),
    "RWKV": rj.RWKVConfig(wkv_dtype="float32"),
    "Hyena": rj.HyenaConfig(length=T),
    "BaseConv": rj.BaseConvConfig(),
  }


@dataclasses.dataclass
class Case:
  """A system at a length: what is compiled, and its row of the table."""

  row: dict[str, Any]
  params: nnx.State
  programs: dict[str, Any]  # lowered, later compiled
  positions: np.ndarray
  wide: str  # the dtype of the reference


def make_case(name: str, T: int, sizes: Sizes) -> Case:
  """Everything lowered, nothing compiled."""
  config, wide = systems(sizes, T)[name], WIDER[sizes.dtype]
  site = base.Site(sizes.width, dtype=sizes.dtype)
  mixer = config.make(site, rngs=nnx.Rngs(0))
  if name == "Hyena":  # or its filter is too near 0 to count
    for layer in mixer.filter.layers:
      layer.kernel[...] = 10 * layer.kernel[...]
  graph, params = nnx.split(mixer)
  positions = np.unique(np.linspace(0, T - 1, CHECKED).astype(np.int32))
  call = lambda p, x: nnx.merge(graph, p)(x)
  shape = jax.ShapeDtypeStruct(
    (sizes.tokens // T, T, sizes.width), jnp.dtype(sizes.dtype)
  )
  lowered = {
    "forward": jax.jit(call).lower(params, shape),
    "both": jax.jit(_with_gradients(call)).lower(params, shape, shape),
  }
  with jax.enable_x64(wide == "float64"):
    wide_site = dataclasses.replace(site, dtype=wide)
    make = lambda: config.make(wide_site, rngs=nnx.Rngs(0))
    wide_graph, _ = nnx.split(nnx.eval_shape(make))
    chosen = dict(query_positions=positions[None])
    at = lambda p, x: nnx.merge(wide_graph, p)(x, **chosen)
    row = lambda n: jax.ShapeDtypeStruct((1, n, sizes.width), jnp.dtype(wide))
    with jax.default_matmul_precision("highest"):
      lowered["reference"] = jax.jit(_with_gradients(at)).lower(
        params, row(T), row(len(positions))
      )
  text = lowered["forward"].as_text()
  kernels = [x for x in ("cudnn", "mosaic_gpu") if x in text]
  row = {"system": name, "T": T, "kernel": kernels[0] if kernels else "xla"}
  return Case(row, params, lowered, positions, wide)


def _with_gradients(call):
  """(params, x, dy) → y and the gradients of both."""

  def both(params, x, dy):
    y, pull = jax.vjp(call, params, x)
    return y, pull(dy)

  return both


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


def prepare(sizes: Sizes, names: list[str]) -> list[Case]:
  """All cases compiled; on a GPU one by one.

  There XLA times its own kernels as it compiles, and chooses worse ones beside
  other work.
  """
  jobs = 1 if jax.devices()[0].platform == "gpu" else os.cpu_count()
  cases = [make_case(n, T, sizes) for T in sizes.lengths for n in names]
  with futures.ThreadPoolExecutor(jobs) as pool:
    compiled = [
      {mode: pool.submit(x.compile) for mode, x in case.programs.items()}
      for case in cases
    ]
    for case, programs in zip(cases, compiled, strict=True):
      case.programs = {mode: x.result() for mode, x in programs.items()}
  return cases


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
  parser.add_argument("--rounds", type=int, default=5)
  out = RESULTS / f"mixers_{'gpu' if on_gpu else 'cpu'}.json"
  parser.add_argument("--out", type=Path, default=out)
  parser.add_argument("--plot", type=Path, metavar="JSON", help="draw a result")
  args = parser.parse_args()
  for T in args.lengths:
    if args.tokens % T:
      parser.error(f"--tokens {args.tokens}: expected a multiple of {T}")
  return args


def main() -> None:
  args = parse()
  if args.plot:
    mixers_report.plot(json.loads(args.plot.read_text()), args.plot)
    return
  values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sizes)}
  sizes = Sizes(**values | {"lengths": tuple(args.lengths)})
  started, load = time.perf_counter(), os.getloadavg()[0]
  rows: list[dict] = []
  for T in sizes.lengths:
    part = dataclasses.replace(sizes, lengths=(T,))
    cases = prepare(part, args.systems)
    memory(cases, part)
    check(cases, part)
    measure(cases, part, args.rounds)
    rows += [case.row for case in cases]
    del cases
    rows.sort(key=lambda row: row["T"])
    result = describe("pallas_kernels", "rebased_jax") | {
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
