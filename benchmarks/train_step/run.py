"""Measure a training step of the Pile models: tokens per second, MFU, memory.

    python benchmarks/train_step/run.py
    python benchmarks/train_step/run.py --cases rebased-145m --scan
    python benchmarks/train_step/run.py --cases rebased-145m-long
    python benchmarks/train_step/run.py --cases attention-127m --peer
    python benchmarks/train_step/run.py --cases rebased-145m --devices 2

The step is the trainer's: bfloat16 compute with float32 parameters, AdamW with
clipping and decay of the matrices, the loss in chunks, every metric, a donated
state. Random tokens are made on the host and moved to the device before each
step. As in the trainer, a step's metrics are read while the next step runs. MFU
counts 6 N operations a token for all N parameters, over the device's bfloat16
peak.

The gradient of one row is first compared with float32 in plain XLA. A loss that
is not finite gives no time. A case that does not fit in memory is compiled
again with remat "dots", then "full", and otherwise recorded as not fitting. The
result is saved after each case. A trace of further steps gives the device's
idle share.

--peer first times a compiled PyTorch step of the same attention model at the
same shapes, in a separate process. --devices N only compares one device with N
devices and FSDP, with the same number of rows on each; the first losses are the
check. The script needs the dependencies of the project. On a CPU the models are
tiny, and the numbers mean nothing.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import json
import math
import os
from pathlib import Path
import sys
import time
from typing import Any

from flax import nnx
import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import RESULTS, describe_in_child, peak_bytes  # noqa: E402
from benchmarks.train_step import (  # noqa: E402
  devices,
  gradient_check,
  runner,
  torch_peer,
)
from benchmarks.train_step.cases import (  # noqa: E402
  OPTIMIZER,
  STEPS,
  Case,
  make_cases,
  make_models,
)
from benchmarks.train_step.gradient_check import TOLERANCE, make_model  # noqa: E402
from pallas_kernels.measure import UNTIMED  # noqa: E402
from train import optimizer, step  # noqa: E402
from train.devices import peaks  # noqa: E402

WARM, TRACED = 3, 4  # steps before the clock starts, and steps in the trace
REMATS = ("none", "dots", "full")  # each needs less memory than the one before


def lower(case: Case, chunk: int) -> None:
  """Lower the case's programs, "init" and "step", into `case.programs`."""
  chunks = max(case.rows * case.length // chunk, 1)
  case.row |= {"remat": case.model.remat, "loss_chunks": chunks}
  tx = optimizer.make(OPTIMIZER, STEPS)
  graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(case.model)))
  program = step.Program(graph, tx, 1, None, loss_chunks=chunks)

  def init():
    params = nnx.to_pure_dict(nnx.state(make_model(case.model), nnx.Param))
    return step.init_state(params, tx)

  state = jax.eval_shape(init)
  case.row["parameters"] = sum(
    math.prod(x.shape) for x in jax.tree.leaves(state.params)
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
  """Check the gradient, then fill the case's row with times and memory.

  Raises:
    SystemExit: the gradient is wrong, or a loss is not finite.
  """
  state = case.programs["init"]()
  found = gradient_check.error(checks, state.params, case.model.vocab_size)
  case.row["gradient_error"] = round(found, 4)
  if not found <= TOLERANCE:
    raise SystemExit(
      f"wrong gradient, not timed: {case.row}; expected an error of at most "
      f"{TOLERANCE}"
    )
  run = runner.Runner(
    case.programs["step"],
    state,
    (case.rows, case.length),
    case.model.vocab_size,
  )
  run.steps(WARM)
  begin = time.perf_counter()
  case.row |= runner.times(run, case, args, case.row["parameters"])
  case.row |= {
    "device_peak_bytes": peak_bytes(),
    "idle": runner.idle_share(lambda: run.steps(TRACED), args.trace),
    "seconds": round(time.perf_counter() - begin, 1),
  }


def compile_checks(cases: list[Case]) -> dict[str, Any]:
  """Compile the gradient checks, in parallel; return them by case name."""
  checks = {}
  for case in cases:
    if case.row["case"] not in checks:
      checks[case.row["case"]] = gradient_check.lower(case.model, case.length)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = [
      (programs, name, pool.submit(lowered.compile, UNTIMED))
      for programs in checks.values()
      for name, lowered in list(programs.items())
    ]
    for programs, name, job in jobs:
      programs[name] = job.result()
  return checks


def compile_case(case: Case, args: argparse.Namespace) -> None:
  """Compile a case, with the next remat if it does not fit.

  Nothing else compiles meanwhile: XLA measures candidate kernels while it
  compiles.
  """
  started = time.perf_counter()
  for remat in REMATS[REMATS.index(args.remat) :]:
    case.model = dataclasses.replace(case.model, remat=remat)
    lower(case, args.chunk)
    try:
      case.programs = {k: x.compile() for k, x in case.programs.items()}
    except jax.errors.JaxRuntimeError as failure:
      if "RESOURCE_EXHAUSTED" not in str(failure) or remat == REMATS[-1]:
        raise
      continue
    if _fits(case):
      break
  case.row["compile_seconds"] = round(time.perf_counter() - started, 1)


def _fits(case: Case) -> bool:
  """Whether the program fits the device's memory, by XLA's memory analysis."""
  memory = case.programs["step"].memory_analysis()
  size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  case.row["program_bytes"] = size
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  return limit is None or size < limit


def table(rows: list[dict[str, Any]]) -> list[str]:
  lines = ["case                 length  rows  tokens/s    MFU  GiB   idle"]
  for row in rows:
    name = row.get("peer", row["case"])
    start = f"{name:<20} {row['length']:>6}  {row['rows']:>4}"
    if "failed" in row:
      lines.append(f"{start}  {row['failed']}")
      continue
    size = row.get("program_bytes") or row["device_peak_bytes"] or 0
    size /= 2**30  # our cases share a process, so its peak is of all of them
    shown = lambda x: "–" if x is None else f"{x:.1%}"
    lines.append(
      f"{start}  {row['tokens_per_second']:>8,}  {shown(row['mfu']):>5}  "
      f"{size:>4.1f}  {shown(row.get('idle')):>5}"
    )
  return lines


def parse(on_cpu: bool) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = list(make_models())
  parser.add_argument("--cases", nargs="+", choices=names, default=names)
  lengths = sorted({x for _, each in make_models().values() for x in each})
  parser.add_argument("--lengths", type=int, nargs="+", choices=lengths)
  parser.add_argument("--tiny", action="store_true", default=on_cpu)
  parser.add_argument("--tokens", type=int, default=512 if on_cpu else 32768)
  chunk = 128 if on_cpu else 16384
  parser.add_argument(
    "--chunk", type=int, default=chunk, help="tokens in a chunk of the loss"
  )
  parser.add_argument("--remat", choices=REMATS, default="none")
  parser.add_argument("--scan", action="store_true", help="scan over layers")
  parser.add_argument("--seconds", type=float, default=2 if on_cpu else 6)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--trace", type=Path, help="folder that keeps the traces")
  parser.add_argument(
    "--peer", action="store_true", help="time a PyTorch step too"
  )
  parser.add_argument(
    "--peer-seconds", type=float, default=300, help="time limit of the peer"
  )
  parser.add_argument(
    "--devices", type=int, default=1, help="compare one device with this many"
  )
  place = "cpu" if on_cpu else "gpu"
  parser.add_argument("--out", type=Path, help="the result's JSON file")
  args = parser.parse_args()
  several = f"_{args.devices}" if args.devices > 1 else ""
  if not make_cases(args):
    parser.error(
      f"--lengths {args.lengths}: no case of {args.cases} has such rows"
    )
  args.out = args.out or RESULTS / f"train_step{several}_{place}.json"
  return args


def measure_all(cases: list[Case], args, save) -> dict[str, Any]:
  """Measure every case on one device; `save` gets the result after each."""
  found = {
    "device_peak_bytes": "since the process began",
    "tolerance": TOLERANCE,
    "rows": [],
  }
  checks = compile_checks(cases)
  for case in cases:
    try:
      compile_case(case, args)
      measure(case, checks[case.row["case"]], args)
    except jax.errors.JaxRuntimeError as failure:
      if "RESOURCE_EXHAUSTED" not in str(failure):
        raise
      case.row["failed"] = "does not fit in memory"
    case.programs.clear()
    print(table([case.row])[1], flush=True)
    found["rows"].append(case.row)
    save(found)
  return found


def main() -> None:
  # Must be set before jax starts the backend: 92 % of the device's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  started = time.perf_counter()
  where = describe_in_child("pallas_kernels", "rebased_jax", "train")
  args = parse(where["device"] == "cpu")
  cases, peers = make_cases(args), []
  wanted = torch_peer.request(cases, args, WARM) if args.peer else None
  if wanted is not None:  # before jax takes the device's memory
    peers = torch_peer.measure(wanted, where["device"], args.peer_seconds)
  options = (
    "lengths",
    "tiny",
    "tokens",
    "chunk",
    "remat",
    "scan",
    "seconds",
    "rounds",
    "devices",
  )
  result = where | {
    "options": {name: getattr(args, name) for name in options},
    "mfu": "by 6 N of all parameters, of the peak in bfloat16 "
    f"({peaks.PEAK_FLOPS.get(where['device'])})",
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)

  def save(found: dict[str, Any]) -> None:
    seconds = round(time.perf_counter() - started, 1)
    whole = result | {"seconds": seconds, "peers": peers} | found
    args.out.write_text(json.dumps(whole, indent=1) + "\n")

  if args.devices > 1:
    devices.require(args.devices)
    found = devices.settings(args)
    found["rows"] = devices.measure(cases, args, WARM)
    save(found)
    return
  found = measure_all(cases, args, save)
  torch_peer.check(peers, found["rows"])
  print("\n".join(table(found["rows"] + peers)))


if __name__ == "__main__":
  main()
