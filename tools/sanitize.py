"""Run the operator's Hopper kernels under compute-sanitizer, on small shapes.

    python tools/sanitize.py [--tools memcheck racecheck]

memcheck finds reads and writes out of bounds; every array gets a separate
allocation. racecheck finds unordered accesses to shared memory. Values are
compared with the quadratic equations in float32 on the CPU. The result is saved
to benchmarks/results/sanitize.json. The script exits with 1 if a tool reports
anything.
"""

import argparse
from concurrent import futures
import itertools
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOOLS = ("memcheck", "racecheck")


class Case(NamedTuple):
  """One call, forward and backward.

  Attributes:
    B: rows.
    T: tokens in a row.
    H: heads.
    P: value width of a head.
    based: coefficients of Based; False is ReBased.
    states: pass an initial state and return the final one.
    cuts: positions at which documents start.
    dtype: dtype of the arrays.
    F: query and key features of a head.
  """

  B: int
  T: int
  H: int
  P: int
  based: bool = False
  states: bool = False
  cuts: tuple[int, ...] = ()
  dtype: str = "bfloat16"
  F: int = 16


# With T ≥ 1024 the time axis is cut into slices, which adds three kernels.
CASES = (
  Case(1, 17, 1, 64),  # one chunk, with a tail
  Case(1, 136, 2, 64, based=True, states=True),
  Case(2, 70, 1, 5, dtype="float16"),
  Case(1, 150, 1, 80, based=True, cuts=(3, 64, 100)),  # two tiles of values
  Case(1, 1100, 1, 16, based=True, states=True),
  Case(1, 1100, 1, 64, cuts=(500, 501, 1000)),
  Case(1, 1100, 1, 48, based=True, states=True, cuts=(500, 1000), F=24),
)
_SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
_ERRORS = "errors of o, dq, dk, dv: "
_CLEAN = re.compile(r"^0 (errors|hazards)\b")


def run_case(case: Case) -> None:
  """Run and check a case, in the process that the tool observes."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from pallas_kernels import (
    BASED,
    REBASED,
    measure,
    polynomial_attention,
    zero_state,
  )

  cpu = jax.devices("cpu")[0]
  rng = np.random.default_rng(0)
  widths = (case.F, case.F, case.P, case.P)
  shapes = [(case.B, case.T, case.H, w) for w in widths]
  arrays = [
    rng.standard_normal(shape).astype(jnp.dtype(case.dtype)) for shape in shapes
  ]
  ids_BT = np.zeros((case.B, case.T), np.int32)
  ids_BT[:, list(case.cuts)] = 1
  ids_BT = np.cumsum(ids_BT, axis=1, dtype=np.int32)
  for start in (0, *case.cuts):
    arrays[3][:, start : start + 8] = 0  # for the reason in `measure.settled`
  coefficients = BASED if case.based else REBASED

  def call(q, k, v, name):
    state = zero_state(
      case.B, case.H, case.F, case.P, coefficients=coefficients
    )
    found = polynomial_attention(
      q,
      k,
      v,
      coefficients=coefficients,
      segment_ids=ids_BT if case.cuts else None,
      initial_state=state if case.states else None,
      return_state=case.states,
      implementation=name,
    )
    return found[0] if case.states else found

  def both(name, arrays):
    run = measure.forward_and_backward(lambda *x: call(*x, name))
    return [np.asarray(x, np.float32) for x in jax.jit(run)(*arrays)]

  found = both("gpu", arrays)
  with jax.default_device(cpu):
    wanted = both("reference", [x.astype(np.float32) for x in arrays])
  norm = np.linalg.norm
  errors = [
    float(norm(a - b) / norm(b)) for a, b in zip(found, wanted, strict=True)
  ]
  right = all(error <= measure.TOLERANCE for error in errors)
  print(f"{_ERRORS}{errors} {'right' if right else 'wrong'}", flush=True)
  if not right:
    sys.exit(1)


def run_tool(tool: str, index: int, seconds: int) -> dict:
  """Run one case under the tool and return the tool's summary."""
  env = os.environ | {
    # An allocation for each array, and kernels launched one at a time.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_enable_command_buffer=",
    "JAX_PLATFORMS": "cuda,cpu",
  }
  command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7"]
  command += [sys.executable, __file__, "--case", str(index)]
  try:
    run = subprocess.run(
      command,
      capture_output=True,
      text=True,
      env=env,
      timeout=seconds,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return {"clean": False, "summary": f"stopped after {seconds} s"}
  return judge(run.stdout + run.stderr, run.returncode)


def judge(text: str, code: int) -> dict:
  """Judge a tool's output.

  A run is clean if the process exited with 0, the values were right, and the
  tool's summary reports no error.
  """
  summaries = _SUMMARY.findall(text)
  found = [x for x in text.splitlines() if x.startswith(_ERRORS)]
  passed = bool(found) and found[0].endswith("right")
  clean = code == 0 and passed and bool(summaries)
  clean = clean and all(_CLEAN.search(words) for _, words in summaries)
  row = {
    "clean": clean,
    "values": found[0] if found else "not reached",
    "exit": code,
    "summary": [" ".join(words) for words in summaries],
  }
  if clean:
    return row
  # The tool's first lines, and the end of the process's output.
  said = [x for x in text.splitlines() if x.startswith("=========")]
  return row | {"first": said[:60], "end": text.splitlines()[-10:]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
  parser.add_argument(
    "--seconds", type=int, default=240, help="time limit of a case"
  )
  parser.add_argument(
    "--jobs", type=int, default=4, help="cases at the same time"
  )
  parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case is not None:
    run_case(CASES[args.case])
    return
  if shutil.which("compute-sanitizer") is None:
    sys.exit("compute-sanitizer was not found; it comes with the CUDA toolkit")
  from benchmarks import environment

  result = environment.describe_in_child("pallas_kernels") | {"rows": []}
  each = list(itertools.product(args.tools, range(len(CASES))))
  path = environment.RESULTS / "sanitize.json"
  with futures.ThreadPoolExecutor(args.jobs) as pool:
    found = pool.map(lambda x: run_tool(*x, args.seconds), each)
    for (tool, index), row in zip(each, found, strict=True):
      row = {"tool": tool, "case": CASES[index]._asdict(), **row}
      print(tool, row["case"], row["clean"], row["summary"], flush=True)
      result["rows"].append(row)
      # Saved after each case, so an interrupted run keeps its results.
      path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  if not all(row["clean"] for row in result["rows"]):
    sys.exit(1)


if __name__ == "__main__":
  main()
