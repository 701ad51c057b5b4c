"""Run Hopper kernels under compute-sanitizer, on small shapes.

    python tools/sanitize.py [--tools memcheck racecheck]
                             [--kernels polynomial recurrences]

memcheck finds reads and writes out of bounds; every array gets a separate
allocation. racecheck finds unordered accesses to shared memory. Values are
compared with those of plain jax in float32 on the CPU: the quadratic equations
of polynomial attention, or XLA's form of Mamba's scan and of WKV. The results
are saved to benchmarks/results, in sanitize.json and sanitize_recurrences.json.
The script exits with 1 if a tool reports anything.
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
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOOLS = ("memcheck", "racecheck")


class Case(NamedTuple):
  """One call of `polynomial_attention`, forward and backward.

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


class Recurrence(NamedTuple):
  """One call of `selective_scan` or `wkv`, forward and backward.

  Attributes:
    operator: the function's name.
    B: rows.
    T: tokens in a row.
    channels: I of `selective_scan`, D of `wkv`.
    cuts: positions at which documents start.
    dtype: dtype of the arrays with tokens.
    N: states of a channel of `selective_scan`.
  """

  operator: str
  B: int
  T: int
  channels: int
  cuts: tuple[int, ...] = ()
  dtype: str = "float32"
  N: int = 16


# With T = 1100 time is cut into slices, which adds a kernel to each pass. With
# one group of channels a chunk has no gaps, so that a copy may leave its row.
RECURRENCES = (
  Recurrence("selective_scan", 2, 45, 64),
  Recurrence("selective_scan", 2, 70, 128, cuts=(3, 33), dtype="bfloat16", N=5),
  Recurrence("selective_scan", 1, 40, 64, N=32),
  Recurrence("selective_scan", 1, 1100, 64, cuts=(500, 501, 1000)),
  Recurrence("wkv", 2, 45, 128),
  Recurrence("wkv", 2, 70, 256, cuts=(3, 33), dtype="bfloat16"),
  Recurrence("wkv", 1, 1100, 128, cuts=(500, 501, 1000)),
)
# The cases of each record, by the name of the kernels.
KERNELS: dict[str, tuple[Any, ...]] = {
  "polynomial": CASES,
  "recurrences": RECURRENCES,
}
RECORDS = {
  "polynomial": "sanitize.json",
  "recurrences": "sanitize_recurrences.json",
}
# The largest ‖a − b‖ / ‖b‖ of a recurrence: sums of float32, or one rounding.
_LIMITS = {"float32": 5e-5, "bfloat16": 4e-3}
_SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
_ERRORS = "errors of "
_CLEAN = re.compile(r"^0 (errors|hazards)\b")


def run_case(case: Case | Recurrence) -> None:
  """Run and check a case, in the process that the tool observes."""
  if isinstance(case, Case):
    errors, limit = polynomial_errors(case)
  else:
    errors = recurrence_errors(case, "gpu")
    limit = _LIMITS[case.dtype]
  right = all(error <= limit for error in errors.values())
  names, values = ", ".join(errors), list(errors.values())
  print(
    f"{_ERRORS}{names}: {values} {'right' if right else 'wrong'}", flush=True
  )
  if not right:
    sys.exit(1)


def polynomial_errors(case: Case) -> tuple[dict[str, float], float]:
  """Return the relative error of o and of each gradient, and its limit."""
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
  ids_BT = _segment_ids(case)
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
      segment_ids=ids_BT,
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
  names = "o", "dq", "dk", "dv"
  return _relative_errors(names, found, wanted), measure.TOLERANCE


def recurrence_errors(
  case: Recurrence, implementation: str
) -> dict[str, float]:
  """Return the relative error of each result and gradient, by name.

  Args:
    case: the call, which has an initial state.
    implementation: what computes it; the tests pass "xla".
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  import pallas_kernels as pk

  rng = np.random.default_rng(0)
  normal = lambda *shape: np.float32(rng.standard_normal(shape))
  narrow = lambda x: np.float32(x).astype(jnp.dtype(case.dtype))
  tokens, channels, N = (case.B, case.T), case.channels, case.N
  if case.operator == "wkv":
    state = normal(case.B, channels), normal(case.B, channels)
    arrays = dict(
      k=narrow(normal(*tokens, channels)),
      v=narrow(normal(*tokens, channels)),
      w=-np.exp(np.linspace(-9, 3, channels, dtype=np.float32)),
      u=normal(channels),
      # The denominator is positive.
      initial_state=pk.WKVState(state[0], np.exp(state[1]), state[1]),
    )
  else:
    arrays = dict(
      x=normal(*tokens, channels),
      delta=np.exp(rng.uniform(-7, 0, (*tokens, channels))),
      A=-np.tile(np.arange(1.0, N + 1), (channels, 1)),
      B=normal(*tokens, N),
      C=normal(*tokens, N),
      initial_state=normal(case.B, channels, N),
    )
    arrays = {name: narrow(x) for name, x in arrays.items()}
  ids_BT = _segment_ids(case)
  # Rounded, so that the cotangents of 16-bit results are exact.
  of_y = narrow(normal(*tokens, channels))
  shape = (channels,) if case.operator == "wkv" else (channels, N)
  of_state = narrow(normal(case.B, *shape))

  def both(name, arrays):
    def loss(arrays):
      y, state = getattr(pk, case.operator)(
        **arrays, segment_ids=ids_BT, implementation=name
      )
      if case.operator == "wkv":
        state = state.numerator / state.denominator
      pairs = (y, of_y), (state, of_state)
      sums = (
        (x.astype(jnp.float32) * np.float32(weights)).sum()
        for x, weights in pairs
      )
      return sum(sums), (y, state)

    grads, results = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    leaves = jax.tree_util.tree_leaves_with_path((results, grads))
    return {
      jax.tree_util.keystr(path): np.asarray(x, np.float32)
      for path, x in leaves
    }

  found = both(implementation, arrays)
  with jax.default_device(jax.devices("cpu")[0]):
    wide = jax.tree.map(np.float32, arrays)
    wanted = both("xla", wide)
  return _relative_errors(found, found.values(), wanted.values())


def _segment_ids(case: Case | Recurrence) -> Any:
  """Return int32 (B, T), or None where a row is one document."""
  import numpy as np

  if not case.cuts:
    return None
  starts_BT = np.zeros((case.B, case.T), np.int32)
  starts_BT[:, list(case.cuts)] = 1
  return np.cumsum(starts_BT, axis=1, dtype=np.int32)


def _relative_errors(names, found, wanted) -> dict[str, float]:
  """Return ‖a − b‖ / ‖b‖ of each array by name."""
  import numpy as np

  norm = np.linalg.norm
  pairs = zip(names, found, wanted, strict=True)
  return {name: float(norm(a - b) / norm(b)) for name, a, b in pairs}


def run_tool(tool: str, kernels: str, index: int, seconds: int) -> dict:
  """Run one case of the kernels under the tool; return the tool's summary."""
  env = os.environ | {
    # An allocation for each array, and kernels launched one at a time.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_enable_command_buffer=",
    "JAX_PLATFORMS": "cuda,cpu",
  }
  command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7"]
  command += [sys.executable, __file__, "--kernels", kernels]
  command += ["--case", str(index)]
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
  parser.add_argument(
    "--kernels", nargs="+", choices=KERNELS, default=list(KERNELS)
  )
  parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case is not None:
    run_case(KERNELS[args.kernels[0]][args.case])
    return
  if shutil.which("compute-sanitizer") is None:
    sys.exit("compute-sanitizer was not found; it comes with the CUDA toolkit")
  found = [check(args, kernels) for kernels in args.kernels]
  if not all(found):
    sys.exit(1)


def check(args: argparse.Namespace, kernels: str) -> bool:
  """Run all cases of the kernels, write the record; return whether it is clean.

  Args:
    args: tools, jobs and seconds.
    kernels: a name in `KERNELS`.
  """
  from benchmarks import environment

  result = environment.describe_in_child("pallas_kernels") | {"rows": []}
  cases = KERNELS[kernels]
  each = list(itertools.product(args.tools, range(len(cases))))
  path = environment.RESULTS / RECORDS[kernels]
  with futures.ThreadPoolExecutor(args.jobs) as pool:
    found = pool.map(
      lambda x: run_tool(x[0], kernels, x[1], args.seconds), each
    )
    for (tool, index), row in zip(each, found, strict=True):
      row = {"tool": tool, "case": cases[index]._asdict(), **row}
      print(tool, row["case"], row["clean"], row["summary"], flush=True)
      result["rows"].append(row)
      # Saved after each case, so an interrupted run keeps its results.
      path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  return all(row["clean"] for row in result["rows"])


if __name__ == "__main__":
  main()
