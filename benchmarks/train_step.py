"""Tokens a second and MFU of a training step of the Pile models, on one device.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --cases rebased-145m --unroll --chunk 8192

The step is the trainer's: bfloat16 over float32 parameters, AdamW with clipping
and decay of the matrices, the loss in parts, every metric; the state is
donated. Tokens are random, made on the host and put on the device before each
step; a step's metrics are read when the next one is under way, as the trainer
does. MFU is by 6 N of all parameters and the device's peak in bfloat16.

No time is taken before the gradient of one row is that of float32 in plain XLA,
and none is reported if a loss was not finite. Cases compile side by side and
run from the smallest on; one that does not fit in memory repeats norms and
operators in its backward (remat "dots"), or says that it does not fit. A trace
of more steps gives the share of their time in which the device did nothing.
Needs jax, flax and optax. On a CPU the models are tiny and the case names mean
their kinds alone.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import json
import math
import os
from pathlib import Path
import statistics
import sys
import time
from typing import Any

from environment import ROOT, describe, peak_bytes
from flax import nnx
import jax
import train_step_check
from train_step_check import TOLERANCE, make_model
import train_step_run

sys.path.insert(0, str(ROOT))

from rebased_jax import ModelConfig, presets  # noqa: E402
from train import optimizer, peaks, step  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WARM, TRACED = 3, 4  # steps before the clock, and in the trace
_OPTIMIZER = optimizer.OptimizerConfig(
  warmup_steps=200,
  final_fraction=0.1,
  beta2=0.95,
  decay="matrices",
  clip_norm=1.0,
)


@dataclasses.dataclass
class Case:
  """A model at a length: what is compiled, and its row of the table."""

  row: dict[str, Any]
  model: ModelConfig
  rows: int
  length: int
  programs: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_models() -> dict[str, tuple[ModelConfig, tuple[int, ...]]]:
  """(model, lengths of its rows) by name."""
  mixer = presets.VARIANTS["rebased"]
  text = presets.pile_text(mixer)
  free = dataclasses.replace(text, positions=None)
  return {
    "attention-127m": (presets.pile_attention(), (4096,)),
    "rebased-145m": (text, (4096,)),
    "rebased-157m": (presets.pile(mixer), (4096,)),
    "rebased-145m-long": (free, (4096, 16384, 131072)),
  }


def make_cases(args: argparse.Namespace) -> list[Case]:
  cases = []
  for name, (model, lengths) in make_models().items():
    if name not in args.cases:
      continue
    if args.tiny:
      model = _tiny(model)
      lengths = tuple(length // 64 for length in lengths)
    model = dataclasses.replace(
      model,
      dtype="bfloat16",
      scan_layers=not args.unroll,
      remat=args.remat,
    )
    for length in lengths:
      rows = max(args.tokens // length, 1)
      row = {"case": name, "length": length, "rows": rows}
      cases.append(Case(row, model, rows, length))
  return cases


def _tiny(model: ModelConfig) -> ModelConfig:
  """Two pairs, 32 wide, with 64 positions if there are some."""
  mixer = dataclasses.replace(model.mixer, heads=4)
  conv = mixer if type(model.conv) is type(mixer) else model.conv
  return dataclasses.replace(
    model,
    conv=conv,
    mixer=mixer,
    vocab_size=512,
    width=32,
    pairs=2,
    positions=model.positions and 64,
    mlp_width=128,
  )


def lower(case: Case, chunk: int) -> None:
  """Fills `programs` with what is to be compiled."""
  chunks = max(case.rows * case.length // chunk, 1)
  case.row |= {"remat": case.model.remat, "loss_chunks": chunks}
  tx = optimizer.make(_OPTIMIZER, 20_000)
  graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(case.model)))
  program = step.Program(graph, tx, 1, None, loss_chunks=chunks)

  def init():
    params = nnx.to_pure_dict(nnx.state(make_model(case.model), nnx.Param))
    return step.init_state(params, tx)

  state = jax.eval_shape(init)
  case.row["parameters"] = sum(
    math.prod(x.shape) for x in jax.tree.leaves(state["params"])
  )
  shape = (case.rows, case.length)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in (("tokens", "int32"), ("targets", "int32"))
  } | {"weights": jax.ShapeDtypeStruct(shape, "float32")}
  key = jax.eval_shape(lambda: jax.random.key(0))
  run = functools.partial(step.train_step, program=program)
  text = jax.jit(run, donate_argnums=0).lower(state, batch, key)
  kernels = [x for x in ("cudnn", "mosaic_gpu") if x in text.as_text()]
  case.row["kernels"] = kernels or ["xla"]
  case.programs = {"init": jax.jit(init).lower(), "step": text}


def measure(case: Case, checks: dict[str, Any], args) -> None:
  """Fills the row; raises SystemExit where values are wrong."""
  state = case.programs["init"]()
  found = train_step_check.error(checks, state["params"], case.model.vocab_size)
  case.row["gradient_error"] = round(found, 4)
  if not found <= TOLERANCE:
    raise SystemExit(f"wrong gradient, no times: {case.row}, of {TOLERANCE}")
  run = train_step_run.Runner(
    case.programs["step"],
    state,
    (case.rows, case.length),
    case.model.vocab_size,
  )
  run.steps(WARM)
  seconds, count = [], 0
  begin = time.perf_counter()
  one = run.steps(1)
  each = max(int(args.seconds / args.rounds / one), 2)
  for _ in range(args.rounds):
    seconds.append(run.steps(each) / each)
    count += each
  if not run.finite:
    raise SystemExit(f"a loss is not finite, no times: {case.row}")
  rate = case.rows * case.length / statistics.median(seconds)
  kind = jax.devices()[0].device_kind
  mfu = peaks.mfu(rate, case.row["parameters"], kind, 1)
  case.row |= {
    "step_ms": round(1e3 * statistics.median(seconds), 2),
    "step_ms_of_rounds": [round(1e3 * x, 2) for x in seconds],
    "steps": count,
    "tokens_per_second": round(rate),
    "mfu": mfu and round(mfu, 4),
    "device_peak_bytes": peak_bytes(),
    "idle": train_step_run.idle_share(lambda: run.steps(TRACED), args.trace),
    "seconds": round(time.perf_counter() - begin, 1),
  }


def compile_all(cases: list[Case], chunk: int) -> dict[str, Any]:
  """Compiles everything side by side; the checks by case name."""
  checks = {}
  for case in cases:
    lower(case, chunk)
    if case.row["case"] not in checks:
      checks[case.row["case"]] = train_step_check.lower(case.model, case.length)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = [
      (programs, name, pool.submit(lowered.compile))
      for programs in (*(c.programs for c in cases), *checks.values())
      for name, lowered in list(programs.items())
    ]
    for programs, name, job in jobs:
      programs[name] = job.result()
  for case in cases:
    if not _fits(case) and case.model.remat == "none":
      case.model = dataclasses.replace(case.model, remat="dots")
      lower(case, chunk)
      case.programs = {k: x.compile() for k, x in case.programs.items()}
      _fits(case)
  return checks


def _fits(case: Case) -> bool:
  """Whether XLA's account of the program is within the device's memory."""
  memory = case.programs["step"].memory_analysis()
  size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  case.row["program_bytes"] = size
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  return limit is None or size < limit


def table(rows: list[dict[str, Any]]) -> list[str]:
  lines = ["case                 length  rows  tokens/s    MFU  GiB   idle"]
  for row in rows:
    start = f"{row['case']:<20} {row['length']:>6}  {row['rows']:>4}"
    if "failed" in row:
      lines.append(f"{start}  {row['failed']}")
      continue
    size = (row["device_peak_bytes"] or row["program_bytes"]) / 2**30
    shown = lambda x: "–" if x is None else f"{x:.1%}"
    lines.append(
      f"{start}  {row['tokens_per_second']:>8,}  {shown(row['mfu']):>5}  "
      f"{size:>4.1f}  {shown(row['idle']):>5}"
    )
  return lines


def parse() -> argparse.Namespace:
  on_cpu = jax.devices()[0].platform == "cpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = list(make_models())
  parser.add_argument("--cases", nargs="+", choices=names, default=names)
  parser.add_argument("--tiny", action="store_true", default=on_cpu)
  parser.add_argument("--tokens", type=int, default=512 if on_cpu else 32768)
  chunk = 128 if on_cpu else 4096
  parser.add_argument("--chunk", type=int, default=chunk, help="of the loss")
  parser.add_argument(
    "--remat", choices=("none", "dots", "full"), default="none"
  )
  parser.add_argument("--unroll", action="store_true", help="scan no layers")
  parser.add_argument("--seconds", type=float, default=2 if on_cpu else 6)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--trace", type=Path, help="keeps the traces there")
  out = RESULTS / f"train_step_{'cpu' if on_cpu else 'gpu'}.json"
  parser.add_argument("--out", type=Path, default=out)
  return parser.parse_args()


def main() -> None:
  # Before the device is asked for anything: all of its memory but 8 %.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  args = parse()
  started = time.perf_counter()
  cases = make_cases(args)
  checks = compile_all(cases, args.chunk)
  compiled = time.perf_counter() - started
  for case in sorted(cases, key=lambda case: case.row["program_bytes"]):
    try:
      measure(case, checks[case.row["case"]], args)
    except jax.errors.JaxRuntimeError as failure:
      if "RESOURCE_EXHAUSTED" not in str(failure):
        raise
      case.row["failed"] = "does not fit in memory"
    print(table([case.row])[1], flush=True)
  rows = [case.row for case in cases]
  options = ("tiny", "tokens", "chunk", "remat", "unroll", "seconds", "rounds")
  result = describe("pallas_kernels", "rebased_jax", "train") | {
    "options": {name: getattr(args, name) for name in options},
    "mfu": "by 6 N of all parameters, of the peak in bfloat16 "
    f"({peaks.PEAK_FLOPS.get(jax.devices()[0].device_kind)})",
    "device_peak_bytes": "since the process began; cases run by size",
    "tolerance": TOLERANCE,
    "compile_seconds": round(compiled, 1),
    "seconds": round(time.perf_counter() - started, 1),
    "rows": rows,
  }
  print("\n".join(table(rows)))
  args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
