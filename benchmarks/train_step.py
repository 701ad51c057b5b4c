"""Tokens a second and MFU of a training step of the Pile models, on one device.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --cases rebased-145m --scan --chunk 8192
    python benchmarks/train_step.py --cases rebased-145m-long --lengths 131072
    python benchmarks/train_step.py --cases attention-127m --peer
    python benchmarks/train_step.py --cases rebased-145m --devices 2

The step is the trainer's: bfloat16 over float32 parameters, AdamW with clipping
and decay of the matrices, the loss in parts, every metric; the state is
donated. Tokens are random, made on the host and put on the device before each
step; a step's metrics are read when the next one is under way, as the trainer
does. MFU is by 6 N of all parameters and the device's peak in bfloat16.

No time is taken before the gradient of one row is that of float32 in plain XLA,
and none is reported if a loss was not finite. A case that does not fit in
memory repeats norms and operators in its backward (remat "dots"), or all of it
("full"), or says that it does not fit. Results are written after each. A trace
of more steps gives the share of their time in which the device did nothing.

With --peer, a compiled PyTorch step of the same attention model is timed first,
in a process of its own, at the same shapes. With --devices N, each case is
timed on one device and then, as many rows on each, on N with FSDP; that alone,
and checked by the first losses alone.
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
import sys
import time
from typing import Any

from environment import RESULTS, ROOT, describe_apart, peak_bytes
from flax import nnx
import jax
from train_step_cases import OPTIMIZER, STEPS, Case, make_cases, make_models
import train_step_check
from train_step_check import TOLERANCE, make_model
import train_step_devices
import train_step_peer
import train_step_run

sys.path.insert(0, str(ROOT))

from pallas_kernels.measure import UNTIMED  # noqa: E402
from train import optimizer, step
from train.devices import peaks

WARM, TRACED = 3, 4  # steps before the clock, and in the trace
REMATS = ("none", "dots", "full")  # each takes less memory


def lower(case: Case, chunk: int) -> None:
  """Fills `programs` with what is to be compiled."""
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
  begin = time.perf_counter()
  case.row |= train_step_run.times(run, case, args, case.row["parameters"])
  case.row |= {
    "device_peak_bytes": peak_bytes(),
    "idle": train_step_run.idle_share(lambda: run.steps(TRACED), args.trace),
    "seconds": round(time.perf_counter() - begin, 1),
  }


def compile_checks(cases: list[Case]) -> dict[str, Any]:
  """By case name; side by side."""
  checks = {}
  for case in cases:
    if case.row["case"] not in checks:
      checks[case.row["case"]] = train_step_check.lower(case.model, case.length)
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
  """Alone, since XLA times its own kernels as it compiles.

  What does not fit is compiled again with the next remat.
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
  """Whether XLA's account of the program is within the device's memory."""
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
    size /= 2**30  # of ours, since the peak is of all cases so far
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
  parser.add_argument("--chunk", type=int, default=chunk, help="of the loss")
  parser.add_argument("--remat", choices=REMATS, default="none")
  parser.add_argument("--scan", action="store_true", help="over the layers")
  parser.add_argument("--seconds", type=float, default=2 if on_cpu else 6)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--trace", type=Path, help="keeps the traces there")
  parser.add_argument("--peer", action="store_true", help="PyTorch's step too")
  parser.add_argument("--peer-seconds", type=float, default=300, help="at most")
  parser.add_argument("--devices", type=int, default=1, help="with FSDP")
  place = "cpu" if on_cpu else "gpu"
  parser.add_argument("--out", type=Path, help="of the JSON")
  args = parser.parse_args()
  several = f"_{args.devices}" * (args.devices > 1)
  if not make_cases(args):
    parser.error(
      f"--lengths {args.lengths}: none of {args.cases} has such rows"
    )
  args.out = args.out or RESULTS / f"train_step{several}_{place}.json"
  return args


def measure_all(cases: list[Case], args, save) -> dict[str, Any]:
  """Every case on one device; `save` takes what there is after each."""
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
  # Before the device is asked for anything: all of its memory but 8 %.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  started = time.perf_counter()
  where = describe_apart("pallas_kernels", "rebased_jax", "train")
  args = parse(where["device"] == "cpu")
  cases, peers = make_cases(args), []
  wanted = train_step_peer.request(cases, args, WARM) if args.peer else None
  if wanted is not None:  # while jax has not taken the card's memory
    peers = train_step_peer.measure(wanted, where["device"], args.peer_seconds)
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
    train_step_devices.require(args.devices)
    found = train_step_devices.settings(args)
    found["rows"] = train_step_devices.measure(cases, args, WARM)
    save(found)
    return
  found = measure_all(cases, args, save)
  train_step_peer.check(peers, found["rows"])
  print("\n".join(table(found["rows"] + peers)))


if __name__ == "__main__":
  main()
