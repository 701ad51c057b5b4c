"""Runs every GPU kernel under compute-sanitizer, on its smallest shapes.

    python benchmarks/sanitize.py [--tools memcheck racecheck]

memcheck sees reads and writes out of bounds: each array is an allocation of its
own. racecheck sees threads that touch shared memory without an order. Values
are compared with the quadratic equations in float32 on the CPU. The record goes
to results/sanitize.json; exits 1 if a tool found anything.
"""

import argparse
from collections.abc import Sequence
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
  """One call, forward and backward; `cuts`: where documents start."""

  B: int
  T: int
  H: int
  P: int
  based: bool = False
  states: bool = False
  cuts: tuple[int, ...] = ()
  dtype: str = "bfloat16"
  F: int = 16


# From T = 1024 on time is cut into slices, which has three kernels of its own.
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
_CLEAN = re.compile(r"^0 (errors|hazards)\b")


def run_cases(cases: Sequence[Case]) -> None:
  """In the process under the tool: the cases, checked."""
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
  for case in cases:
    rng = np.random.default_rng(0)
    widths = (case.F, case.F, case.P, case.P)
    shapes = [(case.B, case.T, case.H, w) for w in widths]
    arrays = [
      rng.standard_normal(shape).astype(jnp.dtype(case.dtype))
      for shape in shapes
    ]
    ids_BT = np.zeros((case.B, case.T), np.int32)
    ids_BT[:, list(case.cuts)] = 1
    ids_BT = np.cumsum(ids_BT, axis=1, dtype=np.int32)
    for start in (0, *case.cuts):
      arrays[3][:, start : start + 8] = 0  # measure.settled says why
    coefficients = BASED if case.based else REBASED

    def call(
      q, k, v, name, case=case, ids_BT=ids_BT, coefficients=coefficients
    ):
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

    def both(name, arrays, call=call):
      run = measure.forward_and_backward(lambda *x: call(*x, name))
      return [np.asarray(x, np.float32) for x in jax.jit(run)(*arrays)]

    found = both("gpu", arrays)
    with jax.default_device(cpu):
      wanted = both("reference", [x.astype(np.float32) for x in arrays])
    norm = np.linalg.norm
    errors = [
      float(norm(a - b) / norm(b)) for a, b in zip(found, wanted, strict=True)
    ]
    print(f"case {case} {errors}", flush=True)
    assert all(error <= measure.TOLERANCE for error in errors)


def run_tool(tool: str, seconds: int) -> dict:
  """The tool's summary of all cases."""
  env = os.environ | {
    # An allocation for each array, and kernels launched one by one.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_enable_command_buffer=",
    "JAX_PLATFORMS": "cuda,cpu",
  }
  command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7"]
  command += [sys.executable, __file__, "--cases"]
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
    return {"clean": False, "summary": f"not within {seconds} s"}
  return judge(run.stdout + run.stderr, run.returncode)


def judge(text: str, code: int) -> dict:
  """Clean only with a summary of no errors, every case run and exit 0."""
  summaries = _SUMMARY.findall(text)
  cases = sum(line.startswith("case ") for line in text.splitlines())
  clean = code == 0 and cases == len(CASES) and bool(summaries)
  clean = clean and all(_CLEAN.search(words) for _, words in summaries)
  row = {
    "clean": clean,
    "cases": f"{cases} of {len(CASES)}",
    "exit": code,
    "summary": [" ".join(words) for words in summaries],
  }
  if clean:
    return row
  # What the tool says first, and how the process ended.
  said = [x for x in text.splitlines() if x.startswith("=========")]
  return row | {"first": said[:40], "end": text.splitlines()[-10:]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
  parser.add_argument("--seconds", type=int, default=240, help="for a tool")
  parser.add_argument("--cases", type=int, nargs="*", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.cases is not None:
    run_cases([CASES[i] for i in args.cases or range(len(CASES))])
    return
  if shutil.which("compute-sanitizer") is None:
    sys.exit("benchmarks/sanitize.py needs compute-sanitizer, of CUDA")
  import environment

  result = environment.describe("pallas_kernels") | {
    "cases": [case._asdict() for case in CASES],
    "tools": {},
  }
  for tool in args.tools:
    result["tools"][tool] = run_tool(tool, args.seconds)
    print(tool, json.dumps(result["tools"][tool]), flush=True)
  path = environment.RESULTS / "sanitize.json"
  path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  if not all(row["clean"] for row in result["tools"].values()):
    sys.exit(1)


if __name__ == "__main__":
  main()
