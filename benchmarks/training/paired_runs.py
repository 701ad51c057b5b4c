"""Train a language model through the kernels and through XLA, paired by seed.

    python benchmarks/training/paired_runs.py
    python benchmarks/training/paired_runs.py --minutes 9 --seeds 10
    python benchmarks/training/paired_runs.py --judge RECORD
    JAX_PLATFORMS=cpu python benchmarks/training/paired_runs.py --quick

All variants of a seed begin with the same parameters and see the same batches.
The variants are in `variants.py`: all kernels, plain XLA in bfloat16 and in
float32, copies of the latter two whose initial parameters differ in the last
bit, and kernels with a defect in a share of the tokens. A run is saved as it
ends, and what is saved is not run again. One seed after the other is run in all
variants.

The verdict has four conditions. n is the number of seeds.

- end: |mean over seeds of the loss of the last tenth, minus XLA's| is at most
  3 s / √n, where s is the root mean square of what the last bit changes.
- seed: no seed differs by more than 5 s.
- start: over the first 50 steps, before chaos, the root mean square of the
  loss minus float32's is at most 1.25 times that of XLA in bfloat16.
- bias: |mean over seeds of the loss minus float32's, over those 50 steps| is at
  most 3 of its standard errors. What rounding changes in a step has another
  sign in each seed and averages out. What a defect changes has one sign.

The kernels must pass all four, and "wrong-tokens-10" must break one. The limits
say what the conditions can see: a defect that costs less than 3 s / √n nats at
the end and less than 3 standard errors at the start is invisible to them. That
is so for errors that learning corrects, such as "wrong-tokens" with 1 % of the
tokens. `gradient_error.py` compares gradients at equal parameters, where
nothing is corrected.
"""

import argparse
from concurrent import futures
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
import sys
import time
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import RESULTS, describe, moment  # noqa: E402
from benchmarks.training import variants  # noqa: E402

SOURCES = ("pallas_kernels", "rebased_jax", "train")
START = 50  # steps in which runs of one seed are nearly the same
START_RATIO = 1.25
END_SIGMAS, SEED_SIGMAS, BIAS_SIGMAS = 3, 5, 3
KEPT = 10  # steps that a mean loss of the record is over
AT_ONCE = 100  # steps of one program
RIGHT, WRONG = "kernels", "wrong-tokens-10"
BY_DEFAULT = (RIGHT, "xla", "xla-ulp", "float32", WRONG, "float32-ulp")

Runs = dict[str, dict[str, dict[str, Any]]]  # by variant and seed


class Programs:
  """Compiled programs: one for the training of each variant, and two shared."""

  def __init__(
    self, names: list[str], sizes: variants.Sizes, tokens: int, steps: int
  ):
    """Compile everything, at the same time.

    Args:
      names: the variants.
      sizes: the sizes.
      tokens: how many tokens the text has.
      steps: steps of a run.
    """
    self.steps, self.at_once = steps, math.gcd(steps, AT_ONCE)
    seed = jax.ShapeDtypeStruct((), "int32")
    init = lambda seed: variants.init_state(sizes, seed, steps)
    lowered = {
      "init": jax.jit(init).lower(seed),
      "evaluate": variants.lower_evaluate(sizes, tokens),
    }
    for name in names:
      lowered[name] = variants.lower_advance(
        variants.VARIANTS[name],
        sizes,
        tokens,
        total=steps,
        at_once=self.at_once,
      )
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      compiled = pool.map(lambda x: x.compile(), lowered.values())
      self.compiled = dict(zip(lowered, compiled, strict=True))

  def run(self, name: str, seed: int, tokens: Any) -> dict[str, Any]:
    """Train one run; return its record."""
    began = time.perf_counter()
    state = self.compiled["init"](np.int32(seed))
    if variants.VARIANTS[name].ulp:
      state = variants.change_last_bits(state)
    parts = []
    for _ in range(self.steps // self.at_once):
      state, losses = self.compiled[name](state, tokens, np.int32(seed))
      parts.append(losses)
    held_out = float(self.compiled["evaluate"](state.params, tokens))
    losses = np.concatenate(jax.device_get(parts)).astype(np.float64)
    means = losses.reshape(-1, KEPT).mean(axis=1)
    return {
      "start": [round(x, 7) for x in losses[:START].tolist()],
      "losses": [round(x, 6) for x in means.tolist()],
      "held_out": round(held_out, 6),
      "seconds": round(time.perf_counter() - began, 1),
    }


def differences(runs: Runs, a: str, b: str) -> np.ndarray:
  """Return, by seed, the loss of the last tenth of `a` minus that of `b`."""
  seeds = sorted(runs.get(a, {}).keys() & runs.get(b, {}).keys(), key=int)

  def end(name: str, seed: str) -> float:
    losses = runs[name][seed]["losses"]
    return float(np.mean(losses[-max(len(losses) // 10, 1) :]))

  return np.array([end(a, seed) - end(b, seed) for seed in seeds])


def distance_at_start(runs: Runs, a: str, b: str) -> float:
  """Return the root mean square of a − b over the first steps of all seeds."""
  seeds = runs.get(a, {}).keys() & runs.get(b, {}).keys()
  parts = [
    np.subtract(runs[a][seed]["start"], runs[b][seed]["start"])
    for seed in seeds
  ]
  if not parts:
    return math.nan
  return float(np.sqrt(np.square(parts).mean()))


def bias_at_start(runs: Runs, a: str, b: str) -> tuple[float, float]:
  """Return the mean of a − b over seeds and first steps, and its error.

  The error is the standard error over seeds. Both are in nats.
  """
  seeds = runs.get(a, {}).keys() & runs.get(b, {}).keys()
  means = [
    np.subtract(runs[a][seed]["start"], runs[b][seed]["start"]).mean()
    for seed in seeds
  ]
  if len(means) < 2:
    return math.nan, math.nan
  error = np.std(means, ddof=1) / math.sqrt(len(means))
  return float(np.mean(means)), float(error)


def judge(runs: Runs) -> dict[str, Any] | None:
  """Return the verdict on each variant that is compared with XLA.

  Args:
    runs: the runs so far.

  Returns:
    None before two seeds of "xla", "xla-ulp" and "float32" are there.
  """
  changes = differences(runs, "xla-ulp", "xla")
  if len(changes) < 2 or len(differences(runs, "xla", "float32")) < 2:
    return None
  spread = float(np.sqrt(np.square(changes).mean()))
  start = distance_at_start(runs, "xla", "float32")
  found: dict[str, Any] = {
    "spread_of_last_bit": round(spread, 6),
    "xla_minus_float32_at_start": round(start, 8),
    # [mean, standard error] of each variant, the last bit's copies included
    "bias_at_start": {
      name: [round(x, 7) for x in bias_at_start(runs, name, "float32")]
      for name in runs
      if name != "float32"
    },
    "variants": {},
  }
  judged = [x for x in runs if x == RIGHT or x.startswith("wrong")]
  for name in judged:
    ends = differences(runs, name, "xla")
    n = len(ends)
    if n < 2:
      continue
    ratio = distance_at_start(runs, name, "float32") / start
    bias, error = bias_at_start(runs, name, "float32")
    passes = {
      "end": abs(ends.mean()) <= END_SIGMAS * spread / math.sqrt(n),
      "seed": np.abs(ends).max() <= SEED_SIGMAS * spread,
      "start": ratio <= START_RATIO,
      "bias": abs(bias) <= BIAS_SIGMAS * error,
    }
    found["variants"][name] = {
      "seeds": n,
      "minus_xla": [round(float(x), 5) for x in ends],
      "mean": round(float(ends.mean()), 5),
      "standard_error": round(float(ends.std(ddof=1) / math.sqrt(n)), 5),
      "limit_of_mean": round(END_SIGMAS * spread / math.sqrt(n), 5),
      "start_ratio": round(ratio, 3),
      "bias": round(bias, 7),
      "bias_standard_error": round(error, 7),
      "passes": {key: bool(value) for key, value in passes.items()},
    }
  passed = {
    name: all(row["passes"].values()) for name, row in found["variants"].items()
  }
  found["noticed"] = sorted(
    name for name, right in passed.items() if name != RIGHT and not right
  )
  found["passed"] = passed.get(RIGHT, False) and WRONG in found["noticed"]
  return found


def table(verdict: dict[str, Any]) -> str:
  """Return the verdict as text."""
  lines = [
    f"last bit: {verdict['spread_of_last_bit']:.5f} nats a seed",
    "variant         seeds   minus XLA       limit    start  breaks",
  ]
  for name, row in verdict["variants"].items():
    failed = [key for key, passes in row["passes"].items() if not passes]
    lines.append(
      f"{name:<15} {row['seeds']:>5}  {row['mean']:+.5f}±"
      f"{row['standard_error']:.5f}  {row['limit_of_mean']:.5f}  "
      f"{row['start_ratio']:>5.2f}  {', '.join(failed) or '–'}"
    )
  lines.append(f"minus float32 in the first {START} steps, mean over seeds:")
  lines += [
    f"  {name:<15} {mean:+.6f}±{error:.6f}"
    for name, (mean, error) in verdict["bias_at_start"].items()
  ]
  if WRONG not in verdict["variants"]:
    lines.append(f"no runs of {WRONG}, which has to be noticed")
  return "\n".join([*lines, "passed" if verdict["passed"] else "NOT passed"])


def conclude(verdict: dict[str, Any] | None) -> None:
  """Print the verdict; exit with 1 if it is not passed."""
  if verdict is None:
    sys.exit("no verdict: expected two seeds of each variant")
  print(table(verdict))
  if not verdict["passed"]:
    sys.exit(1)


def write(path: Path, record: dict[str, Any]) -> None:
  """Write a record with its verdict."""
  record["verdict"] = judge(record["runs"])
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seeds", type=int, default=10)
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument(
    "--variants",
    nargs="+",
    choices=variants.VARIANTS,
    default=BY_DEFAULT,
  )
  parser.add_argument(
    "--minutes", type=float, help="start no run after this time; default: none"
  )
  parser.add_argument(
    "--quick", action="store_true", help="a tiny model, for a CPU"
  )
  parser.add_argument(
    "--judge",
    type=Path,
    metavar="RECORD",
    help="run nothing; judge a record again, and write its verdict",
  )
  out = RESULTS / "paired_runs.json"
  parser.add_argument("--out", type=Path, default=out, help="the record")
  args = parser.parse_args()
  if args.steps % KEPT or args.steps < START:
    parser.error(
      f"--steps {args.steps}: expected a multiple of {KEPT}, at least {START}"
    )
  return args


def load(path: Path, conditions: dict[str, Any]) -> dict[str, Any]:
  """Return the record of a file, or an empty one.

  Raises:
    SystemExit: the file has runs under other conditions.
  """
  if not path.exists():
    return {"conditions": conditions, "runs": {}}
  record = json.loads(path.read_text(encoding="utf-8"))
  if record["conditions"] != conditions:
    sys.exit(
      f"{path} has runs under {record['conditions']}: expected {conditions}; "
      "name another file with --out"
    )
  return record


def main() -> None:
  args = parse()
  if args.judge is not None:
    record = json.loads(args.judge.read_text(encoding="utf-8"))
    write(args.judge, record)
    conclude(record["verdict"])
    return
  began = time.perf_counter()
  sizes = variants.QUICK if args.quick else variants.Sizes()
  tokens, text = variants.make_tokens(sizes)
  conditions = {
    "sizes": dataclasses.asdict(sizes),
    "steps": args.steps,
    "text": text,
    "device": jax.devices()[0].device_kind,
  }
  record = load(args.out, conditions)
  todo = [
    (seed, name)
    for seed, name in itertools.product(range(args.seeds), args.variants)
    if str(seed) not in record["runs"].get(name, {})
  ]
  names = list(dict.fromkeys(name for _, name in todo))
  programs = Programs(names, sizes, len(tokens), args.steps)
  tokens = jax.device_put(tokens)
  for seed, name in todo:
    seconds = time.perf_counter() - began
    if args.minutes is not None and seconds > 60 * args.minutes:
      print(f"stopped after {seconds:.0f} s; the same command continues")
      break
    row = programs.run(name, seed, tokens) | {"at": moment(*SOURCES)}
    record["runs"].setdefault(name, {})[str(seed)] = row
    print(
      f"{time.perf_counter() - began:5.0f} s  seed {seed}  {name:<15} loss "
      f"{row['losses'][-1]:.4f}, held out {row['held_out']:.4f}, took "
      f"{row['seconds']:.1f} s",
      flush=True,
    )
    record["environment"] = describe(*SOURCES)
    write(args.out, record)
  conclude(record.get("verdict"))


if __name__ == "__main__":
  main()
